"""The second gate: this revision's candidate against the same candidate of a base revision, interleaved in one process.

Both are built by the same builder over the same inputs. Two builds of one kernel feel memory, cores and minutes alike, so this
pair is much sharper than sparse against dense; and nothing but the revision differs between its sides.

From the base come the packages that are named, and nothing else: the harness and the builders of workloads are this revision's on
both sides on purpose, so that the work is the same. Should the builder bring anything else of this repository along, a kernel
might be compared with itself, and the case is refused.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from . import checking, revision
from .case import Case, NotInBase, Unavailable, Workload
from .result import Result
from .statistics import Interval, t_quantile
from .verdict import Verdict

FLOOR = 0.97  # code that does the same moves by a percent or two when its place in memory changes
CUDA_FLOOR = 0.99  # on a GPU by half a percent
LABELS = ("base", "head")
NOT_IN_THE_BASE = "not in the base"  # how the reason begins of a case that only this revision has
CHANGED_ALPHA = 0.005  # error probability of each side of what is called slower or faster


@dataclass(frozen=True)
class Base:
    """A revision that was unpacked into `folder`, and the packages that are taken from it."""

    commit: str
    folder: str
    packages: tuple[str, ...] = ("sparse_attention",)

    @classmethod
    def of(cls, name: str, packages: Iterable[str] = (), prepare: str = "", repository: str | os.PathLike = ".") -> Base:
        """Unpack the revision `name` of the git repository around `repository`; ValueError when that cannot be done."""
        commit = revision.resolve(name, repository)
        folder = revision.checkout(commit, repository, prepare)
        return cls(commit, str(folder), tuple(packages) or cls.packages)


def floor_of(device: str) -> float:
    """The least speed against the base on such a device or machine class."""
    return CUDA_FLOOR if device.startswith("cuda") else FLOOR


def against(cases: Iterable[Case], base: Base, floor: float = FLOOR) -> list[Case]:
    """The same cases, each raced against itself in the base revision."""
    return [
        Case(
            case.id,
            f"{__name__}:pair",
            {"build": case.build, "args": dict(case.args), "commit": base.commit, "folder": base.folder, "packages": base.packages},
            floor,
            case.tags,
        )
        for case in cases
    ]


def pair(build: str, args: Mapping[str, Any], commit: str, folder: str, packages: Sequence[str]) -> Workload:
    """This revision's candidate and, as its only baseline, the base revision's."""
    head = Case("head", build, args).load()
    what = f"base {commit[:10]}"
    base = _base_workload(build, args, folder, tuple(packages), what, head)

    def refresh(seed):
        head.refresh(seed)
        (base.refresh or head.refresh)(seed)

    return Workload(
        head.candidate, {what: base.candidate}, head.check, head.inputs, head.refresh and refresh, work=head.work, note=head.note
    )


def detects(result: Result) -> float:
    """The slowdown of head against base that these blocks find with 95 % power: to the floor, and beyond it."""
    return (1 + result.detects) / result.floor - 1 if result.detects is not None else math.inf


def text(results: Iterable[Result], commit: str) -> str:
    """A line for each case that is slower or faster than in the base revision, and how small a slowdown would be found."""
    judged = (Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE)
    results = [r for r in results if r.verdict in judged and r.interval is not None and r.interval.blocks > 1]
    lines = []
    for found in results:
        seen = _surer(found.interval)
        if seen.low <= 1.0 <= seen.high:
            continue
        change = f"{100 * abs(1 / seen.speedup - 1):.1f} % {'slower' if seen.speedup < 1 else 'faster'}"
        times = f"{1 / seen.high:.3f} to {1 / seen.low:.3f} times as long"
        lines.append(f"{found.id}: the kernel moved: {change} than in {commit[:10]} ({times}); only the revision differs here")
    if not lines and results:
        lines.append(f"no kernel moved against {commit[:10]}")
    reach = [detects(r) for r in results]
    if reach:
        quietest, noisiest = (f"{100 * x:.1f} %" for x in (min(reach), max(reach)))
        lines.append(f"slowdowns of a kernel found with 95 % power: {quietest} in the quietest case, {noisiest} in the noisiest")
    return "\n".join(lines)


def _surer(found: Interval) -> Interval:
    half = t_quantile(1 - CHANGED_ALPHA, found.blocks - 1) * found.sd / math.sqrt(found.blocks)
    return replace(found, low=found.speedup * math.exp(-half), high=found.speedup * math.exp(half), alpha=CHANGED_ALPHA)


def _base_workload(
    build: str, args: Mapping[str, Any], folder: str, packages: tuple[str, ...], what: str, head: Workload
) -> Workload:
    """From this revision's builder over the base's packages; should those lack what it wants, from the base's own builder.

    Raises Unavailable when neither gives a candidate whose output is right, and ComparedWithItself when the kernel would not be
    the base's.
    """
    top = build.split(":")[0].partition(".")[0]
    failures, errors = [], []
    repository = revision.repository_of(top)
    for label, taken in (("base", packages), ("base_own", (*packages, top))):
        try:
            others = _load(folder, taken, top, label)
            module, function = build.split(":")
            with others.imports.watched():
                found = getattr(others.module(module), function)(**args)
                _share_inputs(found.inputs, head.inputs)
                _check(found, head)
            others.require_used(taken, module, repository)
            others.require_apart()
            return found
        except Exception as error:
            errors.append(error)
            failures.append(f"{', '.join(sorted({*taken}))} of the base: {checking.summary(error)}")
    if any(isinstance(error, revision.ComparedWithItself) for error in errors):
        raise revision.ComparedWithItself(f"{what}: " + "; with ".join(failures))
    lacking = (ImportError, AttributeError, revision.NotThere)
    with_what = f"{what}, with " + "; with ".join(failures)
    if all(isinstance(error, lacking) for error in errors):
        raise NotInBase(f"{NOT_IN_THE_BASE}: {with_what}")
    raise Unavailable(f"cannot run it: {with_what}")


@cache
def _load(folder: str, packages: tuple[str, ...], along: str, label: str) -> revision.Renamed:
    return revision.load(folder, packages, (along,), label)


def _check(base: Workload, head: Workload) -> None:
    """The base does the same work: its output passes the check or, as checks become stricter, is within a percent of head's."""
    try:
        checking.check(base)
    except checking.WrongOutput:
        if not _within_a_percent(base.candidate(), head.candidate()):
            raise


def _within_a_percent(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) > 0 and all(map(_within_a_percent, one, other))
    if _kind(one) != _kind(other) or not _kind(one)[0]:
        return False
    return bool(abs(one - other).max() <= 0.01 * abs(other).max())


def _share_inputs(base: Sequence[Any], head: Sequence[Any]) -> None:
    """Let the base work on the very memory of this revision's inputs, where both are torch tensors."""
    if [_kind(x) for x in base] != [_kind(x) for x in head]:
        raise ValueError(f"inputs must be alike, got {[_kind(x) for x in base]} and here {[_kind(x) for x in head]}")
    torch = sys.modules.get("torch")
    for theirs, ours in zip(base, head):
        if torch is not None and isinstance(ours, torch.Tensor) and theirs.stride() == ours.stride():
            theirs.data = ours.data


def _kind(x: Any) -> tuple[tuple[int, ...], str]:
    return tuple(getattr(x, "shape", ())), str(getattr(x, "dtype", type(x).__name__))
