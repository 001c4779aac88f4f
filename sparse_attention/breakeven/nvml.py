"""What NVIDIA's management library says about a device: clocks, and why they are held back. By ctypes: nothing to install."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SM, _MEMORY = 1, 2  # nvmlClockType_t
_HARD = {  # bits of the clocks' event (throttle) reasons, from nvml.h
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
_POWER_CAP = 0x04


class Absent(Exception):
    """The library, or the device in it, is not there; why, in words."""


@dataclass(frozen=True)
class Reading:
    sm_mhz: int
    reasons: int  # bits

    @property
    def power_capped(self) -> bool:
        return bool(self.reasons & _POWER_CAP)

    @property
    def hard(self) -> str:
        """Reasons that invalidate whatever was timed meanwhile."""
        return ", ".join(name for bit, name in _HARD.items() if self.reasons & bit)


class Nvml:
    """One device, by its UUID as torch gives it ("GPU-" may be missing). Raises Absent."""

    def __init__(self, uuid: str, library: Any = None):
        self._library = library or _load()
        self._ask("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._ask("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self._device))

    def read(self) -> Reading:
        reasons = self._first_known("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return Reading(self._number("nvmlDeviceGetClockInfo", ctypes.c_uint, _SM), reasons)

    @property
    def fastest_hertz(self) -> float | None:
        """Of the multiprocessors; None where the driver does not tell."""
        try:
            return 1e6 * self._number("nvmlDeviceGetMaxClockInfo", ctypes.c_uint, _SM)
        except Absent:
            return None

    @property
    def bytes_per_s(self) -> float | None:
        """Of the device's memory, at two transfers a clock as the driver counts it; None where it does not tell."""
        try:
            bits = self._number("nvmlDeviceGetMemoryBusWidth", ctypes.c_uint)
            return 2e6 * self._number("nvmlDeviceGetMaxClockInfo", ctypes.c_uint, _MEMORY) * bits / 8
        except Absent:
            return None

    def state(self) -> dict[str, float]:
        """Degrees Celsius and watts, for the record."""
        found = {}
        for name, function, scale, *arguments in (
            ("celsius", "nvmlDeviceGetTemperature", 1.0, 0),
            ("watts", "nvmlDeviceGetPowerUsage", 1e-3),
            ("watts_limit", "nvmlDeviceGetEnforcedPowerLimit", 1e-3),
        ):
            try:
                found[name] = scale * self._number(function, ctypes.c_uint, *arguments)
            except Absent:
                continue
        return found

    def _first_known(self, *functions: str) -> int:
        for function in functions[:-1]:
            try:
                return self._number(function, ctypes.c_ulonglong)
            except Absent:
                continue
        return self._number(functions[-1], ctypes.c_ulonglong)

    def _number(self, function: str, kind: Callable[[], Any], *arguments: int) -> int:
        value = kind()
        self._ask(function, self._device, *arguments, ctypes.byref(value))
        return value.value

    def _ask(self, function: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError as error:
            raise Absent(f"NVML has no {function}") from error
        if code:
            raise Absent(f"NVML's {function} returned {code}")


def driver(library: Any = None) -> str | None:
    """The version of NVIDIA's driver; None where that cannot be told."""
    text = ctypes.create_string_buffer(96)
    try:
        library = library or _load()
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
            return None
    except (Absent, AttributeError):
        return None
    return text.value.decode()


def _load() -> ctypes.CDLL:
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Absent("libnvidia-ml.so.1 is not here")
