"""YOLOv3: the Darknet-53 backbone, the three heads, and seeded or loaded weights for them.

Architecture: Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, https://arxiv.org/abs/1804.02767.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1
ANCHORS_PER_HEAD = 3
BLOCKS_PER_LAYER = (1, 2, 8, 8, 4)


@dataclass(frozen=True)
class Head:
    """One head's last-layer stack at a 416x416 image.

    Attributes:
        plane: height and width of its feature map, in pixels.
        c_in: channels the stack takes.
        f0: output channels of its 1x1 units.
        f1: output channels of its 3x3 units.
    """

    plane: int
    c_in: int
    f0: int
    f1: int


HEADS: dict[int, Head] = {
    13: Head(plane=13, c_in=1024, f0=512, f1=1024),
    26: Head(plane=26, c_in=768, f0=256, f1=512),
    52: Head(plane=52, c_in=384, f0=128, f1=256),
}


class YOLOv3(nn.Module):
    """The whole detector, from an image to the three raw head maps.

    Every unit is a `Sequential` of `conv`, `bn` and `relu`, and the branch to the next head leaves a stack after its
    fifth unit through a slice, so that the `state_dict` keys are those of published checkpoints.
    """

    def __init__(self, num_classes: int = 80) -> None:
        super().__init__()
        c_head = head_channels(num_classes)
        self.backbone = Darknet53()
        self.last_layer0 = _stack(HEADS[13], c_head)
        self.last_layer1_conv = _unit(HEADS[13].f0, HEADS[26].f0, kernel_size=1)
        self.last_layer1_upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.last_layer1 = _stack(HEADS[26], c_head)
        self.last_layer2_conv = _unit(HEADS[26].f0, HEADS[52].f0, kernel_size=1)
        self.last_layer2_upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.last_layer2 = _stack(HEADS[52], c_head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network.

        Args:
            x: images, [batch, 3, height, width] in [0, 1]; height and width are multiples of 32.

        Returns:
            Raw maps [batch, 3 * (classes + 5), height / s, width / s] for s = 32, 16, 8: planes of 13, 26 and 52
            for an image of 416.
        """
        fine, middle, coarse = self.backbone(x)

        branch = self.last_layer0[:5](coarse)
        out0 = self.last_layer0[5:](branch)

        upsampled = self.last_layer1_upsample(self.last_layer1_conv(branch))
        branch = self.last_layer1[:5](torch.cat([upsampled, middle], 1))
        out1 = self.last_layer1[5:](branch)

        upsampled = self.last_layer2_upsample(self.last_layer2_conv(branch))
        out2 = self.last_layer2(torch.cat([upsampled, fine], 1))
        return out0, out1, out2


class Darknet53(nn.Module):
    """The backbone; returns the features at 1/8, 1/16 and 1/32 of the image, with 256, 512 and 1024 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.LeakyReLU(SLOPE)
        self.layer1 = _layer(32, 64, BLOCKS_PER_LAYER[0])
        self.layer2 = _layer(64, 128, BLOCKS_PER_LAYER[1])
        self.layer3 = _layer(128, 256, BLOCKS_PER_LAYER[2])
        self.layer4 = _layer(256, 512, BLOCKS_PER_LAYER[3])
        self.layer5 = _layer(512, 1024, BLOCKS_PER_LAYER[4])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.relu1(self.bn1(self.conv1(x)))
        fine = self.layer3(self.layer2(self.layer1(x)))
        middle = self.layer4(fine)
        return fine, middle, self.layer5(middle)


class ResidualBlock(nn.Module):
    """Darknet's block: a 1x1 and a 3x3 unit, with the input added after the second activation."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, narrow, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu1 = nn.LeakyReLU(SLOPE)
        self.conv2 = nn.Conv2d(narrow, wide, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.relu2 = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out += residual
        return out


def yolov3(num_classes: int = 80, weights: str | os.PathLike[str] | None = None, seed: int = 0) -> YOLOv3:
    """Build YOLOv3 in eval mode with usable weights. The global random state is left as it was.

    Args:
        num_classes: 80 for COCO, 20 for VOC.
        weights: a checkpoint for `load_weights`; without one the weights are drawn from `seed` and the batch norm
            statistics calibrated, so that activations have the scale they have in a trained network.
        seed: of weights and calibration image; unused with `weights`.

    Raises:
        OSError, ValueError: as `load_weights`.
    """
    # Built without storage: the constructors' own initialisation would draw from the global generator.
    with torch.device("meta"):
        model = YOLOv3(num_classes)
    model.to_empty(device="cpu").eval()
    if weights is not None:
        load_weights(model, weights)
        return model
    initialise(model, seed)
    calibrate(model, noise_image(size=256, batch=2, seed=seed))
    return model


def last_layer_stack(head: int, num_classes: int = 20, seed: int = 0) -> nn.Sequential:
    """Build one head's seven last layers in eval mode, seeded and calibrated on `stack_input(head, seed=seed)`.

    Args:
        head: the plane, 13, 26 or 52.
        num_classes: sets the output channels, 3 * (num_classes + 5).

    Returns:
        A module from [batch, c_in, head, head] to [batch, 3 * (num_classes + 5), head, head].

    Raises:
        ValueError: there is no such head.
    """
    with torch.device("meta"):
        stack = _stack(_head(head), head_channels(num_classes))
    stack.to_empty(device="cpu").eval()
    initialise(stack, seed)
    calibrate(stack, stack_input(head, seed=seed))
    return stack


def stack_input(head: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Features as a stack receives them, out of a LeakyReLU: [batch, c_in, head, head], float32, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, _head(head).c_in, head, head, generator=generator)
    return F.leaky_relu(features, SLOPE)


def noise_image(size: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Seeded images [batch, 3, size, size] in [0, 1], float32, with a photograph's share of coarse and fine detail.

    White noise would not do: it has almost nothing at the coarse scales a photograph is made of, and statistics
    calibrated on it would put a photograph's activations far off scale.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(batch, 3, size, size)
    side = 4
    while side <= size:
        octave = torch.randn(batch, 3, side, side, generator=generator)
        # Equal variance in each octave is the 1/f^2 power spectrum of natural images.
        image += F.interpolate(octave, size=(size, size), mode="bilinear")
        side *= 2
    return (0.5 + 0.2 * image / image.std()).clamp(0, 1)


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter of `model` from `seed`: He initialisation, batch norm scales about 1 and shifts about 0.

    Scales and shifts are not exactly 1 and 0, so that a kernel that drops one of them gives a wrong answer.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.uniform_(module.weight, 0.8, 1.2, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    for module in model.modules():
        _damp_residual_sums([child for child in module.children() if isinstance(child, ResidualBlock)])


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Set every batch norm's running statistics to those that its own input has when `model` runs on `x` in eval mode.

    One forward pass is enough: each layer is normalised with its new statistics before the next one sees it.
    """
    hooks = [
        module.register_forward_pre_hook(_set_statistics)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into `model`, strictly; on any error the model is as it was before.

    Args:
        path: a file of `torch.save` that `weights_only=True` can read, holding a state_dict, or a dict with one under
            "state_dict" or "model". A "module." prefix on every key, as left by DataParallel, is dropped.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a checkpoint, or keys or shapes are not the model's; the message says which.
    """
    state = _read_state_dict(path)
    problems = _mismatches(model.state_dict(), state)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{os.fspath(path)} does not fit {type(model).__name__}:\n  {lines}\n{_ACCEPTED}")
    model.load_state_dict(state, strict=True)


def head_channels(num_classes: int) -> int:
    """Output channels of a head: for each anchor four box numbers, one objectness, and the classes."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return ANCHORS_PER_HEAD * (num_classes + 5)


_ACCEPTED = (
    'Accepted: a file written by torch.save that holds a state_dict, or a dict with one under "state_dict" or "model".'
)


def _head(plane: int) -> Head:
    if plane not in HEADS:
        raise ValueError(f"no head has a {plane}x{plane} plane; the heads are {', '.join(map(str, HEADS))}")
    return HEADS[plane]


def _unit(c_in: int, c_out: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict([("conv", conv), ("bn", nn.BatchNorm2d(c_out)), ("relu", nn.LeakyReLU(SLOPE))]))


def _stack(head: Head, c_head: int) -> nn.Sequential:
    narrow = partial(_unit, c_out=head.f0, kernel_size=1)
    wide = partial(_unit, head.f0, head.f1, kernel_size=3)
    units = [narrow(head.c_in), wide(), narrow(head.f1), wide(), narrow(head.f1), wide()]
    return nn.Sequential(*units, nn.Conv2d(head.f1, c_head, kernel_size=1))


def _layer(c_in: int, c_out: int, blocks: int) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    modules["ds_conv"] = nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False)
    modules["ds_bn"] = nn.BatchNorm2d(c_out)
    modules["ds_relu"] = nn.LeakyReLU(SLOPE)
    for index in range(blocks):
        modules[f"residual_{index}"] = ResidualBlock(c_in, c_out)
    return nn.Sequential(modules)


@torch.no_grad()
def _damp_residual_sums(blocks: list[ResidualBlock]) -> None:
    """Scale what each of a layer's blocks adds, so that the sum over all of them stays on the scale of one."""
    for block in blocks:
        block.bn2.weight.mul_(len(blocks) ** -0.5)
        block.bn2.bias.mul_(len(blocks) ** -0.5)


def _set_statistics(bn: nn.Module, inputs: tuple[Tensor]) -> None:
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    # The variance is the biased one: then the calibrating input itself comes out with a variance of 1.
    var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(var)


def _read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    content = _unpickle(path)
    if isinstance(content, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise ValueError(f"{os.fspath(path)} holds a {type(content).__name__}, not a state_dict. {_ACCEPTED}")
    state = {str(key): value for key, value in content.items()}
    if not state:
        raise ValueError(f"{os.fspath(path)} holds an empty dict. {_ACCEPTED}")
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{os.fspath(path)} holds entries that are not tensors: {_first(other)}. {_ACCEPTED}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _unpickle(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Damaged and foreign files end in a dozen exception types, according to where the parser stumbles.
        raise ValueError(f"{os.fspath(path)} is not a checkpoint that can be loaded safely. {_ACCEPTED}") from error


def _mismatches(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key} {_shape(given[key])} where the model has {_shape(expected[key])}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    counted = [("missing keys", missing), ("unexpected keys", unexpected), ("shapes that differ", shapes)]
    return [f"{len(keys)} {what}: {_first(keys)}" for what, keys in counted if keys]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
