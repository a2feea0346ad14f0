"""The backends by name: which are usable here, which one serves a call, and how a user chooses.

A backend is a module with ``conv_bn_act``, ``min_input`` and ``unusable_reason``. One other than ATen raises
``Refused`` for calls that it does not serve, and ATen serves those. No backend imports another; what those with kernels
of their own share stands in ``calls.py``.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse.backends import aten, aten_training, cuda, triton
from pointfuse.problem import Refused

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "aten": aten}
# With kernels of their own for units with gradients; imported when first asked for.
_TRAINING = {"cuda": "pointfuse.backends.cuda_training", "triton": "pointfuse.backends.triton.training"}
NAMES = ("auto", "cuda", "triton", "aten")
VARIABLE = "POINTFUSE_BACKEND"
STRICT_VARIABLE = "POINTFUSE_STRICT"


def _as_flag(variable: str) -> bool:
    value = os.environ.get(variable) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{variable}={value}: it must be 0 or 1, or not be set")
    return value == "1"


# Plain globals, as torch.backends' flags are: torch.compile guards on them, where it cannot read a ContextVar.
_requested = os.environ.get(VARIABLE) or "auto"
_strict = _as_flag(STRICT_VARIABLE)
# Those of the blocks of use_backend that have not ended, in the order of their beginning, behind the run's own.
_choices: list[tuple[str, bool]] = []
_preferred: dict[str, Preferred] = {}
_announced: set[tuple[str, str]] = set()


class FallbackWarning(UserWarning):
    """A backend that was asked for by name does not serve a call; PyTorch's own operators served it."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine; ``reason`` says why not, and is empty where it can."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, usable or not, with the reason."""
    return {name: _status(name) for name in NAMES if name != "auto"}


@contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """Run the units of this block on one backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"aten"``.

    ``"auto"``, the default, is ATen, but for eager calls on a GPU for which the triton backend measured faster: see the
    command ``pointfuse tune``.

    PyTorch's own operators serve the calls that the backend does not, such as grouped convolutions; that is said once
    a reason, as a :class:`FallbackWarning`, and raises ``RuntimeError`` instead with ``strict``.

    The choice is the process's, like the flags of ``torch.backends``; the environment variables ``POINTFUSE_BACKEND``
    and ``POINTFUSE_STRICT=1`` make it for a whole run. Raises ``ValueError`` for an unknown name and ``RuntimeError``
    for a backend that cannot run here.
    """
    global _requested, _strict
    _check(name, f"use_backend({name!r})")
    if name not in ("auto", "aten"):
        _prefer(name)  # a graph that found it missing would be compiled again
    if not _choices:
        _choices.append((_requested, _strict))
    _requested, _strict = choice = name, strict
    _choices.append(choice)
    try:
        yield
    finally:
        # Blocks of several threads may end in another order than that of their beginning.
        del _choices[len(_choices) - 1 - _choices[::-1].index(choice)]
        _requested, _strict = _choices[-1]
        if len(_choices) == 1:
            _choices.clear()


class Preferred:
    """A backend that is asked first, with ATen behind it; ``options`` go with each call."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.module = BACKENDS[name]
        self.min_input = self.module.min_input
        self._options = options

    def conv_bn_act(self, *unit: Any) -> Tensor:
        """The unit, as ``aten.conv_bn_act`` takes and answers it."""
        try:
            return self.module.conv_bn_act(*unit, **self._options)
        except Refused as refused:
            reason = str(refused)
        if _strict:
            self.announce(reason)
        # A wrong call gets PyTorch's own error before anything is said.
        y = aten.conv_bn_act(*unit)
        self.announce(reason)
        return y

    def frozen_conv_act(self, *unit: Any, channels_last: bool) -> Tensor | None:
        """A frozen unit, whose weight never changes and whose bias may be fp32; ``None`` where ATen has to serve it."""
        try:
            return self.module.conv_bn_act(*unit, frozen=True, channels_last=channels_last, **self._options)
        except Refused as refused:
            self.announce(str(refused))
            return None

    def announce(self, reason: str) -> None:
        """Say that ATen serves a call, or a part of one, that this backend does not."""
        # "auto" takes whatever is best, and that is not worth a word.
        if _requested == "auto":
            return
        if _strict:
            raise RuntimeError(f"the {self.name} backend does not serve this call: {reason}")
        _warn_once(self.name, reason)


def _warn_once(name: str, reason: str) -> None:
    if (name, reason) not in _announced:
        _announced.add((name, reason))
        warnings.warn(
            f"pointfuse: PyTorch's own operators serve calls that the {name} backend does not: {reason}",
            FallbackWarning,
            stacklevel=4,
        )


# A compiler runs this while it traces, where a warning breaks no graph.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select() -> ModuleType | Preferred:
    """What serves the next unit: the ATen backend, or another with ATen behind it.

    That is the triton backend with "auto", for calls of a shape class that measured faster than ATen, once there are
    any: see ``pointfuse tune``.
    """
    if _requested == "aten":
        return aten
    if _requested == "auto":
        # Nothing was measured against what a compiler makes of PyTorch's operators.
        if not triton.tables.some_faster() or torch.compiler.is_compiling():
            return aten
        return _prefer("auto")
    _admit(_requested)
    return _preferred[_requested]


def training_steps() -> ModuleType:
    """What takes the steps of the next unit with gradients: a module with the functions of ``aten_training``.

    "auto" leaves them to ATen: the kernels have not been measured in training.
    """
    if _requested in ("auto", "aten"):
        return aten_training
    _admit(_requested)
    return importlib.import_module(_TRAINING[_requested])


def announce_refusal(reason: str) -> None:
    """Say, once a reason, that ATen takes a step which the backend that was asked for refuses.

    Raises ``RuntimeError`` instead with ``strict``. Says nothing where no backend was asked for by name.
    """
    if _requested not in ("auto", "aten"):
        _admit(_requested)
        _preferred[_requested].announce(reason)


def chosen() -> str:
    """The name of what :func:`select` gives."""
    backend = select()
    # "auto" asks on a GPU alone whether its backend can run.
    return backend.name if isinstance(backend, Preferred) and _status(backend.name).usable else "aten"


def backend_for(conv: nn.Conv2d) -> str:
    """The name of the backend that would serve a convolution's unit now, as far as the module tells."""
    backend = select()
    if not isinstance(backend, Preferred):
        return "aten"
    refusal = triton.not_faster(conv) if _requested == "auto" else backend.module.conv_refusal(conv)
    return backend.name if refusal is None else "aten"


def fallback_reason(device_type: str) -> str | None:
    """Why units on a device run on ATen though kernels of our own were to be expected, or ``None``."""
    if device_type != "cuda" or _requested != "auto":
        return None
    found = {name: _status(name) for name in ("triton", "cuda")}
    if found["triton"].usable:
        if triton.tables.some_measured():
            return None
        return "the triton backend was not measured on this machine yet: `pointfuse tune` does"
    if found["cuda"].usable:
        return "the cuda backend has not been measured on a GPU yet; pointfuse.use_backend('cuda') asks for it"
    return "; ".join(f"{name}: {status.reason}" for name, status in found.items())


def _admit(name: str) -> None:
    """Have a backend that was asked for by name among the preferred. Raises as :func:`use_backend`."""
    if name not in _preferred:
        _check(name, f"{VARIABLE}={name}")
        _prefer(name)


# A compiler runs this as it is where it comes before any call: it imports Triton, and looks for GPUs.
_admit._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _prefer(name: str) -> Preferred:
    if name not in _preferred:
        _preferred[name] = Preferred("triton", only_faster=True) if name == "auto" else Preferred(name)
    return _preferred[name]


def _status(name: str) -> BackendStatus:
    reason = BACKENDS[name].unusable_reason()
    return BackendStatus(usable=not reason, reason=reason or "")


def _check(name: str, said: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{said}: no such backend; the names are {', '.join(NAMES)}")
    if name != "auto" and not (status := _status(name)).usable:
        raise RuntimeError(f"{said}: the {name} backend cannot run here: {status.reason}; 'auto' takes the best usable")
