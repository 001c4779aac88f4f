"""The commands `study` and `calibrate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from . import machine, study_table
from .case import load_list, select
from .crossing import Family
from .progress import Progress, Silent, duration
from .race import Settings
from .store import Run, write_json
from .study import POLICY, Published, Study, as_dict
from .verdict import ExitCode, Sequential, Verdict


def add_commands(command: Callable, seconds: Callable, positive: Callable, fraction: Callable) -> None:
    """Add both to the command line, through its `command(name, function, parents, text)` and its types."""
    study = command("study", _study, [], "find break-even lengths and densities by bisection, each with an interval")
    study.add_argument("--table", default="perf.study", help="module with FAMILIES and, if it has one, PUBLISHED")
    study.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="shell pattern on ids and tags")
    study.add_argument("--sizes", choices=("default", "full"), default="default", help="full: also the families tagged so")
    study.add_argument("--budget", type=seconds, default=180.0, metavar="TIME", help="such as 60s or 5m")
    study.add_argument("--threads", type=positive, default=1)
    study.add_argument("--device", default="cpu", help="cpu, cuda, cuda-graph or the module:Class of a clock")
    study.add_argument("--alpha", type=fraction, default=POLICY.alpha, help="error probability of calling a size, on each side")
    study.add_argument("--json", metavar="FILE", help="write everything here, after every round")
    study.add_argument("--resume", metavar="FILE", help="go on from a study that was cut short")
    study.add_argument("--dry-run", action="store_true", help="say what would be measured")
    study.add_argument("--quiet", action="store_true", help="no progress")
    calibrate = command("calibrate", _calibrate, [], "measure this machine for attention(impl='auto'): rates and break-even lengths")
    calibrate.add_argument("--budget", type=seconds, default=120.0, metavar="TIME", help="such as 60s or 5m")
    calibrate.add_argument("--out", metavar="FILE", help="write here instead of to the user's cache folder")
    calibrate.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="break-even lengths of these pattern/dtype/head_dim only")
    calibrate.add_argument("--json", metavar="FILE", help="write everything here, after every block; at the end what dispatch changes, too")
    calibrate.add_argument("--resume", metavar="FILE", help="go on from a calibration that was cut short")
    calibrate.add_argument("--device", default="cpu", help="cpu, or the module:Class of a clock")
    calibrate.add_argument("--dry-run", action="store_true", help="say what would be measured, and where it would go")
    calibrate.add_argument("--quiet", action="store_true", help="no progress")


def _study(options) -> int:
    families, published = _declared(options)
    settings = Settings(options.budget, options.threads, Sequential(POLICY.looks, options.alpha), options.device)
    if options.dry_run:
        print(f"{duration(settings.budget_s)} at most, {settings.threads} threads, on {machine.machine_class(settings.device)}:")
        for family in families:
            print(f"  {family.id}: {len(family.sizes)} sizes, {family.sizes[0]:g} to {family.sizes[-1]:g}")
        for row in published:
            print(f"  {row.id}: {', '.join(case.id for case in row.cases)}")
        return ExitCode.OK
    path = options.json or options.resume
    resume = Run.load(options.resume) if options.resume else None
    progress = Silent() if options.quiet else Progress()

    def save(run):
        if path:
            run.save(path)

    study = Study(families, settings, progress, save, resume, published)
    study.execute()
    progress.done()
    if path:
        _append(path, as_dict(study))
    crossings, rows = study.crossings(), study.results()
    print(study_table.headline(study))
    if crossings:
        print(study_table.text(crossings))
    if rows:
        print(study_table.published_text(rows))
    verdicts = [probe.verdict for found in crossings for probe in found.probes]
    verdicts += [found.verdict for _, results in rows for found in results]
    if {Verdict.WRONG, Verdict.SUSPICIOUS} & set(verdicts):
        return ExitCode.WRONG
    return ExitCode.OK if {Verdict.PASS, Verdict.FAIL} & set(verdicts) else ExitCode.NOT_EVALUATED


def _declared(options) -> tuple[list[Family], list[Published]]:
    """The families and published rows that the options select; NothingToCheck for a pattern that matches nothing."""
    families = load_list(options.table, "FAMILIES")
    chosen = select([*families, *getattr(sys.modules[options.table], "PUBLISHED", ())], options.cases, options.sizes)
    return [one for one in chosen if isinstance(one, Family)], [one for one in chosen if isinstance(one, Published)]


def _calibrate(options) -> int:
    from sparse_attention import _build, calibration, calibration_store, rates

    name = machine.machine_class(options.device)
    path = Path(options.out) if options.out else rates.user_folder() / rates.file_name(name)
    wanted = calibration.families(options.cases)
    if options.dry_run:
        print(f"about {duration(options.budget)}, on 1 and {machine.cores()} threads of {name}, into {path}:")
        print(f"  rates of {len(calibration.calls())} calls of each engine for {', '.join(calibration.DTYPES)}")
        for pattern, dtype, head_dim in wanted:
            print(f"  break-even length of {pattern}, {dtype}, head_dim {head_dim}")
        return ExitCode.OK
    progress = Silent() if options.quiet else Progress()
    before = rates.table(options.device)
    partial = options.json or options.resume
    resume = calibration_store.load_runs(options.resume) if options.resume else {}
    runs = {}

    def save(found):
        runs.update(found)
        if partial:
            write_json(partial, calibration_store.stored(runs))

    try:
        _build.library()
        data = calibration.calibrate(options.budget, progress, options.device, wanted, save, resume)
    except calibration.TooDisturbed as error:
        print(f"breakeven: nothing written: {error}", file=sys.stderr)
        return ExitCode.NOT_EVALUATED
    except RuntimeError as error:
        print(f"breakeven: nothing written: {error}", file=sys.stderr)
        return ExitCode.WRONG
    progress.done()
    kept = calibration_store.keep_others(data, path if path.exists() else Path(before.source), wanted) if options.cases else 0
    after = calibration_store.write(data, path)
    print(calibration.report(data))
    if kept:
        print(f"{kept} of these break-even lengths were not measured now but taken over")
    print(f"\nwritten to {path}; before, dispatch read: {before.source}")
    changed = calibration.changes(before, after)
    print("\n".join(changed) if changed else "dispatch chooses as before at the sizes that were measured")
    if partial:
        told = {"path": str(path), "table": data, "before": before.source, "changes": changed}
        write_json(partial, {**calibration_store.stored(runs), **told})
    return ExitCode.OK


def _append(path: str, fields: dict) -> None:
    """Add fields to a stored run."""
    with open(path) as f:
        data = json.load(f)
    write_json(path, {**data, **fields})
