"""The table of cases for asv. `setup_cache` measures everything once for a commit; each track hands out its share.

asv knows only "lower is better", so the tracked ratio is sparse / dense time: 1 is break-even.
SPARSE_ATTENTION_PERF_CASES (shell patterns, separated by spaces) and SPARSE_ATTENTION_PERF_BUDGET (seconds) narrow a run.
"""

import importlib.util
import math
import os
import statistics
import sys
from pathlib import Path


def load_harness() -> None:
    """This checkout's harness, whichever commit's kernels are installed: every commit is measured in the same way."""
    name = "sparse_attention.breakeven"
    if name not in sys.modules:
        folder = Path(__file__).resolve().parents[1] / "sparse_attention" / "breakeven"
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


load_harness()

from sparse_attention.breakeven import Race, Sequential, Settings, select  # noqa: E402
from sparse_attention.breakeven.progress import Progress  # noqa: E402
from sparse_attention.breakeven.result import block_logs  # noqa: E402

from .cases import CASES  # noqa: E402

CHOSEN = select(CASES, os.environ.get("SPARSE_ATTENTION_PERF_CASES", "").split())
BLOCKS = 5


def shares(record) -> dict:
    """What asv tracks of one case: a sample for each undisturbed block."""
    blocks = [block for block in record.blocks if block.valid]
    return {
        "time_ratio": [math.exp(-log) for log in block_logs(record)],
        "sparse_time": [statistics.median(block.candidate_s) for block in blocks],
        "dense_time": [statistics.median(block.baseline_s) for block in blocks] if record.baseline else [],
        "peak_memory": record.scout.get("candidate_peak_bytes"),
    }


class BreakEven:
    params = [[case.id for case in CHOSEN]]
    param_names = ["case"]
    version = "1"
    timeout = 120

    def setup_cache(self):
        settings = Settings(
            budget_s=float(os.environ.get("SPARSE_ATTENTION_PERF_BUDGET", "600")),
            policy=Sequential((BLOCKS,)),
            first_look_share=0.9,
        )
        run = Race(CHOSEN, settings, Progress()).execute()
        quiet = {name: r for name, r in run.records.items() if sum(b.valid for b in r.blocks) > BLOCKS // 2}
        return {name: shares(record) for name, record in quiet.items()}

    setup_cache.timeout = 3600

    def setup(self, cache, case):
        if case not in cache:
            raise NotImplementedError  # asv shows n/a: it cannot run on this commit, or the machine was never quiet

    def track_time_ratio(self, cache, case):
        return sampled(cache[case]["time_ratio"])

    track_time_ratio.unit = "sparse/dense"

    def track_sparse_time(self, cache, case):
        return sampled(cache[case]["sparse_time"])

    track_sparse_time.unit = "seconds"

    def track_dense_time(self, cache, case):
        return sampled(cache[case]["dense_time"])

    track_dense_time.unit = "seconds"

    def track_peak_memory(self, cache, case):
        peak = cache[case]["peak_memory"]
        return peak if peak and peak >= 1 << 20 else math.nan  # below a mebibyte it is the allocator that is seen

    track_peak_memory.unit = "bytes"


def sampled(samples):
    """asv takes a dict of samples from a track too, and gives it intervals and weights."""
    return {"samples": samples, "number": 1} if samples else math.nan
