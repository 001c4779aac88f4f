"""The proof of the gate on real kernels: how often it cries wolf, which slowdowns it finds, and what it refuses.

Blocks are fresh processes, as in a gate. In each, every injected case is timed beside its dense baseline as it is, once more as
it is, and with each share of its own work repeated; so one session of blocks holds the false alarms and the power of both gates.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics as _stdlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .case import Case
from .power import Power, PowerPoint
from .regression import floor_of
from .resampling import ORDERS, POLICIES, Rate, blocks_needed, disjoint, pooled, rate, suites
from .result import block_logs
from .statistics import block_log_speedup, interval
from .store import Block, Record, Run
from .verdict import Sequential

KIND, SCHEMA = "proof", 1
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
MARGIN = 0.01  # floors so much below the true speedup: what tables and code at another place in memory do not reach
BELOW = (0.0, 0.01, 0.02, 0.05)  # floors at the true speedup, and so much below it
LEAST_BLOCKS = max(map(blocks_needed, POLICIES.values())) + 2
TWIN = "of the twin"  # an order of alarms: the kernel's twin is judged, with the kernel's own speedup for its floor
REGRESSION = "regression"  # the gate against a base revision, of 10 blocks


@dataclass(frozen=True)
class Injected:
    """A case as it is, and the same with shares of its work repeated; all share one baseline."""

    plain: Case
    slowed: Mapping[float, Case]  # by slowdown; 0.0 is a twin of the plain case

    @property
    def cases(self) -> list[Case]:
        return [self.plain, *self.slowed.values()]


@dataclass(frozen=True)
class Session:
    """Block logarithms of one injected case, by slowdown; all lists hold the same blocks in the same order."""

    case: str
    speedup: dict[float, list[float]]  # over the baseline
    against_plain: dict[float, list[float]]  # over the same kernel as it is, in the same rounds
    twin: tuple[float, ...] = ()  # speedup over the baseline of the twin that repeats nothing

    def slowdown(self, nominal: float) -> tuple[float, float, float]:
        """What repeating that share of the work really cost, with 95 % bounds."""
        found = interval(self.against_plain[nominal], 0.025)
        return 1 / found.speedup - 1, 1 / found.high - 1, 1 / found.low - 1

    @property
    def blocks(self) -> int:
        return len(self.speedup[0.0])

    @property
    def sd(self) -> float:
        return _stdlib.stdev(self.speedup[0.0])


@dataclass(frozen=True)
class Proof:
    machine: Mapping[str, Any]
    threads: int
    sessions: tuple[Session, ...]
    alarms: Mapping[str, Mapping[str, Mapping[str, Rate]]]  # gate -> order -> case -> Rate
    power: Mapping[str, Mapping[str, Mapping[float, Rate]]]  # gate -> case -> slowdown -> Rate
    disjoint: Mapping[str, Mapping[float, Rate]]  # gate -> slowdown -> gates that share no block, all cases
    suites: Mapping[str, Mapping[str, Mapping[float, Rate]]]  # gate -> order -> floor's distance -> suites of 50 cases that fail
    controls: tuple[Mapping[str, Any], ...] = ()
    margin: Mapping[str, Mapping[str, Mapping[float, Rate]]] = field(default_factory=dict)  # as power, with floors MARGIN lower; 0: the twin

    def as_dict(self) -> dict[str, Any]:
        return {"kind": KIND, "schema": SCHEMA, **asdict(self)}

    def power_file(self, gate: str) -> Power:
        """The power curve of a gate, for the report."""
        points = []
        for case, rates in self.power[gate].items():
            points += [PowerPoint(case, slowdown, r.runs, r.caught, r.low, r.high) for slowdown, r in sorted(rates.items())]
        blocks = blocks_needed(POLICIES.get(gate, POLICIES["10 blocks"]))
        return Power(tuple(points), dict(self.machine), {"name": gate, "blocks": blocks, "threads": self.threads})


def policy_of_session(blocks: int) -> Sequential:
    """Asks a race for exactly so many valid blocks of every case."""
    return Sequential(looks=(blocks,), alpha=0.01)


def sessions_of(run: Run, injected: Iterable[Injected]) -> list[Session]:
    """What the blocks of a race over `injected` say; blocks in which some variant of a case was disturbed are left out."""
    found = []
    for item in injected:
        plain = run.records[item.plain.id]
        variants = {slowdown: run.records[case.id] for slowdown, case in item.slowed.items()}
        numbers = [set(_valid(record)) for record in (plain, *variants.values())]
        common = sorted(set.intersection(*numbers))
        if common:
            speedup = {slowdown: _logs(record, common) for slowdown, record in {**variants, 0.0: plain}.items()}
            against = {slowdown: _against(plain, record, common) for slowdown, record in variants.items()}
            twin = tuple(_logs(variants[0.0], common)) if 0.0 in variants else ()
            found.append(Session(item.plain.id, dict(sorted(speedup.items())), dict(sorted(against.items())), twin))
    return found


def analyse(
    sessions: Sequence[Session],
    machine: Mapping[str, Any],
    threads: int,
    runs: int = 1000,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Proof:
    """Draw gates from the sessions' blocks; ValueError when a session is too short (LEAST_BLOCKS), or there is none."""
    short = [f"{s.case} has {s.blocks}" for s in sessions if s.blocks < LEAST_BLOCKS]
    if short or not sessions:
        raise ValueError(f"every case needs {LEAST_BLOCKS} or more valid blocks; {', '.join(short) or 'nothing was measured'}")
    rng = random.Random(seed)
    alarms: dict[str, dict[str, dict[str, Rate]]] = {}
    power: dict[str, dict[str, dict[float, Rate]]] = {}
    apart: dict[str, dict[float, Rate]] = {}
    margin: dict[str, dict[str, dict[float, Rate]]] = {}
    for gate, policy in POLICIES.items():
        tell(f"drawing gates: {gate}")
        alarms[gate] = {o: {s.case: rate(*2 * (s.speedup[0.0],), policy, runs, rng, o) for s in sessions} for o in ORDERS}
        alarms[gate][TWIN] = {s.case: rate(s.twin, s.speedup[0.0], policy, runs, rng) for s in sessions if s.twin}
        power[gate] = {s.case: _power(s, s.speedup, policy, runs, rng) for s in sessions if len(s.speedup) > 1}
        margin[gate] = {s.case: _power(s, {**s.speedup, 0.0: s.twin}, policy, runs, rng, MARGIN) for s in sessions if s.twin}
        apart[gate] = _apart(sessions, lambda s, x: disjoint(s.speedup[x], s.speedup[0.0], policy))
    tell(f"drawing gates: {REGRESSION}")
    policy, least = POLICIES["10 blocks"], floor_of(machine["class"])
    twins = [s for s in sessions if 0.0 in s.against_plain]
    alarms[REGRESSION] = {
        order: {s.case: rate(s.against_plain[0.0], s.against_plain[0.0], policy, runs, rng, order, floor=least) for s in twins}
        for order in ORDERS
    }
    power[REGRESSION] = {
        s.case: {x: rate(logs, logs, policy, runs, rng, floor=least) for x, logs in s.against_plain.items()} for s in twins
    }
    apart[REGRESSION] = _apart(twins, lambda s, x: disjoint(s.against_plain[x], s.against_plain[x], policy, floor=least))
    tell("drawing suites of 50 cases")
    pools = [s.speedup[0.0] for s in sessions]
    count = max(runs // 2, 10)
    many = {
        gate: {order: {b: suites(pools, policy, count, rng, order, b) for b in BELOW} for order in ("shuffled", "repeated")}
        for gate, policy in POLICIES.items()
    }
    return Proof(machine, threads, tuple(sessions), alarms, power, apart, many, margin=margin)


def save(proof: Proof, folder: str | os.PathLike) -> list[str]:
    """Write the proof and the power curve of each gate into `folder`; returns the files' paths."""
    os.makedirs(folder, exist_ok=True)
    date = proof.machine["time"][:10]
    paths = [os.path.join(folder, f"{'certificate' if proof.sessions else 'controls'}-{date}.json")]
    with open(paths[0], "w") as f:
        json.dump(_rounded(proof.as_dict()), f, indent=1)
    for gate in proof.power:
        if proof.power[gate]:
            paths.append(os.path.join(folder, f"proof-{_slug(gate)}-{date}.json"))
            proof.power_file(gate).save(paths[-1])
    return paths


def load_sessions(path: str | os.PathLike) -> tuple[list[Session], Mapping[str, Any], int, tuple[Mapping[str, Any], ...]]:
    """Sessions, machine, threads and controls of a stored proof; ValueError for another file."""
    try:
        with open(path) as f:
            data = json.load(f)
        if (data["kind"], data["schema"]) != (KIND, SCHEMA):
            raise ValueError(f"kind and schema are {data['kind']!r} and {data['schema']!r}")
        return [_session(s) for s in data["sessions"]], data["machine"], data["threads"], tuple(data["controls"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not a stored proof: {error!r}") from error


def _session(data: Mapping[str, Any]) -> Session:
    speedup, against = ({float(x): v for x, v in data[key].items()} for key in ("speedup", "against_plain"))
    # Certificates of before twins were stored hold the ratio alone.
    twin = data.get("twin") or [a + b for a, b in zip(speedup[0.0], against.get(0.0, ()))]
    return Session(data["case"], speedup, against, tuple(twin))


def _slug(gate: str) -> str:
    return "-".join(re.findall(r"[\w.]+", gate))


def _power(session: Session, judged: Mapping[float, Sequence[float]], policy, runs: int, rng, below: float = 0.0) -> dict[float, Rate]:
    truth = session.speedup[0.0]
    return {slowdown: rate(logs, truth, policy, runs, rng, below=below) for slowdown, logs in judged.items()}


def _apart(sessions: Sequence[Session], one: Callable[[Session, float], Rate]) -> dict[float, Rate]:
    slowdowns = sorted({x for s in sessions for x in s.against_plain} | {0.0})
    found = {x: [one(s, x) for s in sessions if x in s.speedup] for x in slowdowns}
    return {x: pooled(rates) for x, rates in found.items() if rates and sum(r.runs for r in rates)}


def _valid(record: Record) -> dict[int, Block]:
    return {block.number: block for block in record.blocks if block.valid}


def _logs(record: Record, numbers: Sequence[int]) -> list[float]:
    by_number = dict(zip(_valid(record), block_logs(record)))
    return [by_number[n] for n in numbers]


def _against(plain: Record, slowed: Record, numbers: Sequence[int]) -> list[float]:
    """Median log(plain / slowed) over the rounds of each block in which both were undisturbed."""
    ours, theirs = _valid(plain), _valid(slowed)
    logs = []
    for n in numbers:
        a, b = ours[n], theirs[n]
        rounds = [(x, y) for x, y, p, q in zip(a.candidate_s, b.candidate_s, a.clean, b.clean) if p and q]
        rounds = rounds or list(zip(a.candidate_s, b.candidate_s))
        logs.append(block_log_speedup([x for x, _ in rounds], [y for _, y in rounds]))
    return logs


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
