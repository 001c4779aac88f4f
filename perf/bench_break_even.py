"""The tables of cases for asv. `setup_cache` measures a table once for a commit; each track hands out its share. The GPU's
table is measured where `pytest perf` would measure it too.

Every case is listed, measured or not: a case that asv is not told of disappears from the dashboard, history and all.
What is measured is chosen by SPARSE_ATTENTION_PERF_CASES (shell patterns, separated by spaces), SPARSE_ATTENTION_PERF_SIZES
(default or full) and SPARSE_ATTENTION_PERF_BUDGET (seconds); SPARSE_ATTENTION_PERF_STUDY adds the break-even study
(1, or patterns of its families), of SPARSE_ATTENTION_PERF_STUDY_BUDGET seconds. BREAKEVEN_THREADS is set by asv.conf.json.
"""

import importlib.util
import os
import sys
from dataclasses import replace
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
from sparse_attention.breakeven.case import NothingToCheck  # noqa: E402
from sparse_attention.breakeven.progress import Progress  # noqa: E402
from sparse_attention.breakeven.study import POLICY, Study  # noqa: E402
from sparse_attention.breakeven.tracked import THREADS, crossing_figure, figures, for_asv  # noqa: E402

from . import cuda_cases, device  # noqa: E402
from .cases import CASES  # noqa: E402
from .study import FAMILIES  # noqa: E402

COMPILE_S = 1200


def chosen(offered, patterns: str):
    return select(offered, patterns.split(), os.environ.get("SPARSE_ATTENTION_PERF_SIZES", "default"))


def settings(variable: str, budget_s: float, **fields) -> Settings:
    return Settings(float(os.environ.get(variable, budget_s)), int(os.environ.get(THREADS, 1)), **fields)


def measured(cases, device: str = "cpu", **fields) -> dict[str, dict]:
    policy = Sequential((5,))
    given = settings("SPARSE_ATTENTION_PERF_BUDGET", 600, policy=policy, first_look_share=0.9, device=device, **fields)
    scouted = Race(cases, replace(given, budget_s=COMPILE_S), Progress())  # compiles the kernels, which the budget is not for
    scouted.scout()
    race = Race(cases, given, Progress(), resume=scouted.run)
    race.first_look()
    race.all_cores()
    return {name: figures(record) for name, record in race.run.records.items()}


class BreakEven:
    params = [[case.id for case in CASES]]
    param_names = ["case"]
    version = "1"
    timeout = 120

    def setup_cache(self):
        return measured(chosen(CASES, os.environ.get("SPARSE_ATTENTION_PERF_CASES", "")))

    setup_cache.timeout = 7200

    def setup(self, cache, case):
        if not cache.get(case):
            raise NotImplementedError  # n/a: not chosen, it cannot run on this commit, or the machine was never quiet

    def track_time_ratio(self, cache, case):
        return for_asv(cache[case].get("time_ratio"))

    track_time_ratio.unit = "sparse/dense"

    def track_all_cores_time_ratio(self, cache, case):
        return for_asv(cache[case].get("all_cores_time_ratio"))

    track_all_cores_time_ratio.unit = "sparse/dense"

    def track_eager_time_ratio(self, cache, case):
        return for_asv(cache[case].get("eager_time_ratio"))

    track_eager_time_ratio.unit = "sparse/dense"

    def track_warm_time_ratio(self, cache, case):
        return for_asv(cache[case].get("warm_time_ratio"))

    track_warm_time_ratio.unit = "sparse/dense"

    def track_sparse_time(self, cache, case):
        return for_asv(cache[case].get("sparse_time"))

    track_sparse_time.unit = "seconds"

    def track_dense_time(self, cache, case):
        return for_asv(cache[case].get("dense_time"))

    track_dense_time.unit = "seconds"

    def track_peak_memory(self, cache, case):
        return for_asv(cache[case].get("peak_memory"))

    track_peak_memory.unit = "bytes"


class GpuBreakEven(BreakEven):
    params = [[case.id for case in cuda_cases.CASES]]

    def setup_cache(self):
        if importlib.util.find_spec("sparse_attention._build_cuda") is None:  # a commit without kernels for it
            return {}
        try:
            if device.chosen()[0] != "cuda":
                return {}
            cases = chosen(cuda_cases.CASES, os.environ.get("SPARSE_ATTENTION_PERF_CASES", ""))
        except (device.Unfit, NothingToCheck):  # another GPU; patterns of the other table's cases
            return {}
        return measured(cases, "cuda")

    setup_cache.timeout = 7200


class Crossings:
    params = [[family.id for family in FAMILIES]]
    param_names = ["family"]
    version = "1"
    timeout = 120

    def setup_cache(self):
        asked = os.environ.get("SPARSE_ATTENTION_PERF_STUDY", "")
        if not asked:
            return {}
        families = chosen(FAMILIES, "" if asked == "1" else asked)
        study = Study(families, settings("SPARSE_ATTENTION_PERF_STUDY_BUDGET", 900, policy=POLICY), Progress())
        study.execute()
        found = zip(families, study.crossings())
        return {family.id: crossing_figure(family, crossing.as_dict()) for family, crossing in found}

    setup_cache.timeout = 7200

    def setup(self, cache, family):
        if cache.get(family) is None:
            raise NotImplementedError

    def track_crossing(self, cache, family):
        return for_asv(cache[family])

    track_crossing.unit = "positions or 1/density"
