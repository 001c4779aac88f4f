"""What a report says, before it is laid out: the verdict, what changed, what did not, and where the numbers come from."""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import regression, table
from ..attribution import LEAST, Attribution, attribute, move
from ..race import Settings
from ..result import Result, block_logs, counted, results
from ..statistics import interval
from ..store import Run
from ..verdict import ExitCode, Policy, Sequential, TwoStage, Verdict, exit_code
from .curves import Curve, of_run
from .history import History, Series, series
from .roofline import Roofline, rooflines

CHANGED_ALPHA = 0.05  # probability that a report calls any unchanged case changed


@dataclass(frozen=True)
class Row:
    """A case, and what moved since the base run where there is one."""

    result: Result
    change: Attribution | None = None
    remark: str = ""

    unjudged: bool = False  # measured well, but its machine class has no floors

    @property
    def changed(self) -> bool:
        fine = self.result.verdict is Verdict.PASS or self.unjudged
        return self.change is not None or bool(self.remark) or not fine


@dataclass
class Report:
    run: Run
    results: list[Result]
    code: ExitCode  # of a strict gate
    sentence: str
    changed: list[Row]
    unchanged: list[Row]
    base: str = ""  # what it is compared with, in words
    notes: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    rooflines: list[Roofline] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    history: History = field(default_factory=History)
    against: Report | None = None  # the same cases raced against a base revision
    is_study: bool = False  # its cases are sizes of a search: that some lose is no failure

    @property
    def revision(self) -> str:
        """The base revision that the cases were raced against; "" for their baselines."""
        return (self.run.settings.get("base") or "")[:10]

    @property
    def opponent(self) -> str:
        """`revision`, for a heading."""
        return self.revision or "the base revision"

    @property
    def worst(self) -> Report:
        """This or, if its verdict is worse, the one against a revision."""
        return min((self, self.against or self), key=lambda report: _SEVERITY.index(report.code))

    @property
    def verdict(self) -> str:
        if self.is_study:
            return STUDY
        held_back = self.run.settings.get("unjudged") and self.code in (ExitCode.NOT_EVALUATED, ExitCode.NOTHING_CHECKED)
        return NOT_JUDGED if held_back else _VERDICTS[self.code]

    @property
    def labels(self) -> tuple[str, str]:
        """What the two sides are called."""
        return regression.LABELS if self.revision else table.LABELS

    @property
    def rest(self) -> str:
        """What the unchanged rows are, in words."""
        what = "sizes measured" if self.is_study else "unchanged" if self.base or self.revision else "passed"
        return f"{len(self.unchanged)} {what}"

    @property
    def machine(self) -> str:
        return table.headline(self.run, self.results).partition("   noise: ")[0].removeprefix("machine: ")

    @property
    def noise(self) -> str:
        return table.headline(self.run, self.results).partition("   noise: ")[2]

    @property
    def command(self) -> str:
        """What measures the changed cases again, or all where none changed; "" where nothing was measured."""
        if not self.results:
            return ""
        if self.is_study:
            return command(self.run, [], "study")
        return command(self.run, [row.result.id for row in self.changed])


    def as_dict(self) -> dict[str, Any]:
        against = {"against": self.against.as_dict()} if self.against else {}
        return {
            "verdict": self.verdict,
            "exit": int(self.code),
            "says": self.sentence,
            "machine": self.machine,
            "base": self.base,
            "changed": [row.result.id for row in self.changed],
            "results": {found.id: found.as_dict() for found in self.results},
            "notes": self.notes,
            **against,
        }


NOT_JUDGED, STUDY = "NOT JUDGED", "STUDY"
_SEVERITY = [
    ExitCode.WRONG,
    ExitCode.BELOW_BREAK_EVEN,
    ExitCode.NOTHING_CHECKED,
    ExitCode.NOT_EVALUATED,
    ExitCode.INCONCLUSIVE,
    ExitCode.OK,
]
_VERDICTS = {
    ExitCode.OK: "PASS",
    ExitCode.WRONG: "WRONG",
    ExitCode.BELOW_BREAK_EVEN: "FAIL",
    ExitCode.INCONCLUSIVE: "INCONCLUSIVE",
    ExitCode.NOT_EVALUATED: "NOT EVALUATED",
    ExitCode.NOTHING_CHECKED: "NOTHING CHECKED",
}


def build(run: Run, base: Run | None = None, history: History | None = None, curves: Sequence[Curve] = ()) -> Report:
    """Everything there is to say about `run`; without `base` it is compared with the last stored run of another commit."""
    history = history or History()
    base = None if run.settings.get("base") else base or history.before(run)
    found = results(run, policy_of(run.settings))
    notes = list(history.notes)
    if base is not None and base.machine.get("class") != run.machine["class"]:
        notes.append(f"the base was measured on {base.machine.get('class')}: speedups of two machine classes are not compared")
        base = None
    unjudged = run.settings.get("unjudged")
    rows = [replace(_row(r, run, base, len(found)), unjudged=bool(unjudged) and r.reason == unjudged) for r in found]
    changed = sorted((r for r in rows if r.changed), key=_urgency)
    if base is not None:
        gone = [name for name in base.records if name not in run.records]
        notes += [f"in the base, but not run here: {_few(gone)}"] if gone else []
    return Report(
        run,
        found,
        exit_code((r.verdict for r in counted(found)), strict=True),
        sentence(found, run.settings),
        changed,
        [r for r in rows if not r.changed],
        _base_words(base),
        notes,
        [*curves, *of_run(run, found)],
        rooflines(run, found),
        [s for s in series(history.runs, run) if len(s.points) > 1] if history.runs else [],
        history,
    )


def missing(run: Run, reason: str) -> Report:
    """In place of a race against the base revision that should be beside `run` but left nothing."""
    nothing = replace(run, records={}, evidence=[], settings={**run.settings, "unjudged": ""})
    return Report(nothing, [], ExitCode.NOTHING_CHECKED, reason, [], [])


def of_study(run: Run, curves: Sequence[Curve], history: History) -> Report:
    """About a stored study, whose own `curves` come first."""
    found = results(run, policy_of(run.settings))
    outcomes = [curve.crossing.outcome for curve in curves]
    parts = [f"{outcomes.count(outcome)} {words}" for outcome, words in _OUTCOMES.items() if outcome in outcomes]
    said = f"{len(curves)} famil{'ies' if len(curves) > 1 else 'y'}: {', '.join(parts)}"
    rows = [Row(r) for r in found if run.records[r.id].blocks or not run.records[r.id].ready]  # others were not asked for
    return Report(run, found, ExitCode.OK, said, [], rows, curves=[*curves], history=history, is_study=True)


_OUTCOMES = {
    "crosses": "with a crossing",
    "always": "faster at every size",
    "never": "slower at every size",
    "islands": "faster at some sizes only",
    "unknown": "undecided",
}


def policy_of(settings: Mapping[str, Any]) -> Policy:
    """The policy that a stored run was measured for."""
    stored = dict(settings["policy"])
    kinds = {kind.__name__: kind for kind in (TwoStage, Sequential)}
    try:
        kind = kinds[stored.pop("name")]
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the run has no known policy: {settings['policy']!r}") from error


def sentence(found: Sequence[Result], settings: Mapping[str, Any]) -> str:
    """The verdict in words."""
    unjudged = settings.get("unjudged")
    if unjudged:
        found = [r for r in found if r.reason != unjudged]
        if not found:
            return unjudged
    by_verdict = {verdict: [r for r in found if r.verdict is verdict] for verdict in Verdict}
    slow = f"slower than {settings['base'][:10]}" if settings.get("base") else "below break-even"
    parts = []
    for verdict, words in {**_WORDS, Verdict.FAIL: slow}.items():
        of = by_verdict[verdict]
        if of and parts:
            parts.append(f"{len(of)} {words}")
        elif of:
            plural = "s" * (len(found) != 1)
            parts.append(f"{len(of)} of {len(found)} case{plural} {words}" + (f": {_speedup(of[0])}" if len(of) == 1 else ""))
    passed = len(by_verdict[Verdict.PASS])
    if parts:
        return "; ".join(parts + [f"{passed} pass"] * bool(passed))
    if not passed:
        return "nothing was measured"
    if settings.get("base"):
        who = f"all {passed} cases are" if passed > 1 else "the one case is"
        return f"{who} at least {min(r.floor for r in found):.3g}x as fast as {settings['base'][:10]}"
    return f"all {passed} cases are at or above their floor" if passed > 1 else "the one case is at or above its floor"


_WORDS = {
    Verdict.WRONG: "wrong",
    Verdict.SUSPICIOUS: "suspicious",
    Verdict.FAIL: "below break-even",
    Verdict.NOT_EVALUATED: "not evaluated",
    Verdict.INCONCLUSIVE: "inconclusive",
}


def command(run: Run, names: Sequence[str], name: str = "gate") -> str:
    """A command line that measures `names` as `run` did; what is the default is left out."""
    settings, policy = run.settings, policy_of(run.settings)
    sequential = isinstance(policy, Sequential)
    options = {
        "--base": settings.get("base"),
        "--table": settings.get("table"),
        "--sizes": "full" if any("full" in run.records[name].case.tags for name in (names or run.records)) else None,
        "--policy": "sequential" if sequential and name == "gate" else None,
        "--alpha": f"{policy.alpha if sequential else policy.second_alpha:g}" if name == "gate" else None,
        "--budget": f"{settings['budget_s']:g}s",
        "--device": settings["device"],
        "--threads": str(settings["threads"]),
    }
    words = ["python", "-m", "sparse_attention.breakeven", name]
    for option, value in options.items():
        if value and _DEFAULTS.get(option) != value:
            words += [option, value]
    return " \\\n    ".join([shlex.join(words), *(shlex.join(["--cases", glob.escape(name)]) for name in names)])


_DEFAULTS = {"--table": "perf.cases:CASES", "--alpha": "0.01", "--budget": f"{Settings.budget_s:g}s", "--device": "cpu"}


def _row(found: Result, run: Run, base: Run | None, cases: int) -> Row:
    if run.settings.get("base"):
        return Row(found, remark=_against_itself(block_logs(run.records[found.id]), CHANGED_ALPHA / (2 * cases)))
    if base is None:
        return Row(found)
    if found.id not in base.records:
        return Row(found, remark="new")
    logs = [block_logs(r.records[found.id]) for r in (base, run)]
    if not all(logs):
        return Row(found)
    seen = attribute(base, run, found.id)
    if seen is None:
        return Row(found, remark="another race than in the base")
    sure = move(*logs, alpha=CHANGED_ALPHA / (2 * cases)).moved
    return Row(found, seen if sure else None)


def _against_itself(logs: Sequence[float], alpha: float) -> str:
    """Whether the kernel is slower or faster than in the base revision, in words; nothing else differs between its sides."""
    if len(logs) < 2:
        return ""
    sure = interval(logs, alpha)
    slower = 1 / sure.speedup - 1
    if sure.low <= 1.0 <= sure.high or abs(slower) < LEAST:
        return ""
    return f"the kernel is {100 * abs(slower):.1f} % {'slower' if slower > 0 else 'faster'} than in the base"


def _urgency(row: Row) -> tuple[int, float]:
    order = [Verdict.WRONG, Verdict.SUSPICIOUS, Verdict.FAIL, Verdict.NOT_EVALUATED, Verdict.INCONCLUSIVE]
    rank = order.index(row.result.verdict) if row.result.verdict in order else len(order)
    return rank, row.change.speedup.log if row.change else math.inf


def _speedup(found: Result) -> str:
    seen = found.interval
    if seen is None:
        return found.id
    high = "inf" if math.isinf(seen.high) else f"{seen.high:.2f}"
    return f"{found.id}, {seen.speedup:.2f}x [{seen.low:.2f}, {high}] with a floor of {found.floor:.2f}x"


def _base_words(base: Run | None) -> str:
    if base is None:
        return ""
    commit = (base.machine.get("commit") or "no commit")[:10] + ("+changes" if base.machine.get("dirty") else "")
    return f"{commit} of {base.machine['time'][:10]}"


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
