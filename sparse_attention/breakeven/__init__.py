"""A performance gate for anybody's kernel: is the candidate still faster than the baseline, and how sure is that?

Imports no kernel and, until something is measured, no torch. See docs/benchmarking.md.
"""

from .case import Case, Unavailable, Workload, select
from .race import Race, Settings
from .result import Result, results
from .store import Run
from .verdict import ExitCode, Sequential, TwoStage, Verdict

__all__ = [
    "Case",
    "ExitCode",
    "Race",
    "Result",
    "Run",
    "Sequential",
    "Settings",
    "TwoStage",
    "Unavailable",
    "Verdict",
    "Workload",
    "results",
    "select",
]
