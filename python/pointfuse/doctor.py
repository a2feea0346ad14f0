"""What this machine offers pointfuse, and a sanity check of every backend that can run."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse import plans, reference
from pointfuse._version import __version__
from pointfuse.backends import VARIABLE, backends, calls, chosen, cuda, use_backend
from pointfuse.backends.triton import compilation
from pointfuse.convert import Unit, plan, revert
from pointfuse.functional import conv_bn_act
from pointfuse.problem import Geometry, as_pair


@dataclass(frozen=True)
class BackendReport:
    """A backend's state; ``error`` is the sanity check's largest difference from float64 over the largest value."""

    name: str
    usable: bool
    reason: str
    error: float | None
    passed: bool | None


@dataclass(frozen=True)
class FirstCompile:
    """What a call costs whose Triton kernel was never compiled before: the kernel of a bf16 1x1 unit, in seconds.

    ``reason`` says why ``seconds`` is missing; ``cache`` is where Triton keeps what it compiled.
    """

    architecture: str
    seconds: float | None
    cache: str
    reason: str

    def __str__(self) -> str:
        if self.seconds is None:
            return self.reason
        kept = f"Triton keeps what it compiled in {self.cache}"
        return f"{self.seconds:.1f} s for a bf16 1x1 unit on {self.architecture}; {kept}"


@dataclass(frozen=True)
class Report:
    """All that ``pointfuse doctor`` prints."""

    versions: dict[str, str]
    devices: list[str]
    settings: dict[str, str]
    first_compile: FirstCompile
    backends: list[BackendReport]

    @property
    def healthy(self) -> bool:
        """Whether every usable backend gave the right answer."""
        return all(b.passed is not False for b in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self) | {"healthy": self.healthy}

    def __str__(self) -> str:
        lines = [f"{name:<22} {value}" for name, value in (self.versions | self.settings).items()]
        lines.append(f"{'triton first compile':<22} {self.first_compile}")
        lines += [f"{'device':<22} {device}" for device in self.devices]
        for b in self.backends:
            state = f"not usable: {b.reason}"
            if b.usable:
                verdict = "sanity check passed" if b.passed else "SANITY CHECK FAILED"
                state = f"usable; {verdict} (error against float64 {b.error:.1e})"
            lines.append(f"{'backend ' + b.name:<22} {state}")
        return "\n".join(lines)


def examine() -> Report:
    """Look at versions, devices and settings, and check every usable backend on a tiny unit."""
    # The compile comes first, before a check has warmed the compiler up.
    return Report(_versions(), _devices(), _settings(), _first_compile(), [_check(name) for name in backends()])


def kernel_plans(model: nn.Module, input_shape: tuple[int, ...], device: str, dtype: str) -> plans.Table:
    """The CUDA kernels' plans for every convolution that a model calls, units and others, on a device by its name.

    Neither a GPU nor the model's data are used: the model moves to the meta device. Raises as :func:`plans.table`, and
    whatever the model raises when its inputs have a shape alone.
    """
    return plans.table(convolutions(model, input_shape), device, dtype)


def convolutions(model: nn.Module, input_shape: tuple[int, ...]) -> list[tuple[str, plans.Convolution]]:
    """Every convolution that a model calls, by name, in the order of the calls; on the meta device, where it stays.

    Raises whatever the model raises when its inputs have a shape alone.
    """
    model = revert(model, inplace=True).to("meta").eval()
    x = torch.empty(input_shape, device="meta")
    units = {unit.conv: unit for unit in plan(model, x).units}
    found: list[tuple[str, plans.Convolution]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(conv: Any, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                found.append((name, _convolution(conv, args[0], units.get(name))))

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _convolution(conv: nn.Conv2d, x: Tensor, unit: Unit | None) -> plans.Convolution:
    batch, c_in, height, width = (1,) * (4 - x.dim()) + tuple(x.shape)
    padding = conv.padding if isinstance(conv.padding, str) else as_pair(conv.padding, "padding")
    return plans.Convolution(
        input_shape=(batch, c_in, height, width),
        c_out=conv.out_channels,
        kernel_size=as_pair(conv.kernel_size, "kernel_size"),
        geometry=Geometry(
            as_pair(conv.stride, "stride"),
            padding if conv.padding_mode == "zeros" else conv.padding_mode,
            as_pair(conv.dilation, "dilation"),
            conv.groups,
        ),
        bias=conv.bias is not None,
        batch_norm=unit is not None and unit.bn is not None,
        activation="identity" if unit is None else unit.activation,
        residual=None if unit is None else unit.residual,
    )


def _versions() -> dict[str, str]:
    versions = {"pointfuse": __version__, "python": sys.version.split()[0], "torch": torch.__version__}
    versions["torch's CUDA"] = torch.version.cuda or "none: torch is built for the CPU"
    versions["triton"] = metadata.version("triton") if util.find_spec("triton") else "not installed"
    versions["nvcc"] = shutil.which("nvcc") or "not found"
    for part, name in (("cuda", "CUDA kernels"), ("plan", "planner")):
        versions[name] = cuda.build_record().get(part, "not built")
    return versions


def _devices() -> list[str]:
    cpu = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    if not torch.cuda.is_available():
        return [cpu]
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [cpu, *(f"cuda:{i} {p.name} (sm_{p.major}{p.minor})" for i, p in enumerate(names))]


def _settings() -> dict[str, str]:
    return {
        "oneDNN": "on" if torch._C._get_mkldnn_enabled() and torch._C._has_mkldnn else "off",
        "bf16 on this CPU": "fast" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated",
        "TF32 convolutions": "allowed" if calls.tf32_allowed() else "not allowed",
        VARIABLE: os.environ.get(VARIABLE) or "not set (auto)",
        "backend chosen": chosen(),
    }


def _first_compile() -> FirstCompile:
    """For this machine's GPU, or for Hopper where there is none that Triton's kernels run on."""
    gpus = range(torch.cuda.device_count()) if backends()["triton"].usable else ()
    capability = max(map(torch.cuda.get_device_capability, gpus), default=(9, 0))
    architecture = "sm_{}{}".format(*capability)
    reason = compilation.refusal()
    if reason is not None:
        return FirstCompile(architecture, None, "", reason)
    try:
        seconds = compilation.first_compile_seconds(capability)
    except Exception as error:  # the compiler and the tools that it calls fail in many ways
        return FirstCompile(architecture, None, "", f"failed for {architecture}: {type(error).__name__}: {error}")
    return FirstCompile(architecture, seconds, compilation.cache_folder(), "")


def _check(name: str) -> BackendReport:
    status = backends()[name]
    if not status.usable:
        return BackendReport(name, False, status.reason, None, None)
    generator = torch.Generator().manual_seed(0)
    device = "cpu" if name == "aten" else "cuda"
    x, weight = torch.randn(2, 24, 33, 33, generator=generator), torch.randn(16, 24, 3, 3, generator=generator)
    mean, beta = torch.randn(2, 16, generator=generator)
    var, gamma = torch.rand(2, 16, generator=generator) + 0.5
    expected, _ = reference.forward(
        *(t.double() for t in (x, weight, torch.zeros(16), mean, var, gamma, beta)), padding=1
    )
    with use_backend(name, strict=True), torch.no_grad():
        operands = (t.to(device) for t in (mean, var, gamma, beta))
        y = conv_bn_act(x.to(device), weight.to(device), None, *operands, padding=1).cpu()
    error = ((y - expected).abs().max() / expected.abs().max()).item()
    # TF32 keeps ten bits of each factor.
    tolerance = 5e-3 if device == "cuda" and calls.tf32_allowed() else 1e-5
    return BackendReport(name, True, "", error, error < tolerance)
