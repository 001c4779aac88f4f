"""Writes results into the pages from stored runs and studies: python docs/fill_results.py RUN.json STUDY.json

`pytest perf --breakeven-json RUN.json` stores a run, for README.md and docs/results.md, or, of a GPU, for the part of docs/results.md
that is about GPUs; `study --json STUDY.json` of
`python -m sparse_attention.breakeven` a study, for docs/break_even.md.
"""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from sparse_attention.breakeven import table
from sparse_attention.breakeven.report.curves import of_study
from sparse_attention.breakeven.result import Result, results
from sparse_attention.breakeven.store import Run
from sparse_attention.breakeven.study_table import curve
from sparse_attention.breakeven.verdict import Policy, Sequential, TwoStage

DOCS = Path(__file__).resolve().parent
SEEDS_128K = {
    "Dense, causal": "causal/128k/of-dense",
    "Sliding window, 4096": "window4096/128k/of-dense",
    "Block-sparse, BigBird(64)": "bigbird/128k/of-dense",
    "Dilated, 1024 x 4": "dilated1024x4/128k/of-dense",
}
README_CASES = ("*/16k", "*/16k/backward", "*/16k/of-*", "window256/*")


def fill(page: Path, body: str, name: str = "") -> None:
    """Replace what stands between the two markers of a page; `name` is the markers', the page's own unless given."""
    text, name = page.read_text(), name or page.stem
    marked = re.compile(rf"(<!-- results of {re.escape(name)}: [^\n]*? -->\n).*?(<!-- end of results -->)", re.DOTALL)
    if len(marked.findall(text)) != 1:
        raise ValueError(f"{page} has no place for results between '<!-- results of {name}: ... -->' and its end")
    page.write_text(marked.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text))


def machine_table(run: Run) -> str:
    """What a reader needs beside a number."""
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    commit = (machine["commit"] or "none") + (", with uncommitted changes" if machine["dirty"] else "")
    share = table.clean_share(run)
    gpu = machine.get("gpu") or {}
    facts = {
        "machine class": machine["class"],
        **({"device": _gpu(gpu), "driver": f"{gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"} if gpu else {}),
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "memory": f"{(machine['memory_bytes'] or 0) / 2**30:.0f} GiB",
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": versions,
        "threads": run.settings["threads"],
        "commit": commit,
        "time": machine["time"],
        "took": f"{run.elapsed_s:.0f} s",
        "undisturbed pairs": "none" if share is None else f"{100 * share:.0f} %",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _gpu(gpu: dict) -> str:
    return f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['multiprocessors']} multiprocessors"


def seeds_table(run: Run, found: list[Result]) -> str:
    """The table that the project began with: what of all pairs a pattern leaves out at 128K, and what that gains over dense attention."""
    by_id = {r.id: r for r in found}
    rows = []
    for name, case in SEEDS_128K.items():
        r = by_id.get(case)
        if r is None or r.interval is None:
            rows.append(f"| {name} | 128K | - | - | - | {r.verdict.value if r else 'not measured'} |")
            continue
        work, speedup = run.records[case].scout["work"], f"{r.interval.speedup:.3g}x [{r.interval.low:.3g}, {r.interval.high:.3g}]"
        share = 1 - work["pairs"] / work["dense_pairs"]
        rows.append(f"| {name} | 128K | {100 * share:.4g} % | {table.seconds(r.baseline_s)} | {table.seconds(r.candidate_s)} | {speedup} |")
    header = ["| Pattern | Context length | Sparsity | PyTorch | Custom CUDA | Speedup |", "|---|--:|--:|--:|--:|--:|"]
    return "\n".join(header + rows)


def rivals_table(run: Run) -> str:
    """What the scout saw of every way to compute the same, one cold call or a few: how the baselines were chosen."""
    rows = {}
    for record in run.records.values():
        times, absent = (record.scout.get(name) or {} for name in ("baselines", "baselines_absent"))
        if len(times) + len(absent) > 1:
            ways = [f"{name} {table.seconds(times[name])}" for name in sorted(times, key=times.get)] + [f"{name} does not run" for name in absent]
            rows.setdefault(record.case.share or record.case.id, f"| {record.case.id} | {', '.join(ways)} |")
    return "\n".join(["| case | rivals |", "|---|---|", *rows.values()]) if rows else ""


def gpu_page(run: Run) -> str:
    """What stands between the markers of the part about GPUs."""
    found = results(run, policy_of(run))
    parts = [machine_table(run), "Dense attention at 128K, and what a pattern gains over it:", seeds_table(run, found)]
    parts += [table.markdown(found), f"{table.tally(found)}.", reasons(found)]
    if rivals := rivals_table(run):
        parts += ["The rivals of which the fastest was raced, as the scout saw them:", rivals]
    if memory := memory_table(found):
        parts += ["Peak memory of one call, its output included, above what was in use before:", memory]
    return "\n" + "\n\n".join(filter(None, parts)) + "\n"


def memory_table(found: list[Result]) -> str:
    """Peak memory of a call above what was in use before it, where it was measured."""
    rows = [
        f"| {r.id} | {table.mebibytes(r.baseline_peak_bytes)} | {table.mebibytes(r.candidate_peak_bytes)} |"
        for r in found
        if r.candidate_peak_bytes is not None
    ]
    return "\n".join(["| case | dense | sparse |", "|---|--:|--:|", *rows]) if rows else ""


def reasons(found: list[Result]) -> str:
    return "\n".join(f"* `{r.id}`: {r.verdict.value}: {r.reason}" for r in found if r.reason and r.verdict.value != "PASS")


def policy_of(run: Run) -> Policy:
    """The policy that the run was judged by."""
    stored = dict(run.settings["policy"])
    kind = {"TwoStage": TwoStage, "Sequential": Sequential}[stored.pop("name")]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})


def pages(run: Run) -> dict[Path, str]:
    """What stands between the markers of each page."""
    found = results(run, policy_of(run))
    chosen = [r for r in found if any(fnmatchcase(r.id, pattern) for pattern in README_CASES)]
    everything = [machine_table(run), table.markdown(found), f"{table.tally(found)}.", reasons(found)]
    memory = memory_table(found)
    if memory:
        everything += ["Peak memory of one call, its output included, above what was in use before:", memory]
    short = [table.markdown(chosen), f"{table.headline(run, found)}; {run.machine['time']}. All cases: {table.tally(found)}."]
    return {
        DOCS.parent / "README.md": "\n" + "\n\n".join(short) + "\n",
        DOCS / "results.md": "\n" + "\n\n".join(filter(None, everything)) + "\n",
    }


def study_page(path: str) -> str:
    """Where each family's break-even lies, and what others printed beside what was measured here."""
    families = [f"| `{c.crossing.family}` | {c.words} | {curve(c.crossing)} |" for c in of_study(path)]
    parts = [machine_table(Run.load(path)), "\n".join(["| family | sparse | speedup at each size |", "|---|---|---|", *families])]
    rows = json.loads(Path(path).read_text())["published"]
    if rows:
        header = ["row", *rows[0]["figures"], "dense here", "sparse here", "speedup here", "engine"]
        cells = [[row["id"], *row["figures"].values(), *_fastest(row["here"])] for row in rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in [header, ["--"] * len(header), *cells]))
    return "\n" + "\n\n".join(parts) + "\n"


def _fastest(here: dict[str, dict]) -> list[str]:
    timed = {name: r for name, r in here.items() if r["speedup"] and r["blocks"] > 1}
    if not timed:
        return ["-", "-", next(iter(here.values()))["verdict"], ""]
    name = max(timed, key=lambda n: timed[n]["speedup"])
    r = timed[name]
    interval = f"{r['speedup']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]"
    return [table.seconds(r["baseline_s"]), table.seconds(r["candidate_s"]), interval, name.rpartition("/")[2]]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for stored in sys.argv[1:]:
        if "crossings" in json.loads(Path(stored).read_text()):
            fill(DOCS / "break_even.md", study_page(stored))
        elif (run := Run.load(stored)).machine["class"].startswith("cuda/"):
            fill(DOCS / "results.md", gpu_page(run), "results on a GPU")
        else:
            for page, body in pages(Run.load(stored)).items():
                fill(page, body)
