"""Break-even curves: speedup against length or density, from a study or from the cases of a run that form a ladder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..crossing import Crossing, Family, Probe, crossing
from ..result import Result, block_logs
from ..statistics import interval
from ..store import Record, Run
from ..study_table import sentence
from ..verdict import Verdict, compare

LENGTH, DENSITY = "length", "density"
LEAST = 3  # points of a ladder
_LENGTHS = ("kv_len", "q_len", "length", "seq_len")


@dataclass(frozen=True)
class Curve:
    """Probes along one axis and where they cross 1.0."""

    title: str
    axis: str
    crossing: Crossing

    @property
    def words(self) -> str:
        return sentence(self.crossing)


def of_study(path: str | os.PathLike) -> list[Curve]:
    """The curves of a stored study; none where the file is a plain run."""
    with open(path) as f:
        data = json.load(f)
    found = [_of_dict(entry) for entry in data.get("crossings") or []]
    return [curve for curve in found if sum(probe.speedup is not None for probe in curve.crossing.probes) > 1]


def of_run(run: Run, results: Sequence[Result]) -> list[Curve]:
    """Ladders among the cases: they differ in length alone, or in the density of one kind of pattern alone."""
    ladders: dict[tuple[str, str, str], dict[float, Record]] = {}
    for found in results:
        record = run.records[found.id]
        if found.interval is None or found.interval.blocks < 2 or record.case.limit_s is not None:
            continue
        for axis, place in (("length", _on_length(record)), ("density", _on_density(record))):
            if place:
                title, rest, x = place
                ladders.setdefault((axis, title, rest), {}).setdefault(x, record)
    return [_ladder(title, axis, by_x) for (axis, title, _), by_x in ladders.items() if len(by_x) >= LEAST]


def _ladder(title: str, axis: str, by_x: Mapping[float, Record]) -> Curve:
    logs = {x: block_logs(record) for x, record in by_x.items()}
    probes = []
    for x, values in logs.items():
        found = interval(values, 0.025)
        probes.append(Probe(x, compare(found, 1.0), found.speedup, found.low, found.high, found.blocks))
    family = Family(title, "", (axis,), tuple(sorted(by_x)), wins_at="large" if axis == LENGTH else "small")
    return Curve(title, axis, crossing(family, probes, logs))


def _on_length(record: Record) -> tuple[str, str, float] | None:
    """(title, all else that is equal, length); lengths equal to the first one move with it."""
    args = dict(record.case.args)
    lengths = [args[name] for name in _LENGTHS if isinstance(args.get(name), (int, float))]
    if not lengths:
        return None
    rest = {name: value for name, value in args.items() if name not in _LENGTHS or value != lengths[0]}
    return _title(record, rest), _fixed(record, rest), float(lengths[0])


def _on_density(record: Record) -> tuple[str, str, float] | None:
    """(title, all else that is equal, density): an argument of that name, or else the pairs of one kind of pattern."""
    args, work = dict(record.case.args), record.scout.get("work") or {}
    pattern = args.pop("pattern", None)
    density = args.pop("density", None)
    if density is None:
        if not (isinstance(pattern, str) and work.get("pairs") and work.get("dense_pairs")):
            return None
        density = work["pairs"] / work["dense_pairs"]
    rest = {"pattern": pattern.partition("(")[0] if isinstance(pattern, str) else None, **args}
    return _title(record, rest), _fixed(record, rest), float(density)


def _title(record: Record, args: Mapping[str, Any]) -> str:
    """What the members of a ladder have in common, in a few words."""
    words = [str(args["pattern"])] if args.get("pattern") else [record.case.build.partition(":")[2]]
    if "heads" in args and "head_dim" in args:
        words.append(f"{args['heads']} heads of {args['head_dim']}")
    words += [str(args[name]) for name in ("dtype", "impl") if name in args]
    words += [f"{args[name]:g} long" for name in _LENGTHS[:1] if isinstance(args.get(name), (int, float))]
    if args.get("pattern"):
        words.append(record.case.build.partition(":")[2])
    return ", ".join(words)


def _fixed(record: Record, args: Mapping[str, Any]) -> str:
    return json.dumps([record.case.build, args], sort_keys=True, default=str)


def _of_dict(data: Mapping[str, Any]) -> Curve:
    probes = tuple(Probe(**{**probe, "verdict": Verdict(probe["verdict"])}) for probe in data["probes"])
    kept = {key: value for key, value in data.items() if key in Crossing.__dataclass_fields__}
    islands = tuple(tuple(island) for island in data["islands"])
    sizes = [probe.size for probe in probes]
    axis = DENSITY if sizes and max(sizes) <= 1.0 else LENGTH
    return Curve(data["family"], axis, Crossing(**{**kept, "probes": probes, "islands": islands}))
