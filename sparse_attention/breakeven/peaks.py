"""What a machine can do at the very most: bounds that no kernel exceeds, so that a time below them is no time of the work."""

from __future__ import annotations

import glob
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .machine import architecture, cores, cpu_flags

_FASTEST_HZ = 6.2e9  # of any processor sold, at its boost
_CORE_BYTES_PER_S = 100e9  # from memory to one core: more than any core's outstanding misses allow
_NARROW_UNITS = {"zen4": 32}  # fp32 FLOPs a cycle where registers are wider than the units
_FASTER_TYPES = [  # processor flag, bytes of the type, FLOPs over those of fp32 vectors
    ("avx512_bf16", 2, 2),
    ("avx512_fp16", 2, 2),
    ("amx_bf16", 2, 16),
    ("amx_int8", 1, 32),
]
# compute capability -> FLOPs a cycle and multiprocessor, dense fp16 on tensor cores, from NVIDIA's architecture white papers
_TENSOR_FLOPS = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
_GPU_HZ = 3.2e9  # above any boost clock, where the driver does not tell


@dataclass(frozen=True)
class Peak:
    """FLOP/s by the bytes of a type (the narrower the faster), and bytes/s past what caches may hold; None where unknown."""

    flops_per_s: Mapping[int, float]
    bytes_per_s: float | None
    cached_bytes: float
    source: str

    def reached(self, flops_per_s: Mapping[int, float]) -> Peak:
        """Not below what was reached in a measurement."""
        sizes = {**self.flops_per_s, **flops_per_s}
        return replace(self, flops_per_s={n: max(self.flops_per_s.get(n, 0.0), flops_per_s.get(n, 0.0)) for n in sizes})

    def flops_of(self, itemsize: int) -> float | None:
        """The rate for elements of so many bytes, or the next wider type's whose rate is known."""
        wider = [n for n in self.flops_per_s if n >= itemsize]
        return self.flops_per_s[min(wider)] if wider else max(self.flops_per_s.values(), default=None)

    def least_s(self, work: Mapping[str, float], itemsize: int) -> tuple[float, str]:
        """The shortest time in which `work` can be done, and what bounds it."""
        bounds = [(0.0, "")]
        rate = self.flops_of(itemsize)
        if rate and work.get("flops"):
            bounds.append((work["flops"] / rate, f"{work['flops']:.3g} FLOPs at no more than {rate / 1e12:.3g} TFLOP/s"))
        if self.bytes_per_s and work.get("bytes"):
            moved = max(work["bytes"] - self.cached_bytes, 0.0)
            said = f"{work['bytes']:.3g} bytes, {self.cached_bytes:.3g} of them in caches, at no more than"
            bounds.append((moved / self.bytes_per_s, f"{said} {self.bytes_per_s / 1e9:.4g} GB/s"))
        return max(bounds)


def cpu_peak() -> Peak | None:
    """Of the cores that this process may use: units times clock. None for processors of which too little is known."""
    flags = cpu_flags()
    per_cycle = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16 if "avx" in flags else 8 if "sse2" in flags else 0
    if not flags and platform.machine() == "aarch64":
        per_cycle = 64
    if not per_cycle:
        return None
    per_cycle = _NARROW_UNITS.get(architecture(), per_cycle)
    hertz = _fastest_hertz()
    rate = cores() * per_cycle * hertz
    sizes = {8: rate / 2, 4: rate}
    for flag, itemsize, factor in _FASTER_TYPES:
        if flag in flags:
            sizes[itemsize] = max(sizes.get(itemsize, 0.0), factor * rate)
    cached = _cache_bytes()
    source = f"{cores()} core{'s' * (cores() > 1)} x {per_cycle} FLOPs a cycle x {hertz / 1e9:.2f} GHz"
    return Peak(sizes, cores() * _CORE_BYTES_PER_S if cached else None, cached, source)


def gpu_peak(properties: Any, nvml: Any = None) -> Peak:
    """From a device's properties as torch gives them, and the limits of its clocks where the driver tells them."""
    capability = (properties.major, properties.minor)
    per_cycle = _TENSOR_FLOPS.get(capability) or _TENSOR_FLOPS.get((capability[0], 0)) or 4 * max(_TENSOR_FLOPS.values())
    hertz = (nvml and nvml.fastest_hertz) or 1e3 * getattr(properties, "clock_rate", 0) or _GPU_HZ
    half = properties.multi_processor_count * per_cycle * hertz
    tensor32 = half / 2 if capability >= (8, 0) else 128 / per_cycle * half
    sizes = {1: 4 * half, 2: half, 4: tensor32, 8: tensor32}
    bytes_per_s = (nvml and nvml.bytes_per_s) or _memory_rate(properties)
    source = f"{properties.multi_processor_count} multiprocessors x {per_cycle} FLOPs a cycle x {hertz / 1e9:.2f} GHz"
    return Peak(sizes, bytes_per_s, float(properties.L2_cache_size), source)


def _memory_rate(properties: Any) -> float | None:
    hertz, bits = 1e3 * getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 2 * hertz * bits / 8 or None


def _fastest_hertz() -> float:
    found = _numbers(glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq"))
    return max(found, default=_FASTEST_HZ / 1e3) * 1e3


def _cache_bytes() -> float:
    """Of all caches beyond the first level that this process's cores reach; 0 where it cannot be told."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    found = {}
    for core in mine:
        for index in glob.glob(f"/sys/devices/system/cpu/cpu{core}/cache/index[2-9]"):
            shared, size = _text(f"{index}/shared_cpu_list"), _text(f"{index}/size")
            if size.endswith("K"):
                found[_text(f"{index}/level"), shared] = 1024.0 * float(size[:-1])
    return sum(found.values())


def _numbers(paths: Iterable[str]) -> list[float]:
    return [float(text) for text in map(_text, paths) if text.isdigit()]


def _text(path: str) -> str:
    try:
        with open(path) as f:
            return f.read().strip()
    except OSError:
        return ""
