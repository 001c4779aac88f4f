"""python -m sparse_attention.breakeven: list, run, gate, plan, regate, selftest, ratchet, report, comment."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from . import ingest, machine, proof_command, ratchet_command, selftest, study_command, table
from .case import Case, NothingToCheck, Unavailable, load_table, select
from .power import Power, PowerPoint
from .progress import Progress, Silent, duration
from .race import Race, Settings
from .report.command import add_commands as add_reporting
from .result import Result, counted, results
from .statistics import blocks_to_detect
from .store import Run
from .terms import add_options, terms
from .verdict import JUDGED, ExitCode, Policy, Sequential, TwoStage, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except NothingToCheck as error:
        print(f"breakeven: {error}", file=sys.stderr)
        return int(ExitCode.NOTHING_CHECKED)
    except Unavailable as error:
        print(f"breakeven: {error}", file=sys.stderr)
        return int(ExitCode.NOT_EVALUATED)
    except (ValueError, OSError, ImportError) as error:
        print(f"breakeven: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)


def _list(options) -> int:
    cases = _cases(options)
    if options.json:
        _write_json(options.json, [case.as_dict() for case in cases])
    for case in cases:
        against = f"limit {table.seconds(case.limit_s)}" if case.limit_s is not None else f"floor {case.floor:.3g}x"
        print(f"{case.id:<40} {against:<16} {' '.join(case.tags)}")
    return ExitCode.OK if cases else ExitCode.NOTHING_CHECKED


def _run(options) -> int:
    return _measured(options, gate=False)


def _gate(options) -> int:
    return _measured(options, gate=True)


def _measured(options, gate: bool) -> int:
    settings = _settings(options)
    against = terms(options, _cases(options), settings.threads, settings.device, options.table)
    cases, settings = against.cases, replace(settings, **against.settings)
    if options.dry_run:
        return _say(cases, settings)
    run = _race(cases, settings, options)
    found = results(run, settings.policy)
    print(table.headline(run, found))
    print(table.text(found, against.labels, options.memory))
    remarks = against.remarks(run, found)
    print(*remarks, sep="\n", end="\n" * bool(remarks))
    if options.markdown:
        parts = [table.headline(run, found), table.markdown(found, against.labels, options.memory), *remarks, table.tally(found)]
        with open(options.markdown, "a") as f:
            f.write("\n\n".join(parts) + "\n")
    code = against.exit_code(found, options.strict, options.allow_not_evaluated)
    if not gate and code is not ExitCode.WRONG and any(_has_figures(r, settings) for r in found):
        code = ExitCode.OK
    print(f"{table.tally(found)}   exit {int(code)} in {duration(run.elapsed_s)}")
    return code


def _has_figures(found: Result, settings: Settings) -> bool:
    """It was judged, or would have been on a machine class with floors."""
    return found.verdict in JUDGED or bool(settings.unjudged and found.reason == settings.unjudged)


def _plan(options) -> int:
    """How many blocks and minutes each case needs, from the noise of a stored or a fresh run."""
    settings = _settings(options)
    if options.run:
        run = Run.load(options.run)
    else:
        cases = _cases(options)
        if options.dry_run:
            return _say(cases, settings)
        run = _race(cases, settings, options)
    blocks_s = [e["ready_s"] + e["measured_s"] for e in run.evidence]
    block_s = sum(blocks_s) / max(len(blocks_s), 1)
    found = results(run, settings.policy)
    known = {r.id: r.interval.sd for r in found if r.interval is not None and r.interval.blocks > 1}
    needed = {name: blocks_to_detect(sd, options.detect, options.alpha) for name, sd in known.items()}
    for r in found:
        if r.id in known:
            print(f"{r.id:<40} block sd {100 * known[r.id]:4.1f} %   {needed[r.id] or 'more than 1000'} blocks")
        else:
            print(f"{r.id:<40} nothing measured: {r.reason}")
    if not known:
        return ExitCode.NOTHING_CHECKED
    whose = "any of these" if len(known) == len(found) else f"any of the {len(known)} of {len(found)} cases that were measured"
    most = None if None in needed.values() else max(needed.values())
    takes = f"{most} blocks of {block_s:.0f} s, {duration(most * block_s)} in all (minutes:seconds)" if most else "more than 1000 blocks"
    print(f"a slowdown of {options.detect:.1%} in {whose}, with 95 % power at alpha {options.alpha}: {takes}")
    if options.json and options.run:
        _write_json(options.json, {name: {"sd": sd, "blocks": needed[name], "block_s": block_s} for name, sd in known.items()})
    return ExitCode.OK if len(known) == len(found) else ExitCode.NOT_EVALUATED


def _say(cases: Sequence[Case], settings: Settings) -> int:
    print(f"{len(cases)} cases, at least {settings.policy.blocks} blocks, {settings.threads} threads,", end=" ")
    print(f"{duration(settings.budget_s)} at most, on {machine.machine_class(settings.device)}:")
    for case in cases:
        print(f"  {case.id}")
    return ExitCode.OK


def _regate(options) -> int:
    run = Run.load(options.run).only(options.cases)
    found = results(run, _policy(options))
    print(table.headline(run, found))
    print(table.text(found, memory=options.memory))
    if options.json:
        _write_json(options.json, {r.id: r.as_dict() for r in found})
    code = exit_code((r.verdict for r in counted(found)), options.strict, options.allow_not_evaluated)
    print(f"{table.tally(found)}   exit {int(code)}")
    return code


def _selftest(options) -> int:
    noises, progress = selftest.chosen(options.cases), Silent() if options.quiet else Progress()
    rates = selftest.operating_characteristics(
        _policy(options), runs=options.runs, seed=options.seed, noises=noises, tell=progress.status
    )
    progress.done()
    print(selftest.report(rates))
    if options.json:
        points = (PowerPoint.of(r.noise, r.slowdown, r.runs, r.fails) for r in rates)
        policy = _policy(options)
        Power(tuple(points), policy={"name": type(policy).__name__, **vars(policy)}).save(options.json)
    unsound = selftest.verdicts(rates)
    for line in unsound:
        print(line)
    print("unsound" if unsound else "sound")
    return ExitCode.WRONG if unsound else ExitCode.OK


def _race(cases: Sequence[Case], settings: Settings, options) -> Run:
    path = options.json or options.resume
    resume = Run.load(options.resume) if options.resume else None
    progress = Silent() if options.quiet else Progress()
    race = Race(cases, settings, progress, save=lambda run: run.save(path) if path else None, resume=resume)
    race.run.settings.setdefault("table", options.table)
    run = race.execute()
    progress.done()
    return run


def _cases(options) -> list[Case]:
    return select(load_table(options.table), options.cases, options.sizes)


def _settings(options) -> Settings:
    return Settings(
        budget_s=options.budget,
        threads=options.threads or machine.default_threads(options.device),
        policy=_policy(options),
        device=options.device,
        seed=options.seed,
    )


def _policy(options) -> Policy:
    if options.policy == "sequential":
        return Sequential(alpha=options.alpha)
    return TwoStage(second_alpha=options.alpha)


def _write_json(path: str, data) -> None:
    with open(path, "w") as f:
        json.dump(data, f, indent=1)


def seconds(text: str) -> float:
    """'90', '90s' or '1.5m' in seconds."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time such as 90, 90s or 1.5m, got {text!r}")
    return value


def fraction(text: str) -> float:
    """'5%' or '0.05', strictly between 0 and 1."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, got {text!r}")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparse_attention.breakeven", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    selecting = argparse.ArgumentParser(add_help=False)
    selecting.add_argument("--table", default="perf.cases:CASES", help="module:name of the list of cases")
    selecting.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="shell pattern on ids and tags")
    selecting.add_argument("--sizes", choices=("default", "full"), default="default", help="full: also the largest cases")
    selecting.add_argument("--json", metavar="FILE", help="write everything here; while measuring, after every block")

    judging = argparse.ArgumentParser(add_help=False)
    judging.add_argument("--policy", choices=("two-stage", "sequential"), default="two-stage")
    judging.add_argument("--alpha", type=fraction, default=0.01, help="error probability of the deciding look")
    judging.add_argument("--strict", action="store_true", help="exit 11 when a case is inconclusive")
    judging.add_argument("--allow-not-evaluated", action="store_true", help="do not exit 12 when one could not be judged")
    judging.add_argument("--seed", type=int, default=0)

    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument("--budget", type=seconds, default=Settings.budget_s, metavar="TIME", help="such as 60s or 5m")
    measuring.add_argument("--threads", type=positive, help="1 unless given; all cores beside a GPU")
    measuring.add_argument("--device", default="cpu", help="cpu, cuda, cuda-graph or the module:Class of a clock")
    measuring.add_argument("--resume", metavar="FILE", help="go on from a run that was cut short")
    measuring.add_argument("--dry-run", action="store_true", help="say what would be measured")
    measuring.add_argument("--markdown", metavar="FILE", help="append the table to this file")
    measuring.add_argument("--quiet", action="store_true", help="no progress")

    def command(name, function, parents, text):
        added = commands.add_parser(name, parents=parents, help=text, description=text)
        added.set_defaults(command=function)
        return added

    command("list", _list, [selecting], "list the cases")
    show = command("run", _run, [selecting, judging, measuring], "measure and show; verdicts do not change the exit code")
    gate = command("gate", _gate, [selecting, judging, measuring], "measure and judge; exit 10 for below break-even")
    for measured in (show, gate):
        add_options(measured.add_argument)
    plan = command("plan", _plan, [selecting, judging, measuring], "how many blocks and minutes a slowdown takes here")
    plan.add_argument("--detect", type=fraction, default=0.05, help="slowdown to find, such as 5%%")
    plan.add_argument("--run", metavar="FILE", help="take the noise from this stored run instead of measuring")
    regate = command("regate", _regate, [judging], "judge a stored run again, with other error rates")
    regate.add_argument("run", metavar="FILE")
    regate.add_argument("--cases", action="append", default=[], metavar="PATTERN")
    regate.add_argument("--json", metavar="FILE")
    for tabled in (show, gate, regate):
        tabled.add_argument("--memory", action="store_true", help="show each side's peak memory")
    check = command("selftest", _selftest, [judging], "the verdict code against noise whose truth is known")
    check.add_argument("--cases", action="append", default=[], metavar="PATTERN", help="shell pattern on kinds of noise")
    check.add_argument("--json", metavar="FILE", help="write the power curves, which `report` draws")
    check.add_argument("--quiet", action="store_true", help="no progress")
    check.add_argument("--runs", type=positive, default=400, help="simulated gates for each noise and slowdown")
    ratchet_command.add_command(command, [selecting], _cases, fraction)
    proof_command.add_command(command, seconds, positive)
    study_command.add_commands(command, seconds, positive, fraction)
    add_reporting(command)
    ingest.add_command(command)
    return parser


_DESCRIPTION = (
    "A performance gate with a known error rate. Exit codes: 0 ok, 1 wrong output, 2 usage, 10 below break-even, "
    "11 inconclusive (--strict), 12 not evaluated, 13 nothing was checked."
)
