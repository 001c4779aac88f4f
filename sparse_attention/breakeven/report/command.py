"""The commands `report`, `comment` and `publish`."""

from __future__ import annotations

import argparse
import os
import webbrowser
from collections.abc import Callable
from pathlib import Path

from .. import publish
from ..store import Run, write_json
from ..verdict import ExitCode
from . import sticky


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them; `command` adds one of name, function, parents and text."""
    report = command("report", _report, [], "one HTML file, and markdown for a pull request, about a stored run")
    report.add_argument("run", metavar="RUN.json", help="a run stored by run, gate or study")
    report.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="shell pattern on ids and tags")
    report.add_argument("--json", metavar="FILE", help="the verdict, and each case's figures")
    report.add_argument("--history", metavar="DIR", help="stored runs of this machine class and power curves, at any depth")
    report.add_argument("--base", metavar="OLD.json", help="compare with this run; else with the last of another commit in DIR")
    report.add_argument("--against", metavar="RUN.json", help="a run of `gate --base`: the same cases against a base revision")
    report.add_argument("--study", action="append", default=[], metavar="FILE", help="draw the curves of this stored study too")
    report.add_argument("--power", action="append", default=[], metavar="FILE", help="draw these power curves too")
    report.add_argument("--html", metavar="FILE")
    report.add_argument("--md", metavar="FILE", help="text for a pull request")
    report.add_argument("--link", default="", metavar="URL", help="where the HTML can be had, for the markdown")
    report.add_argument("--open", action="store_true", help="show the HTML in a browser")
    report.add_argument("--github", action="store_true", help="annotate, and append to the summary of the job")

    posting = command("comment", _comment, [], "post a report on its pull request, or update what was posted; needs gh")
    posting.add_argument("folder", metavar="DIR", help=f"holds {sticky.FILE}; where it does not, the comment says so")
    posting.add_argument("--head", required=True, metavar="SHA", help="head commit of the pull request")
    posting.add_argument("--repository", default=os.environ.get("GITHUB_REPOSITORY", ""), metavar="OWNER/NAME")
    posting.add_argument("--link", default="", metavar="URL", help="the run of the workflow that measured")
    posting.add_argument("--dry-run", action="store_true", help="show the comment")

    sharing = command("publish", _publish, [], "share results through a branch of the repository that holds nothing else")
    sharing.add_argument("runs", nargs="*", metavar="RUN.json", help="store these runs by machine class first")
    sharing.add_argument("--results", default=publish.FOLDER, metavar="DIR", help="where results are kept")
    sharing.add_argument("--branch", default=publish.BRANCH, metavar="NAME")
    sharing.add_argument("--remote", default="origin", metavar="NAME")
    sharing.add_argument("--pull", action="store_true", help="only bring what is missing here; push nothing")


def _report(options) -> int:
    from . import github, html, markdown

    report = _build(options)
    page_path = options.html or ("report.html" if options.open else None)
    if page_path:
        Path(page_path).write_text(html.page(report), encoding="utf-8")
    text = markdown.comment(report, options.link)
    if options.md:
        Path(options.md).write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, report.as_dict())
    if options.github:
        github.summarise(text)
        for part in filter(None, (report, report.against)):
            print(*github.annotations(part, _table_file(part.run.settings)), sep="\n")
    for part in filter(None, (report, report.against)):
        print(f"{part.verdict}: {part.sentence}")
    for path in filter(None, (page_path, options.md, options.json)):
        print(f"wrote {path}")
    for note in report.notes:
        print(note)
    if options.open:
        webbrowser.open(Path(page_path).resolve().as_uri())
    return ExitCode.OK


def _build(options):
    from ..power import Power
    from . import content
    from .curves import of_study
    from .history import History, read

    run = Run.load(options.run).only(options.cases)
    history = read(options.history, run.machine["class"]) if options.history else History()
    history.powers += [Power.load(path) for path in options.power]
    curves = [curve for path in options.study for curve in of_study(path)]
    if own := of_study(options.run):
        return content.of_study(run, [*own, *curves], history)
    found = content.build(run, Run.load(options.base) if options.base else None, history, curves)
    if options.against and not Path(options.against).exists():
        found.against = content.missing(run, f"the race against the base revision left no {options.against}")
    elif options.against:
        found.against = content.build(Run.load(options.against).only(options.cases))
        if not found.against.revision:
            raise ValueError(f"--against must be a run of `gate --base`, got {options.against!r}")
    return found


def _comment(options) -> int:
    body = sticky.text(Path(options.folder), options.link)
    if options.dry_run:
        print(body)
        return ExitCode.OK
    if options.repository.count("/") != 1:
        raise ValueError(f"--repository must be owner/name, got {options.repository!r}")
    print(sticky.post(options.repository, options.head, body))
    return ExitCode.OK


def _publish(options) -> int:
    for line in publish.run_command(options.runs, options.results, options.branch, options.remote, options.pull):
        print(line)
    return ExitCode.OK


def _table_file(settings) -> str:
    module = settings.get("table", "").partition(":")[0]
    return module.replace(".", "/") + ".py" if module else ""
