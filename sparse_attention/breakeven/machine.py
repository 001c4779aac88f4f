"""Where a number comes from: machine class, versions, commit; and the evidence of noise around it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .case import Unavailable
from .nvml import driver

try:
    import resource
except ImportError:  # Windows
    resource = None

# (vendor, family, first model, last model) -> microarchitecture, from the vendors' processor tables
_MICROARCHITECTURES = [
    ("AuthenticAMD", 23, 0x00, 0x2F, "zen"),
    ("AuthenticAMD", 23, 0x30, 0xFF, "zen2"),
    ("AuthenticAMD", 25, 0x10, 0x1F, "zen4"),
    ("AuthenticAMD", 25, 0x60, 0xAF, "zen4"),
    ("AuthenticAMD", 25, 0x00, 0x5F, "zen3"),
    ("AuthenticAMD", 26, 0x00, 0xFF, "zen5"),
    ("GenuineIntel", 6, 0x3C, 0x3F, "haswell"),
    ("GenuineIntel", 6, 0x4F, 0x4F, "broadwell"),
    ("GenuineIntel", 6, 0x55, 0x55, "skylake-server"),
    ("GenuineIntel", 6, 0x6A, 0x6C, "icelake-server"),
    ("GenuineIntel", 6, 0x8F, 0x8F, "sapphirerapids"),
    ("GenuineIntel", 6, 0xCF, 0xCF, "emeraldrapids"),
    ("GenuineIntel", 6, 0xAD, 0xAE, "graniterapids"),
]


_PACKAGES = ("sparse-attention", "torch", "numpy", "pytest-benchmark")
_GPU_PACKAGES = ("triton", "flash-attn")

# Untracked, a kernel may be in these; what runs leave behind is not code.
_CODE = (".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".jl", ".so")


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads(device: str = "cpu") -> int:
    """One on a CPU, where neighbours disturb a ratio on one core least; beside a GPU all that there are."""
    return cores() if device.startswith("cuda") else 1


def pinned(threads: int) -> list[int]:
    """The cores to which a worker of `threads` threads is pinned: the last ones, since interrupts favour the first."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[-threads:]


def machine_class(device: str = "cpu") -> str:
    """A name shared by machines whose ratios may be compared, such as `cpu/zen4/2c` or `cuda/h100`. Raises Unavailable without the device."""
    if device.startswith("cuda"):
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"device {device!r} needs torch, which is not installed") from error
        if not torch.cuda.is_available():
            raise Unavailable(f"device {device!r} is not here: torch {torch.__version__} finds no CUDA device")
        words = torch.cuda.get_device_name().lower().replace("nvidia", "").replace("geforce", "").split()
        return f"cuda/{words[0]}"
    return f"cpu/{architecture()}/{cores()}c"


def _gpu() -> dict[str, Any]:
    """torch's current device, its driver and the libraries that torch brings for it."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cudnn = torch.backends.cudnn.version()
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn and f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
    }


def architecture() -> str:
    """The processor's microarchitecture, such as "zen4"."""
    return _microarchitecture(_cpuinfo())


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor, as Linux names those of x86; empty elsewhere."""
    return frozenset(_cpuinfo().get("flags", "").split())


def describe(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs beside a number. Imports nothing heavy.

    `commit` is of the repository around the working folder, whose kernels these are; `changes` identifies what differs from it, of
    untracked files only code. `harness` is what measured them.
    """
    info = _cpuinfo()
    commit, committed, changes = _commit(os.getcwd())
    return {
        "class": machine_class(device),
        "gpu": _gpu() if device.startswith("cuda") else None,
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES + _GPU_PACKAGES * device.startswith("cuda")},
        "commit": commit,
        "committed": committed,
        "dirty": changes is not None,
        "changes": changes,
        "harness": {"version": _version("sparse-attention"), "commit": _commit(os.path.dirname(os.path.abspath(__file__)))[0]},
        "load": _load(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass(frozen=True)
class Usage:
    """Counters of this process and its machine; the difference of two is the evidence about what ran between."""

    wall_s: float
    cpu_s: float  # all threads
    involuntary: int  # context switches forced on this process's threads
    others_s: float = 0.0  # time that other processes and the kernel had on this process's cores
    steal_s: float = 0.0  # time that the hypervisor took from these cores

    @classmethod
    def now(cls) -> Usage:
        busy_s, steal_s = _core_seconds()
        involuntary = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0
        cpu_s = time.process_time()
        return cls(time.perf_counter(), cpu_s, involuntary, busy_s - cpu_s, steal_s)

    def since(self, start: Usage) -> Usage:
        return Usage(
            self.wall_s - start.wall_s,
            self.cpu_s - start.cpu_s,
            self.involuntary - start.involuntary,
            self.others_s - start.others_s,
            self.steal_s - start.steal_s,
        )

    @property
    def contended(self) -> bool:
        """Whether others took the processor. On an idle machine two OpenMP threads on two cores see 15 to 75 switches a
        second, with one busy neighbour 165 and more; one thread sees few either way, but then stands still for a slice.
        Time of others is counted in ticks of 10 ms, so it tells only about halves that are longer.
        """
        preempted = self.involuntary > 2 + 120 * self.wall_s
        stood_still = self.involuntary >= 1 and self.cpu_s < 0.85 * self.wall_s
        crowded = max(self.others_s, 0.0) + self.steal_s > 0.02 + 0.1 * self.wall_s
        return preempted or stood_still or crowded


def _microarchitecture(info: dict[str, str]) -> str:
    vendor = info.get("vendor_id", "")
    try:
        family, model = int(info["cpu family"]), int(info["model"])
    except (KeyError, ValueError):
        return platform.machine().lower() or "unknown"
    for known_vendor, known_family, first, last, name in _MICROARCHITECTURES:
        if vendor == known_vendor and family == known_family and first <= model <= last:
            return name
    return f"{vendor.lower()}-{family}-{model}"


def _cpuinfo() -> dict[str, str]:
    try:
        with open("/proc/cpuinfo") as f:
            first = f.read().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _core_seconds() -> tuple[float, float]:
    """Seconds that the cores this process may use were busy, and those stolen from them, since the machine started."""
    try:
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        with open("/proc/stat") as f:
            lines = [line.split() for line in f if line.startswith("cpu")]
        ticks = [list(map(int, words[1:9])) for words in lines if words[0] in mine]
    except (OSError, AttributeError, ValueError):
        return 0.0, 0.0
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq, steal
    return tick_s * sum(sum(t[:3]) + t[5] + t[6] for t in ticks), tick_s * sum(t[7] for t in ticks)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: str) -> tuple[str | None, str | None, str | None]:
    """Commit of the git repository around `folder`, its date, and a digest of what differs from it (None where nothing does);
    none of them outside a repository.
    """

    def git(*arguments):
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, timeout=10)

    digest = hashlib.sha256()

    try:
        head = git("log", "-1", "--format=%H %cI")
        if head.returncode:
            return None, None, None
        changes = git("diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD").stdout
        top = git("rev-parse", "--show-toplevel").stdout.decode().strip()
        listed = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", top).stdout.decode(errors="surrogateescape")
    except (OSError, subprocess.TimeoutExpired):
        return None, None, None
    commit, committed = head.stdout.decode().split()
    untracked = [name for name in listed.split("\0") if name.endswith(_CODE)]
    digest.update(changes)
    for name in untracked:
        try:
            digest.update(os.fsencode(name) + b"\0" + Path(top, name).read_bytes() + b"\0")
        except OSError:
            continue  # gone meanwhile, or not to be read
    return commit, committed, digest.hexdigest()[:16] if changes or untracked else None
