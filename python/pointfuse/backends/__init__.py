"""The backends by name: which are usable here, which one serves a device, and how a user chooses.

A backend is a module with ``conv_bn_act`` and ``unusable_reason``. No backend imports another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from pointfuse.backends import aten

BACKENDS: dict[str, ModuleType] = {"aten": aten}
NAMES = ("auto", "cuda", "triton", "aten")
VARIABLE = "POINTFUSE_BACKEND"

# A plain global, as torch.backends' flags are: torch.compile guards on it, where it cannot read a ContextVar.
_requested = os.environ.get(VARIABLE) or "auto"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine; ``reason`` says why not, and is empty where it can."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, usable or not, with the reason."""
    return {name: _status(name) for name in NAMES if name != "auto"}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the units of this block on one backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"aten"``.

    The choice is the process's, like the flags of ``torch.backends``; the environment variable ``POINTFUSE_BACKEND``
    makes it for a whole run. Raises ``ValueError`` for an unknown name and ``RuntimeError`` for a backend that cannot
    run here.
    """
    global _requested
    _check(name, f"use_backend({name!r})")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def select() -> ModuleType:
    """The backend that serves the next unit: the one asked for, else the best usable one."""
    if _requested not in ("auto", "aten"):
        _check(_requested, f"{VARIABLE}={_requested}")
    return aten


def fallback_reason(device_type: str) -> str | None:
    """Why units on a device run on ATen though kernels of our own were to be expected, or ``None``."""
    if device_type != "cuda" or _requested != "auto":
        return None
    found = {name: _status(name) for name in ("cuda", "triton")}
    if any(status.usable for status in found.values()):
        return None
    return "; ".join(f"{name}: {status.reason}" for name, status in found.items())


def _status(name: str) -> BackendStatus:
    module = BACKENDS.get(name)
    reason = "this version of pointfuse has no such kernels yet" if module is None else module.unusable_reason()
    return BackendStatus(usable=not reason, reason=reason or "")


def _check(name: str, said: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{said}: no such backend; the names are {', '.join(NAMES)}")
    if name != "auto" and not (status := _status(name)).usable:
        raise RuntimeError(f"{said}: the {name} backend cannot run here: {status.reason}; 'auto' takes the best usable")
