"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import resources

from ..power import Power
from . import figures
from .content import Report
from .figures import Picture
from .rows import axis, cells


@dataclass
class Section:
    title: str
    about: str
    pictures: list[Picture] = field(default_factory=list)
    folded: list[Picture] = field(default_factory=list)
    folded_title: str = ""


def page(report: Report) -> str:
    """The whole document."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("an HTML report needs jinja2 and matplotlib: pip install 'sparse_attention[perf]'") from error
    folder = resources.files(__package__)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    shown = [report, report.against] if report.against else [report]
    shared = axis([row for part in shown for row in (*part.changed, *part.unchanged)])
    return environment.from_string((folder / "page.html").read_text()).render(
        report=report,
        axis=shared,
        cells=cells,
        style=(folder / "page.css").read_text(),
        measured=report.run.machine["time"].replace("T", " ").replace("Z", " UTC"),
        sections=[section for section in sections(report) if section.pictures or section.folded],
    )


def sections(report: Report) -> list[Section]:
    stepped = [s for s in report.series if s.steps]
    steady = [s for s in report.series if not s.steps]
    return [
        Section(
            "Where it breaks even",
            "Speedup over the baseline, with 95 % intervals. The line at 1x is break-even; in the shaded range the two cannot be "
            "told apart.",
            _drawn("curve", figures.curve, report.curves),
        ),
        Section(
            "Work done in the time",
            "Useful FLOP/s of the candidate (filled) and, for the same useful work, of the baseline (hollow): the distance is the "
            "speedup. In grey, the best matrix product and copy that this run saw.",
            _drawn("roofline", figures.roofline, report.rooflines),
        ),
        Section(
            "History",
            "Speedup of each stored run of this machine class, with 95 % intervals, in the order of commits.",
            _drawn("step", figures.history, stepped),
            _drawn("steady", figures.history, steady),
            f"{len(steady)} cases without a step" if len(steady) != 1 else "1 case without a step",
        ),
        Section(
            "What this gate finds",
            "Share of gates that found a slowdown of known size, with 95 % intervals. What is found at 0 % is a false alarm.",
            _drawn("power", figures.power, [part for power in report.history.powers for part in _parts(power)]),
        ),
    ]


def _drawn(key: str, draw: Callable[..., Picture], what: Iterable) -> list[Picture]:
    return [draw(item, f"{key}{number}") for number, item in enumerate(what)]


def _parts(power: Power) -> list[Power]:
    """The same with as many curves each as one picture holds."""
    names = list(power.curves())
    chunks = [names[n : n + figures.MOST_CURVES] for n in range(0, len(names), figures.MOST_CURVES)]
    return [replace(power, points=tuple(p for p in power.points if p.curve in chunk)) for chunk in chunks]
