"""compute-sanitizer over every CUDA kernel: python -m tests.sanitize [--tools memcheck ...] [--engines sm90 ...]

Runs each tool over each engine of tests/sanitize_cases.py in a process of its own, several at a time, prints a table of what was
reported, and exits with 1 where anything was, where a case failed, or where a planted fault went unseen. The kernels are built with
-lineinfo (SPARSE_ATTENTION_NVCC_FLAGS), so that reports name lines; it changes no instruction.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ENGINES = ("sm90", "sm80", "gather", "blocks", "blocks80", "decode", "decoders", "eagle")
# Each must be found: what finds nothing may have looked at nothing.
PLANTED = (("memcheck", "outside"), ("racecheck", "race"), ("synccheck", "divergent"), ("initcheck", "unwritten"))
OURS = "sparse_attention"  # the namespace of our kernels
ROOT = Path(__file__).resolve().parent.parent

# Words that one thread of the sm90 tier writes for the next tile, after it has waited for an mbarrier at which one thread of each
# warpgroup arrived. All threads that read the word before met at a named barrier in between, so the order is certain; racecheck
# credits the arrival to the arriving thread alone.
ORDERED = ("shared.item =", "shared.has_tiles =", "shared.mask[stage] =")
STORES_IN_BULK = ("sm90", "blocks")  # outputs leave by the tensor copy engine, which initcheck does not take for a write


@dataclass(frozen=True)
class Checked:
    """What a tool said of an engine. failed: why the run itself is worth nothing, or empty."""

    tool: str
    engine: str
    reports: list[str]
    ordered: int  # races between accesses that are in order all the same: ORDERED
    failed: str
    seconds: float

    @property
    def planted(self) -> bool:
        return (self.tool, self.engine) in PLANTED

    @property
    def good(self) -> bool:
        return bool(self.reports) if self.planted else not self.reports and not self.failed

    @property
    def cell(self) -> str:
        if self.planted:
            return "found" if self.reports else f"NOT FOUND {self.failed}".strip()
        ordered = f"(+{self.ordered})" if self.ordered else ""
        return " ".join(filter(None, [str(len(self.reports)), ordered, self.failed]))


def command(tool: str, engine: str, number: int) -> list[str]:
    """initcheck must see what PyTorch's kernels write, so it follows them too; the others follow ours alone."""
    options = ["--tool", tool, "--target-processes", "application-only", "--show-backtrace", "no", "--report-api-errors", "no"]
    options += ["--port", str(49152 + 16 * number), "--launch-timeout", "120", "--print-limit", "200"]
    if tool != "initcheck":
        options += ["--kernel-name", f"kns={OURS}"]
    elif engine in STORES_IN_BULK:
        options += ["--check-api-memory-access", "no"]
    return [compute_sanitizer(), *options, sys.executable, "-m", "tests.sanitize_cases", engine]


def compute_sanitizer() -> str:
    for folder in (None, f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"):
        if found := shutil.which("compute-sanitizer", path=folder):
            return found
    sys.exit("no compute-sanitizer on the PATH or in CUDA_HOME/bin: it is part of the CUDA toolkit")


def reports(output: str) -> list[str]:
    """What a tool reported of our kernels, or of no kernel at all: paragraphs of lines that begin with its mark."""
    lines = [line[9:].strip() for line in output.splitlines() if line.startswith("=========")]
    paragraphs = re.split(r"\n\n+", "\n".join(lines))
    found = []
    for text in paragraphs:
        said = [line for line in text.splitlines() if not re.match(r"COMPUTE-SANITIZER|\w+ SUMMARY|Target application|Error: process", line)]
        where = " ".join(line for line in said if re.search(r"^at |Race reported|^and .* access at ", line))
        if said and (OURS in where or not where):
            found.append("\n".join(said))
    return found


def in_order(report: str) -> bool:
    """Whether it is a race whose every write is one of ORDERED, by the lines that it names."""
    writes = re.findall(r"Write access at .*? in ([\w.]+):(\d+)", report)
    return bool(writes) and all(any(words in source_line(*place) for words in ORDERED) for place in writes)


def source_line(file: str, line: str) -> str:
    lines = [text for path in (ROOT / "csrc/cuda/sm90").rglob(file) for text in path.read_text().splitlines()[int(line) - 1 : int(line)]]
    return lines[0] if len(lines) == 1 else ""


def check(tool: str, engine: str, number: int, limit_s: float, logs: Path | None) -> Checked:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command(tool, engine, number), cwd=ROOT, env=environment, text=True, errors="replace", timeout=limit_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, failed = done.stdout, f"exit {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(errors="replace"), f"longer than {limit_s:.0f} s"
    if logs:
        (logs / f"sanitize-{tool}-{engine}.log").write_text(output)
    if failed:
        said = [line for line in output.splitlines() if line and not line.startswith("=========")]
        failed += f": {said[-1][:160]}" if said else ""
    found = reports(output)
    left = [report for report in found if not in_order(report)]
    return Checked(tool, engine, left, len(found) - len(left), failed, time.monotonic() - start)


def table(found: list[Checked]) -> str:
    engines = [engine for engine in dict.fromkeys(c.engine for c in found)]
    cells = {(c.tool, c.engine): c.cell for c in found}
    rows = [["", *engines]] + [[tool, *(cells.get((tool, e), "")[:12] for e in engines)] for tool in dict.fromkeys(c.tool for c in found)]
    return "\n".join("  ".join(f"{cell:<12}" for cell in row).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for each process")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="what each process said")
    options = parser.parse_args()
    os.environ.setdefault("SPARSE_ATTENTION_NVCC_FLAGS", "-lineinfo")
    os.environ["PYTHONPATH"] = str(ROOT)
    build = "import torch; from sparse_attention import _build_cuda as b; b.kernels(torch.cuda.get_device_capability())"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)  # not under a tool
    wanted = [(tool, engine) for tool in options.tools for engine in options.engines]
    wanted += [planted for planted in PLANTED if planted[0] in options.tools]
    wanted.sort(key=lambda job: TOOLS.index(job[0]) not in (1, 3))  # the slow tools first
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(check, *job, number, options.limit, options.logs) for number, job in enumerate(wanted)]
        found = sorted((future.result() for future in running), key=lambda c: TOOLS.index(c.tool))
    print(table(found))
    for c in (c for c in found if not c.good):
        print(f"\n{c.tool} on {c.engine}: {len(c.reports)} reports {c.failed}", *dict.fromkeys(c.reports[:5]), sep="\n")
    print(f"{sum(not c.good for c in found)} of {len(found)} not clean; the longest took {max(c.seconds for c in found):.0f} s")
    return int(any(not c.good for c in found))


if __name__ == "__main__":
    sys.exit(main())
