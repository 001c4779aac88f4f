"""From block log speedups and a floor to a verdict, and from verdicts to an exit code."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .statistics import Interval, interval


SURE_ALPHA = 0.01  # error probability of calling a case sure to pass, on fewer blocks than its look has
LEAST_BLOCKS = 3  # a look that time or quiet cut short may still decide, but not on fewer blocks than this


class Verdict(str, enum.Enum):
    PASS = "PASS"  # the whole interval lies at or above the floor
    FAIL = "FAIL"  # the whole interval lies below it
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_EVALUATED = "NOT EVALUATED"  # too little that is valid was measured; the reason is kept
    WRONG = "WRONG"  # the candidate's output is wrong, or it raised: it has no time
    SUSPICIOUS = "SUSPICIOUS"  # what was timed cannot have been its work: it has no time either


JUDGED = (Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE)


class ExitCode(enum.IntEnum):
    OK = 0
    WRONG = 1
    USAGE = 2
    BELOW_BREAK_EVEN = 10
    INCONCLUSIVE = 11
    NOT_EVALUATED = 12
    NOTHING_CHECKED = 13


@dataclass(frozen=True)
class Judgement:
    """A verdict, the interval it rests on, and how many further blocks the policy asks for."""

    verdict: Verdict
    interval: Interval | None
    more: int = 0
    suspect: bool = False  # below the floor at a first look that is not yet confirmed
    reason: str = ""


def exit_code(verdicts: Iterable[Verdict], strict: bool = False, allow_not_evaluated: bool = False) -> ExitCode:
    """The process exit code of a gate; 0 only if at least one case was judged."""
    seen = list(verdicts)
    if not seen:
        return ExitCode.NOTHING_CHECKED
    if Verdict.WRONG in seen or Verdict.SUSPICIOUS in seen:
        return ExitCode.WRONG
    if Verdict.FAIL in seen:
        return ExitCode.BELOW_BREAK_EVEN
    if Verdict.NOT_EVALUATED in seen and not allow_not_evaluated:
        return ExitCode.NOT_EVALUATED
    if all(v is Verdict.NOT_EVALUATED for v in seen):
        return ExitCode.NOTHING_CHECKED
    if Verdict.INCONCLUSIVE in seen and strict:
        return ExitCode.INCONCLUSIVE
    return ExitCode.OK


def compare(found: Interval, floor: float) -> Verdict:
    if found.high < floor:
        return Verdict.FAIL
    return Verdict.PASS if found.low >= floor else Verdict.INCONCLUSIVE


def surely_passes(logs: Sequence[float], floor: float) -> bool:
    """Whether a case may be left at these blocks, although its look has more, where time is short. logs: of its block speedups."""
    return len(logs) >= LEAST_BLOCKS and compare(interval(logs, SURE_ALPHA), floor) is Verdict.PASS


@dataclass(frozen=True)
class TwoStage:
    """Look at `first` blocks; unless they pass, take `second` fresh ones. A case fails only when both looks, which
    share no block, lie below the floor: at the floor itself that happens at most first_alpha * second_alpha of the time.
    """

    first: int = 5
    first_alpha: float = 0.05
    second: int = 10
    second_alpha: float = 0.01

    @property
    def blocks(self) -> int:
        return self.first

    def cut_short(self, logs: Sequence[float], floor: float) -> Judgement | None:
        """Of a suspect: what those fresh blocks say that there are. A second look of fewer blocks errs as seldom, it only
        finds less; the first look alone would fail the floor itself first_alpha of the time.
        """
        fresh = logs[self.first :]
        if len(fresh) < LEAST_BLOCKS:
            return None
        found = interval(fresh, self.second_alpha)
        verdict = compare(found, floor)
        if verdict is Verdict.INCONCLUSIVE:
            return None
        return Judgement(verdict, found, reason=f"on {len(fresh)} of {self.second} fresh blocks")

    def judge(self, logs: Sequence[float], floor: float) -> Judgement:
        if len(logs) < self.first:
            return _too_few(logs, self.first_alpha, self.first - len(logs))
        one = interval(logs[: self.first], self.first_alpha)
        look = compare(one, floor)
        if look is Verdict.PASS:
            return Judgement(look, one)
        suspect = look is Verdict.FAIL
        fresh = logs[self.first : self.first + self.second]
        if len(fresh) < self.second:
            shown = interval(logs, self.second_alpha)
            return Judgement(Verdict.INCONCLUSIVE, shown, self.second - len(fresh), suspect, "needs a second look")
        two = interval(fresh, self.second_alpha)
        verdict = compare(two, floor)
        if verdict is Verdict.FAIL and not suspect:
            return Judgement(Verdict.INCONCLUSIVE, two, reason="below the floor at the second look only")
        return Judgement(verdict, two)


@dataclass(frozen=True)
class Sequential:
    """Judge all blocks so far at each of `looks`, each at an equal share of `alpha` (Bonferroni)."""

    looks: tuple[int, ...] = (5, 10, 20)
    alpha: float = 0.01

    @property
    def blocks(self) -> int:
        return self.looks[0]

    def judge(self, logs: Sequence[float], floor: float) -> Judgement:
        alpha = self.alpha / len(self.looks)
        for look in self.looks:
            if len(logs) < look:
                return _too_few(logs, alpha, look - len(logs))
            found = interval(logs[:look], alpha)
            verdict = compare(found, floor)
            if verdict is not Verdict.INCONCLUSIVE:
                break
        return Judgement(verdict, found)


Policy = TwoStage | Sequential


def judge(logs: Sequence[float], floor: float, policy: Policy) -> Judgement:
    """The policy's judgement of these blocks, in the order they were measured."""
    if not floor > 0 or not math.isfinite(floor):
        raise ValueError(f"floor must be a positive speedup, got {floor}")
    return policy.judge(logs, floor)


def conclude(logs: Sequence[float], floor: float, policy: Policy) -> Judgement:
    """As `judge`, no more blocks being measured. INCONCLUSIVE is then only what has all blocks of a first look and was not
    below the floor there: neither time nor quiet that ran out may hide a slower candidate.
    """
    judged = judge(logs, floor, policy)
    if not judged.more:
        return judged
    if len(logs) < policy.blocks:
        if len(logs) >= LEAST_BLOCKS and compare(judged.interval, floor) is Verdict.PASS:
            return Judgement(Verdict.PASS, judged.interval, reason=f"on {len(logs)} of {policy.blocks} blocks")
        when = f"after {len(logs)} of {policy.blocks} blocks" if logs else "before its first block"
        return replace(judged, verdict=Verdict.NOT_EVALUATED, reason=f"out of time {when}")
    short = f"out of time, {judged.more} blocks short of "
    if judged.suspect:
        unconfirmed = f"below the floor at its first look, and {short}the second"
        return policy.cut_short(logs, floor) or replace(judged, verdict=Verdict.NOT_EVALUATED, reason=unconfirmed)
    return replace(judged, reason=short + "a second look")


def _too_few(logs: Sequence[float], alpha: float, more: int) -> Judgement:
    shown = interval(logs, alpha) if logs else None
    return Judgement(Verdict.INCONCLUSIVE, shown, more, reason=f"{len(logs)} blocks so far")
