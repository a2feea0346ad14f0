"""The state of a device: clock, temperature and power, by which a figure of a hot or throttled device is known."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.record import Conditions


def conditions(device: torch.device) -> Conditions:
    """The state of a device now: of a GPU by nvidia-ml-py, of a CPU by psutil; None for what these do not tell."""
    if device.type == "cuda":
        return Conditions(
            clock_mhz=_told(lambda: torch.cuda.clock_rate(device)),
            temperature_c=_told(lambda: torch.cuda.temperature(device)),
            power_w=_told(lambda: torch.cuda.power_draw(device) / 1e3),
        )
    return Conditions(clock_mhz=_told(_cpu_clock), temperature_c=_told(_cpu_temperature))


def _told(read: Callable[[], float]) -> float | None:
    """A reading. Whatever fails in it, a missing package or sensor, is no reason to lose a run of measurements."""
    try:
        return round(float(read()), 1)
    except Exception:
        return None


def _cpu_clock() -> float:
    import psutil

    return psutil.cpu_freq().current


def _cpu_temperature() -> float:
    import psutil

    return max(sensor.current for sensors in psutil.sensors_temperatures().values() for sensor in sensors)
