"""Stored runs as asv results, so that one dashboard shows machines that have no asv beside those that do.

A run becomes MACHINE/COMMIT-ENVIRONMENT.json below asv's results_dir, where

* MACHINE is the machine class with dashes, `cpu-zen4-2c` for `cpu/zen4/2c`, and names the clock where it is not the usual one
  of the device: `cuda-h100-graph`. `asv run --machine cpu-zen4-2c` measures beside it;
* ENVIRONMENT is a name of the run's own (its time, device and threads), so no result replaces that of another run or of asv;
* asv's parameters and, for a CPU, the variable of the threads are those that `asv run` would write with the same
  asv.conf.json, so both are one curve; asv shows the mean of several results of a commit. Other thread counts are other curves.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .asv_project import Project
from .case import Case, NothingToCheck, load_list, select
from .crossing import Family
from .store import Run
from .tracked import THREADS, Figure, Tracked, for_asv, known, of_cases, of_study
from .verdict import ExitCode


TABLES = {"BreakEven": "perf.cases:CASES", "GpuBreakEven": "perf.cuda_cases:CASES"}  # by the class of asv's benchmarks


class Refused(ValueError):
    """This run cannot be a result of asv."""


@dataclass(frozen=True)
class Source:
    """A stored run or study."""

    path: Path
    run: Run
    crossings: tuple[Mapping[str, Any], ...] | None  # of a study

    @classmethod
    def read(cls, path: Path) -> Source:
        run = Run.load(path)
        found = json.loads(path.read_text()).get("crossings")
        return cls(path, run, None if found is None else tuple(found))

    def only(self, patterns: Iterable[str]) -> Source:
        """With the cases of a run, or the families of a study, that a shell pattern matches; NothingToCheck for none."""
        if self.crossings is None:
            return replace(self, run=self.run.only(patterns))
        families = [Case(found["family"], "a:family") for found in self.crossings]
        chosen = {family.id for family in select(families, patterns, "full")}
        return replace(self, crossings=tuple(found for found in self.crossings if found["family"] in chosen))


@dataclass
class Ingested:
    """What became of one run."""

    path: Path
    result: Any  # asv.results.Results
    machine: dict[str, Any]
    file: str  # below results_dir
    tracked: Tracked
    notes: list[str] = field(default_factory=list)
    outcome: str = ""  # new, changed or unchanged

    def as_dict(self) -> dict[str, Any]:
        tracked = {name: sorted(entries) for name, entries in self.tracked.items()}
        return {
            "run": str(self.path),
            "machine": self.machine["machine"],
            "commit": self.result.commit_hash,
            "file": self.file,
            "outcome": self.outcome,
            "tracked": tracked,
            "notes": self.notes,
        }


def collect(paths: Iterable[str | os.PathLike]) -> dict[Path, bool]:
    """The stored runs of files and, at any depth, of folders; True for those that were named one by one.

    In a folder, files that are no stored run, such as asv's own, are passed over.
    """
    found: dict[Path, bool] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for inside in sorted(filter(_is_run, path.rglob("*.json"))):
                found.setdefault(inside.resolve(), False)
        else:
            found[path.resolve()] = True
    return found


def convert(
    source: Source, project: Project, tables: Mapping[str, Sequence[Case]], families: Sequence[Family], commit: str | None = None
) -> Ingested:
    """The run as asv's results, not yet written; Refused with the reason where it cannot be one.

    Of `tables`, by the class of asv's benchmarks, the one that knows most of its cases is taken for the run's, and of equals the
    one of its device. `commit` stands in where the run names none, or was measured on a changed tree.
    """
    run = source.run
    hash = _commit(run, project, commit)
    if run.settings.get("base"):
        raise Refused(f"it raced revision {run.settings['base'][:10]}, not the baselines that asv tracks")
    if source.crossings is None:
        on_gpu = run.settings["device"].startswith("cuda")
        kind = max(tables, key=lambda name: (len(known(run, tables[name])), name.startswith("Gpu") == on_gpu))
        prefix, (tracked, notes) = f"{kind}.track_", of_cases(run, tables[kind])
    else:
        prefix, (tracked, notes) = "Crossings.track_", of_study(run, source.crossings, families)
    if not tracked:
        raise Refused("; ".join(["it has nothing to track", *notes]))
    if not project.on_branch(hash):
        notes.append(f"{hash[:8]} is not on {' or '.join(project.branches)}: asv publish leaves it out")
    settings = run.settings
    kind = [] if source.crossings is None else ["study"]
    time = re.sub(r"\W", "", run.machine["time"])
    environment = "-".join(["ingested", time, _plain(settings["device"]), f"{settings['threads']}t", *kind])
    threads = {} if run.machine["class"].startswith("cuda/") else {THREADS: str(settings["threads"])}
    machine = project.machine(machine_name(run.machine["class"], settings["device"]))
    python = ".".join(run.machine["python"].split(".")[:2])
    result = project.results(machine, python, run.machine["versions"], hash, environment, threads)
    started = datetime.fromisoformat(run.machine["time"].replace("Z", "+00:00"))
    for name, entries in tracked.items():
        _add(result, project.benchmark(prefix + name), entries, started)
    return Ingested(source.path, result, machine, project.file(machine, hash, environment), tracked, notes)


def machine_name(machine_class: str, device: str = "cpu") -> str:
    """What `asv run --machine` is told on a machine of this class."""
    name = machine_class.replace("/", "-")
    return name if device in ("cpu", "cuda") else f"{name}-{_plain(device.removeprefix('cuda-'))}"


def write(found: Sequence[Ingested], project: Project) -> None:
    """Write all of it or, should that fail, nothing; fills in each `outcome`. Writing a run again changes nothing."""
    project.results_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=project.results_dir, prefix=".ingest-") as staging:
        for entry in found:
            entry.result.save(staging)
            project.save_machine(entry.machine, staging)
            entry.outcome = _outcome(Path(staging, entry.file), project.results_dir / entry.file)
        project.save_benchmarks(staging)
        for path in sorted(Path(staging).rglob("*.json")):
            target = project.results_dir / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _outcome(new: Path, old: Path) -> str:
    if not old.exists():
        return "new"
    return "unchanged" if new.read_bytes() == old.read_bytes() else "changed"


def _commit(run: Run, project: Project, given: str | None) -> str:
    name, dirty = run.machine.get("commit"), run.machine.get("dirty")
    if given is None and not name:
        raise Refused("it names no commit: --commit REV says which one was measured")
    if given is None and dirty:
        raise Refused(f"it was measured on {name[:10]} with changes: --commit REV says which commit that became")
    hash = project.resolve(given or name)
    if hash is None:
        raise Refused(f"git knows no commit {given or name} in {project.root}: fetch it first")
    return hash


def _add(result: Any, benchmark: Mapping[str, Any], entries: Mapping[str, Figure], started: datetime) -> None:
    """Add what `asv run` would have added had the benchmark returned these figures."""
    from asv.runner import BenchmarkResult

    values = [for_asv(entries.get(name)) for name in _ids(benchmark)]
    samples = [value["samples"] if isinstance(value, dict) else None for value in values]
    numbers = [1 if found else None for found in samples]
    plain = [math.inf if isinstance(value, dict) else value for value in values]  # asv replaces what has samples by their median
    outcome = BenchmarkResult(plain, samples, numbers, 0, "", None)
    result.add_result(benchmark, outcome, started_at=started, record_samples=True)


def _ids(benchmark: Mapping[str, Any]) -> list[str]:
    """The values of a benchmark's one parameter; asv keeps their repr."""
    return [ast.literal_eval(text) for text in benchmark["params"][0]]


def _is_run(path: Path) -> bool:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"schema", "machine", "cases"} <= data.keys()


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)



def add_command(command: Callable[..., Any]) -> None:
    """Add it with `command(name, function, parents, text)`."""
    ingest = command("ingest", _ingest, [], "turn stored runs and studies into asv results, for its dashboard")
    ingest.add_argument("runs", nargs="+", metavar="RUN.json", help="stored runs or studies, or folders of them")
    ingest.add_argument("--config", default="asv.conf.json", metavar="FILE", help="asv's configuration")
    ingest.add_argument("--results", metavar="DIR", help="default: results_dir of the configuration")
    ingest.add_argument("--table", help=f"module:name of the list of cases; default: of {' and '.join(TABLES.values())} the run's")
    ingest.add_argument("--families", default="perf.study:FAMILIES", help="module:name of the families of studies")
    ingest.add_argument("--commit", metavar="REV", help="what was measured, for one run that names no commit or a changed one")
    ingest.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="these cases, or families of a study, only")
    ingest.add_argument("--json", metavar="FILE", help="write here what became of each run")
    ingest.add_argument("--dry-run", action="store_true", help="say what would be written")


def _ingest(options) -> int:
    project = Project(options.config, options.results)
    paths = collect(options.runs)
    if options.commit and len(paths) != 1:
        raise ValueError(f"commit names what one run measured, got {options.commit!r} for {len(paths)} runs")
    tables = {"BreakEven": options.table} if options.table else TABLES
    tables = {kind: _table(name, project.root) for kind, name in tables.items()}
    families = _table(options.families, project.root)
    project.benchmarks  # found once, before any run is blamed
    found: list[Ingested] = []
    passed_over = {}
    for path, named in paths.items():
        try:
            found.append(convert(Source.read(path).only(options.cases), project, tables, families, options.commit))
        except NothingToCheck as error:
            passed_over[str(path)] = f"{path} was not ingested: {error}"
        except ValueError as error:
            reason = f"{path} was not ingested: {error}" if isinstance(error, Refused) else str(error)
            if named:
                raise ValueError(f"{reason}; nothing was written") from error
            passed_over[str(path)] = reason
    _require_one_each(found)
    if not options.dry_run and found:
        write(found, project)
    for entry in found:
        kind = "families" if "crossing" in entry.tracked else "cases"
        count = len({name for entries in entry.tracked.values() for name in entries})
        print(f"{entry.file}   {entry.outcome or 'not written'}, {count} {kind}", *entry.notes, sep="\n  ")
    print(*passed_over.values(), sep="\n", end="\n" * bool(passed_over))
    if options.json:
        report = {"results": [entry.as_dict() for entry in found], "passed_over": passed_over}
        Path(options.json).write_text(json.dumps(report, indent=1))
    if not found:
        raise NothingToCheck(f"no stored run in {', '.join(options.runs)} can be a result of asv")
    print(f"{len(found)} results in {project.results_dir}" + (" would be written" if options.dry_run else ""))
    return ExitCode.OK


def _require_one_each(found: Iterable[Ingested]) -> None:
    files: dict[str, Ingested] = {}
    for entry in found:
        other = files.setdefault(entry.file, entry)
        if other is not entry and other.tracked != entry.tracked:
            raise ValueError(f"{other.path} and {entry.path} would both be {entry.file}; nothing was written")


def _table(name: str, root: Path) -> Sequence[Any]:
    module, _, attribute = name.partition(":")
    return load_list(module, attribute, str(root))
