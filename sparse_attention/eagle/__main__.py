"""python -m sparse_attention.eagle: doctor, bench, test."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from sparse_attention._build import BuildError
from sparse_attention.eagle import bench, bench_model, bench_operations, doctor
from sparse_attention.eagle.small_model import EaModel

WRONG, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for what is broken or differs, 2 for what cannot be run."""
    options = _parser().parse_args(arguments)
    before = torch.get_num_threads()
    if options.threads or getattr(options, "base_model", None) is None:
        torch.set_num_threads(options.threads or 1)
    try:
        _check_device(options.device)
        return options.command(options)
    except (ValueError, OSError, ImportError, BuildError) as error:
        print(f"eagle: {error}", file=sys.stderr)
        return USAGE
    finally:
        torch.set_num_threads(before)


def _check_device(name: str) -> None:
    here = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else ["cpu"]
    if name not in here:
        raise ValueError(f"--device is {name!r}; expected {' or '.join(here)}")


def _doctor(options) -> int:
    if options.base_model is None and options.draft_model is None:
        model, name = EaModel(), "the small model"
    else:
        model, _, name = bench_model.load(options)
    found = doctor.report(model, name)
    print(doctor.text(found))
    _write(options.json, found)
    return 0 if doctor.healthy(found) else WRONG


def _bench(options) -> int:
    loaded = bench_model.load(options)
    settings = {"iterations": options.iterations, "warmup": options.warmup, "max_tokens": options.max_tokens}
    result = bench.run(loaded, temperature=options.temperature, **settings)
    result["environment"] = doctor.environment()
    print(f"{loaded.name}, {options.dtype} on {options.device}, {len(loaded.prompts)} prompts")
    print(bench.table(result))
    _write(options.json, result)
    return WRONG if result["divergence"] and options.dtype == "float32" else 0


def _test(options) -> int:
    found = []
    if options.detailed_report:
        print(bench_operations.HEADER)
    for row in bench_operations.rows(options.batch, options.nodes, options.vocab, options.k, options.device):
        found.append(row)
        if options.detailed_report or not row.equal:
            print(row.text(), flush=True)
    differing = sum(not row.equal for row in found)
    operations = ", ".join(dict.fromkeys(row.operation for row in found))
    print(f"{len(found) - differing} of {len(found)} checks equal their reference: {operations}")
    _write(options.json, [row._asdict() for row in found])
    return WRONG if differing else 0


def _write(path: str | None, value: object) -> None:
    if path:
        with open(path, "w") as f:
            json.dump(value, f, indent=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparse_attention.eagle", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what)
        made.set_defaults(command=run)
        made.add_argument("--json", metavar="FILE", help="write everything to this file")
        made.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        made.add_argument("--threads", type=_positive, help="of PyTorch (default: 1, and for a checkpoint as PyTorch chooses)")
        return made

    examined = command("doctor", _doctor, "environment, versions, engines, and what optimize_eagle would patch")
    timed = command("bench", _bench, "end to end: EAGLE as it is against EAGLE patched, interleaved")
    for made in (examined, timed):
        made.add_argument("--base-model", metavar="PATH", help="the base, read by an installed EAGLE (default: a small model)")
        made.add_argument("--draft-model", metavar="PATH", help="checkpoint of its draft")
        made.add_argument("--prompt", action="append", metavar="TEXT", help="may be given more than once")
        made.add_argument("--total-token", type=_positive, help="nodes of the tree")
        made.add_argument("--depth", type=_positive, help="levels of drafting after the first")
        made.add_argument("--top-k", type=_positive, help="candidates of a node")
        made.add_argument("--vocab", type=_positive, default=32000, help="tokens of the small model (default: 32000)")
        made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    timed.add_argument("--iterations", type=_positive, default=10, help="timed passes of each variant (default: 10)")
    timed.add_argument("--warmup", type=_count, default=2, help="passes before them (default: 2)")
    timed.add_argument("--max-tokens", type=_positive, default=50, help="new tokens of a prompt (default: 50)")
    timed.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    tested = command("test", _test, "check every operation against its reference")
    tested.add_argument("--detailed-report", action="store_true", help="print every check with the times of both")
    for name, sizes in (("batch", (1, 4)), ("nodes", (26, 60)), ("vocab", (1000, 32000)), ("k", (5, 10))):
        shown = " ".join(map(str, sizes))
        tested.add_argument(f"--{name}", type=_positive, nargs="+", default=sizes, metavar="N", help=f"default: {shown}")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
