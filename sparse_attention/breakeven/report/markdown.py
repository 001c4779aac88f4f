"""The report as markdown for a pull request: what changed is shown, the rest is folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .content import Report, Row
from .rows import Cells, axis, cells
from .sticky import MARK, MOST

_MOST_CHANGED = 30


def comment(report: Report, link: str = "") -> str:
    """`link` is where the whole report can be had."""
    worst = report.worst.verdict
    parts = [MARK, f"### Break-even: {_SIGNS[worst]} {worst}", *_gate(report)]
    if report.against:
        parts += [f"#### Against {report.against.opponent}: {_SIGNS[report.against.verdict]} {report.against.verdict}"]
        parts += _gate(report.against)
    steps = [f"- `{s.id}`: {step.words}" for s in report.series for step in s.steps]
    if steps:
        parts.append(_folded(f"{len(steps)} step{'s' * (len(steps) > 1)} in the history", "\n".join(steps)))
    crossings = [f"- {_plain(c.title)}, {c.axis}: {_plain(c.words)}" for c in report.curves]
    if crossings:
        parts.append(_folded("Where it breaks even", "\n".join(crossings)))
    facts = [report.machine, f"noise: {report.noise}"] + ([f"compared with {report.base}"] if report.base else [])
    parts.append(f"<sub>{_plain(' · '.join(facts))}</sub>")
    parts += [f"<sub>{_plain(note)}</sub>" for note in report.notes]
    parts += [f"[The whole report]({link})"] if link else []
    return _cut(parts)


def _gate(report: Report) -> list[str]:
    """Verdict, changed cases, and the rest folded."""
    parts = [f"{report.sentence[:1].upper()}{report.sentence[1:]}."]
    changed = report.changed[:_MOST_CHANGED]
    if changed:
        parts.append(_table(changed, report.labels))
        parts += [f"{len(report.changed) - len(changed)} more are in the report."] if len(changed) < len(report.changed) else []
    elif report.base:
        parts.append("No case changed.")
    if report.unchanged:
        parts.append(_folded(report.rest, _table(report.unchanged, report.labels)))
    if report.command:
        parts.append(_folded("Measure again", f"```\n{report.command}\n```"))
    return parts


_SIGNS = {
    "PASS": "✅",
    "FAIL": "❌",
    "WRONG": "❌",
    "NOTHING CHECKED": "❌",
    "NOT EVALUATED": "⚠️",
    "INCONCLUSIVE": "⚠️",
    "NOT JUDGED": "ℹ️",
    "STUDY": "ℹ️",
}


def _table(rows: Sequence[Row], labels: tuple[str, str]) -> str:
    header = ["case", "speedup [interval]", "floor", "detects", f"{labels[0]}, {labels[1]}", "peak memory", "verdict"]
    rule = [":--", "--:", "--:", "--:", "--:", "--:", ":--"]
    lines = [_line(header), _line(rule)]
    for c in cells(rows, axis(rows)):
        lines.append(_line([_name(c), c.speedup, c.floor, c.detects, c.times, c.memory, c.verdict]))
    return "\n".join(lines)


def _name(found: Cells) -> str:
    return "<br>".join([f"`{found.id}`", *(f"<sub>{_plain(line)}</sub>" for line in found.remarks)])


def _line(words: Iterable[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _plain(text: str) -> str:
    """Free text, such as an error message, without effect on the markup around it."""
    for character, harmless in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "'", "@": "@\u200b"}.items():
        text = text.replace(character, harmless)
    return " ".join(text.split())


def _cut(parts: list[str]) -> str:
    """Whole parts only, folded ones dropped first where it would be too long for a comment."""
    while sum(len(part) + 2 for part in parts) > MOST:
        longest = max((p for p in parts if p.startswith("<details>")), key=len, default=max(parts, key=len))
        parts[parts.index(longest)] = "_Left out here for its length; it is in the report._"
    return "\n\n".join(parts) + "\n"
