"""Stored runs whose truth is known: times are drawn, nothing is measured."""

from __future__ import annotations

import math
import random

from sparse_attention.breakeven import Case, Run, TwoStage
from sparse_attention.breakeven.race import Settings
from sparse_attention.breakeven.store import Block, Record

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
WINDOWS = (64, 128, 512, 1024, 2048, 4096)
RATE = 60e9  # FLOP/s of both sides


def window(width: int, length: int, floor: float = 1.0) -> Case:
    """A sliding window against dense causal attention: 4 heads of 64."""
    args = {"pattern": f"SlidingWindow({width})", "heads": 4, "q_len": length, "kv_len": length, "head_dim": 64, "dtype": "float32"}
    name = f"window{width}/{length // 1024}k" if length >= 1024 else f"window{width}/{length}"
    return Case(name, "perf.workloads:forward", args, floor)


def ladder() -> list[Case]:
    """One window at many lengths, many windows at one length."""
    return [window(256, n) for n in LENGTHS] + [window(w, 16384) for w in WINDOWS]


def speedup(case: Case) -> float:
    """Of the work alone, less a fixed loss: it breaks even near 900 positions, and near a density of 0.3."""
    work = work_of(case)
    return 0.62 * (work["dense_pairs"] / 2 / work["pairs"]) ** 0.9


def work_of(case: Case) -> dict[str, float]:
    width, length = int(case.args["pattern"][14:-1]), case.args.get("kv_len") or case.args["shape"][0]
    width = min(width, length)
    pairs = 4 * (length * width - width * (width - 1) // 2)
    return {"pairs": pairs, "dense_pairs": 4 * length * length, "flops": 4 * pairs * 64, "bytes": 4 * 4 * length * 64 * 4}


def run(
    cases,
    factors=None,
    *,
    commit: str = "c0ffee0123456789",
    day: int = 1,
    seed: int = 0,
    blocks: int = 5,
    sd: float = 0.01,
    drift: float = 0.0,
    baseline: float = 1.0,
    **machine,
) -> Run:
    """`factors` multiply a case's speedup through the candidate's time; `baseline` multiplies the baseline's time in all.

    `drift` is the deviation of this run's candidates from others, as a logarithm, drawn once a case.
    """
    rng = random.Random(seed)
    records = {}
    for case in cases:
        true = speedup(case) * (factors or {}).get(case.id, 1.0) * math.exp(rng.gauss(0, drift))
        baseline_s = baseline * work_of(case)["dense_pairs"] / 2 * 256 / RATE
        record = Record(case, scout(case, baseline_s, baseline_s / true))
        for number in range(blocks):
            shift = math.exp(rng.gauss(0, sd))
            dense = [baseline_s * rng.lognormvariate(0, 0.01) for _ in range(5)]
            sparse = [baseline_s / baseline / true * shift * rng.lognormvariate(0, 0.01) for _ in range(5)]
            record.blocks.append(Block(number, "sdpa", dense, sparse, [True] * 5))
        records[case.id] = record
    about = {
        "class": "cpu/zen4/2c",
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "commit": commit,
        "committed": f"2026-03-{day:02}T09:00:00+01:00",
        "dirty": False,
        "time": f"2026-03-{day:02}T12:00:00Z",
        **machine,
    }
    policy = {"name": "TwoStage", **vars(TwoStage())}
    settings = {"budget_s": Settings.budget_s, "threads": 1, "device": "cpu", "seed": 0, "policy": policy, "table": "perf.cases:CASES"}
    anchor = {"source": "numpy 2.4.6", "compute": 2 * 256**3 / 80e9, "memory": 2 * (1 << 25) / 20e9}
    evidence = [{"ready_s": 2.0, "measured_s": 3.0, "anchor": anchor} for _ in range(max(blocks, 15))]
    return Run(about, {**settings, "base": None, "unjudged": ""}, records, evidence, 60.0)


def scout(case: Case, baseline_s: float, candidate_s: float) -> dict:
    return {
        "status": "ok",
        "ready_s": 0.1,
        "candidate_s": candidate_s,
        "candidate_peak_bytes": 18 << 20,
        "baselines": {"sdpa": baseline_s},
        "baseline_peak_bytes": {"sdpa": 34 << 20},
        "scale": 1.0,
        "note": "",
        "work": work_of(case),
    }


def history(cases, folder, steps: dict[str, tuple[int, float]], runs: int = 14, drift: float = 0.01) -> None:
    """Store `runs` runs, a day and a commit apart. `steps` maps a case to the run from which on its speedup is multiplied."""
    for number in range(runs):
        factors = {name: factor for name, (first, factor) in steps.items() if number >= first}
        stored = run(cases, factors, commit=f"{number:02}abcdef{number:032}", day=number + 1, seed=100 + number, drift=drift)
        place = folder / "cpu" / "zen4" / "2c"
        place.mkdir(parents=True, exist_ok=True)
        stored.save(place / f"{number:02}.json")
