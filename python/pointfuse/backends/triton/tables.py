"""The configurations that ``pointfuse tune`` measured on this machine: a file of JSON for each kind of GPU.

The files lie in ``$POINTFUSE_CACHE_DIR``, else ``$XDG_CACHE_HOME/pointfuse``, else ``~/.cache/pointfuse``. Reading
raises nothing: a file that is not right is as good as none, which is said once. Writing keeps the entries that are
there, also those that another process writes meanwhile.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pointfuse._version import __version__
from pointfuse.backends import calls
from pointfuse.backends.triton.configs import FAMILIES, Entry, ShapeClass, Table, shipped
from pointfuse.backends.triton.planning import shape_class
from pointfuse.problem import Geometry, Refused

FORMAT = 1
FOLDER_VARIABLE = "POINTFUSE_CACHE_DIR"

_some_faster: bool | None = None


class Unwritable(RuntimeError):
    """A table cannot be written where it belongs; the message says what to do."""


def folder() -> Path:
    """Where the files lie."""
    own, caches = os.environ.get(FOLDER_VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own)
    # A relative path is to be ignored: https://specifications.freedesktop.org/basedir-spec/latest.
    return Path(caches if os.path.isabs(caches) else os.path.expanduser("~/.cache"), "pointfuse")


def device_name(device: torch.device) -> str:
    """The kind of GPU, as PyTorch names it; ``"cpu"`` for the interpreter's table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def path_of(device: torch.device) -> Path:
    """The file of a device."""
    return folder() / (re.sub(r"[^A-Za-z0-9._-]+", "-", device_name(device)) + ".json")


@functools.cache
def measured(device: torch.device) -> Table:
    """What was measured on a device; empty where nothing was. The file is read once."""
    return _read(path_of(device))


def measured_faster(x: torch.Tensor, weight: torch.Tensor, config: int) -> bool:
    """Whether a call's shape class measured faster than PyTorch's own operators, here or for the shipped table."""
    if x.dim() != 4 or weight.dim() != 4:
        return False
    channels_last = x.stride(1) == 1 or x.shape[1] == 1
    return _measured_faster(x.device, x.dtype, x.shape, weight.shape, channels_last, config)


@functools.cache
def faster(device: torch.device) -> frozenset[ShapeClass]:
    """The classes that measured faster than PyTorch's own operators, with a configuration that the device can run.

    A class that was measured here goes by that, and not by the shipped table. Needs Triton.
    """
    from pointfuse.backends.triton.launching import chip_of  # which imports this module

    try:
        chip = chip_of(device)
    except Refused:
        return frozenset()
    entries = {**shipped(chip.family), **measured(device)}
    return frozenset(s for s, e in entries.items() if e.faster_than_aten and e.config.refusal(s, chip) is None)


def some_faster() -> bool:
    """Whether anything measured faster than PyTorch's own operators, on whichever GPU. Needs neither GPU nor Triton.

    A compiled graph keeps the answer of when it was traced.
    """
    global _some_faster
    if _some_faster is None:
        _some_faster = any(entry.faster_than_aten for table in _tables() for entry in table.values())
    return _some_faster


# As torch.compiler.assume_constant_result does, which would import the compiler with the package.
some_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def some_measured() -> bool:
    """Whether anything was measured at all, on whichever GPU."""
    return any(entry.aten_us is not None for table in _tables() for entry in table.values())


def add(device: torch.device, entries: Table) -> None:
    """Put entries into a device's file, in the place of those of the same classes; others stay as they are.

    A file that is not right is kept aside, under its name with ``.corrupt``. Raises :class:`Unwritable`.
    """
    path = path_of(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            known = {**_known(path), **entries}
            _replace(path, json.dumps(_contents(device, known), indent=1) + "\n")
    except OSError as error:
        raise Unwritable(
            f"what is measured cannot be kept in {path} ({type(error).__name__}: {error.strerror}): set "
            f"{FOLDER_VARIABLE} to a folder that can be written"
        ) from error
    forget()


def forget() -> None:
    """Read the files anew when they are next asked for."""
    global _some_faster
    _some_faster = None
    for cached in (measured, faster, _read, _measured_faster):
        cached.cache_clear()


@functools.lru_cache(maxsize=4096)
def _measured_faster(
    device: torch.device, dtype: torch.dtype, x: torch.Size, weight: torch.Size, channels_last: bool, config: int
) -> bool:
    height, width = Geometry(*calls.stride_and_padding(config)).output_plane(x, weight)
    if height < 1 or width < 1:
        return False
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x_like, weight_like, y_like = (
        torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
        for shape in (x, weight, (x[0], weight[0], height, width))
    )
    return shape_class(x_like, weight_like, config, y_like) in faster(device)


def _tables() -> Iterator[Table]:
    for family in FAMILIES:
        yield shipped(family)
    with suppress(OSError):
        for path in sorted(folder().glob("*.json")):
            yield _read(path)


@functools.cache
def _read(path: Path) -> Table:
    try:
        table, wrong = _parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        table, wrong = {}, [str(error)]
    if wrong:
        part = " in part" if table else ""
        warnings.warn(
            f"pointfuse: {path} cannot be used{part} ({wrong[0]}): `pointfuse tune` makes it anew",
            UserWarning,
            stacklevel=2,
        )
    return table


def _known(path: Path) -> Table:
    """What a file holds, for it to be written again; a file that is not right is out of the way then."""
    try:
        return _parse(path.read_text(encoding="utf-8"))[0]
    except FileNotFoundError:
        return {}
    except ValueError:
        os.replace(path, f"{path}.corrupt")
        return {}


def _parse(text: str) -> tuple[dict[ShapeClass, Entry], list[str]]:
    """The entries of a file's text, and what is wrong with others. Raises ``ValueError`` if nothing of it is right."""
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), dict):
        raise ValueError(f"it is no table of format {FORMAT}")
    table, wrong = {}, []
    for name, row in data["entries"].items():
        try:
            table[ShapeClass.parse(name)] = Entry.from_dict(row)
        except (ValueError, OverflowError) as error:
            wrong.append(str(error))
    return table, wrong


def _contents(device: torch.device, table: Table) -> Mapping[str, Any]:
    versions = {"pointfuse": __version__, "triton": metadata.version("triton"), "torch": torch.__version__}
    entries = {str(shape): table[shape].to_dict() for shape in sorted(table, key=str)}
    return {"format": FORMAT, "device": device_name(device), "versions": versions, "entries": entries}


def _replace(path: Path, text: str) -> None:
    """Write a file so that whoever reads it finds the old text or the new. Under the file's lock."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process and one thread at a time."""
    import fcntl  # absent on Windows, where there is nothing to tune

    with open(f"{path}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
