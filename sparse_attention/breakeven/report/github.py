"""What GitHub Actions reads: workflow commands on standard output, and the summary of the job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ..verdict import Verdict
from .content import Report
from .rows import axis, cells

_LEVELS = {
    **dict.fromkeys((Verdict.FAIL, Verdict.WRONG, Verdict.SUSPICIOUS), "error"),
    **dict.fromkeys((Verdict.NOT_EVALUATED, Verdict.INCONCLUSIVE), "warning"),
}
_MOST_OF_A_LEVEL = 10  # GitHub shows no more of a step


def annotations(report: Report, file: str = "") -> Iterator[str]:
    """A workflow command for each case that did not pass; `file` is where the cases are defined."""
    rows = [row for row in report.changed if row.result.verdict in _LEVELS and not row.unjudged]
    shown = dict.fromkeys(_LEVELS.values(), 0)
    for row, found in zip(rows, cells(rows, axis(rows))):
        level = _LEVELS[row.result.verdict]
        shown[level] += 1
        if shown[level] <= _MOST_OF_A_LEVEL:
            title = f"{found.verdict}: {found.id}"
            message = "; ".join([f"{found.speedup} with a floor of {found.floor}", *found.remarks])
            place = f"file={_property(file)}," if file else ""
            yield f"::{level} {place}title={_property(title)}::{_data(message)}"


def summarise(markdown: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Append to the job's summary; False outside GitHub Actions."""
    path = environment.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    with open(path, "a") as f:
        f.write(markdown + "\n")
    return True


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
