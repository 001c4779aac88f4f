"""Every code block of the README and the docs is run, or compared with what exists. The word behind its fence says how:

python       runs, all blocks of a page in order and in one namespace
bash         one command a line: files, modules, subcommands and options must exist; nothing is installed or measured
console      lines that start with "$ " are such commands, the others are output and are not compared
console run  the same, but run, and the output compared but for white space; "..." stands for anything
json, yaml   must parse
text         output and diagrams: nothing is done
"""

from __future__ import annotations

import doctest
import functools
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml

import sparse_attention as sa

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = ("python", "bash", "console", "console run", "json", "yaml", "text")
PATTERNS = [name for name in sa.__all__ if inspect.isclass(getattr(sa, name)) and issubclass(getattr(sa, name), sa.Pattern)]
PATTERNS.remove("Pattern")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line, counted from 1
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    blocks, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"\s*```(.*)", line)
        if fence and opened is None:
            opened, lines = (number + 1, fence[1].strip()), []
        elif fence:
            blocks.append(Block(page, *opened, "\n".join(lines)))
            opened = None
        elif opened:
            lines.append(line)
    assert opened is None, f"{page.name}: the block at line {opened} is never closed"
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def prose_of(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^\s*```.*?^\s*```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def commands(block: Block) -> list[str]:
    """Its command lines; a line that ends in a backslash goes on in the next."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.kind != "bash":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_every_block_says_what_it_is():
    strange = [f"{block} is {block.kind!r}" for block in BLOCKS if block.kind not in KINDS]
    assert not strange, f"{strange}; expected one of {KINDS}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_data_blocks_parse(page):
    for block in blocks_of(page):
        if block.kind in ("json", "yaml"):
            assert yaml.safe_load(block.text) is not None, block  # JSON is YAML


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, monkeypatch):
    import perf.cases

    monkeypatch.setattr(perf.cases, "CASES", list(perf.cases.CASES))  # a page may show how a row is added
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks_of(page):
        if block.kind == "python":
            # Empty lines before the code make a traceback name the page's own line.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
            exec(code, vars(module))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind in ("bash", "console")], ids=str)
def test_commands_exist(block):
    assert commands(block), f"{block}: no command; mark output as text"
    for line in commands(block):
        for words in simple_commands(line):
            check_command(words)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "console run"], ids=str)
def test_console_blocks_print_what_they_show(block):
    sessions = re.split(r"^\$ (.*)\n?", block.text, flags=re.MULTILINE)
    assert sessions[0] == "" and len(sessions) > 1, f"{block}: starts with '$ ' and a command"
    for command, expected in zip(sessions[1::2], sessions[2::2]):
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        got = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        same = doctest.OutputChecker().check_output(expected.strip() + "\n", got.strip() + "\n", flags)
        assert same, f"{block}: {command} printed\n{got}"


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line, without comments, variables and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters = "#"
    found, words = [], []
    for word in [*lexer, "&&"]:
        if word in ("&&", "||", ";", "|", "&"):
            found.append(words)
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)
    found = [words[: words.index(">")] if ">" in words else words for words in found]
    return [words for words in found if words]


def check_command(words: list[str]) -> None:
    program, *rest = words
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    others = [word for word in rest if not word.startswith("-")]
    if program in ("pip", "python") and words[:4] == ["pip", "install", "-e", words[-1]]:
        extras = re.fullmatch(r"\.\[(.*)\]", words[-1])[1].split(",")
        declared = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras), f"{words}: no such extra"
    elif program == "pytest":
        assert_options(options, help_of("-m", "pytest"), words)
        assert others and (ROOT / others[0].partition("::")[0]).exists(), f"{words}: {others[:1]} does not exist"
    elif words[:2] == ["python", "-m"]:
        subcommand = others[1:2] if re.fullmatch(r"[a-z]+", "".join(others[1:2])) else []
        assert_options(options, help_of("-m", others[0], *subcommand), words)
    elif program == "python":
        assert (ROOT / rest[0]).exists(), f"{words}: {rest[0]} does not exist"
    elif program == "asv":
        assert_options(options, help_of("-m", "asv", rest[0]), words)
    elif (ROOT / program).is_file():
        assert os.access(ROOT / program, os.X_OK), f"{words}: {program} cannot be executed"
    elif program in ("git", "cd"):
        assert program == "cd" or shutil.which(program), f"{words}: no {program} here"
    else:
        raise AssertionError(f"{words}: tests/test_docs.py does not know how to check {program!r}")


@functools.cache
def help_of(*words: str) -> str:
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"python {shlex.join(words)} --help fails: {done.stderr}"
    return done.stdout


def assert_options(options: list[str], help_text: str, words: list[str]) -> None:
    missing = [option for option in options if not re.search(rf"{re.escape(option)}\b", help_text)]
    assert not missing, f"{words}: --help does not know {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", prose_of(page)):
        path, _, anchor = "".join(target).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors_of(found)):
            broken.append("".join(target))
    assert not broken, f"{page.name} links to {broken}, which do not exist"


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def signature_of(name: str) -> str:
    kind = getattr(sa, name)
    words = [str(p.replace(annotation=p.empty)) for p in inspect.signature(kind).parameters.values()]
    return f"{name}({', '.join(words)})"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/patterns.md"], ids=lambda page: page.name)
def test_tables_hold_every_pattern_as_it_is(page):
    rows = re.findall(r"^\| `([A-Z]\w+\(.*?\))` \|", page.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(signature_of(name) for name in PATTERNS)


@pytest.fixture(scope="module")
def draw():
    return load(ROOT / "docs/pictures/draw.py")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pattern_has_a_picture(draw):
    assert set(draw.MASKS) == {*PATTERNS, "And", "Or"}
    readme = (ROOT / "README.md").read_text()
    assert all(f'src="docs/pictures/{name}.png"' in readme for name in draw.MASKS)


def test_pictures_show_what_patterns_say(draw):
    import matplotlib.image

    middle = slice(draw.PIXELS // 2, None, draw.PIXELS)
    for name in draw.MASKS:
        shown = matplotlib.image.imread(ROOT / f"docs/pictures/{name}.png")[middle, middle]
        assert (abs(shown - draw.ALLOWED).max(-1) < 0.01).tolist() == draw.mask_of(name).tolist(), name
        assert (abs(shown - draw.OTHER).max(-1) < 0.01).tolist() == (~draw.mask_of(name)).tolist(), name


def stored_run():
    """A run of two cases: one of 2x with a floor of 1, one too slow."""
    from sparse_attention.breakeven.case import Case
    from sparse_attention.breakeven.race import Settings
    from sparse_attention.breakeven.store import Block, Record, Run

    def record(name, speedup):
        scout = {"status": "ok", "baselines": {"sdpa": 2.0}, "candidate_s": 1.0, "candidate_peak_bytes": 3 << 20}
        blocks = [Block(n, "sdpa", [speedup] * 9, [1.0] * 9, [True] * 9) for n in range(15)]
        return Record(Case(name, "a:b"), scout, blocks)

    machine = {
        "class": "cpu/zen4/2c", "cpu": "a processor", "cores": 2, "memory_bytes": 1 << 34, "system": "Linux", "python": "3.12",
        "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "dirty": False, "time": "2026-11-21T00:00:00Z",
    }  # fmt: skip
    records = [record("window256/16k", 2.0), record("ladder/window64/1k", 0.5)]
    return Run(machine, Settings(threads=2).as_dict(), {r.case.id: r for r in records})


def test_results_are_written_from_a_stored_run(tmp_path):
    for name in ("README.md", "docs/results.md", "docs/fill_results.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    filling = load(tmp_path / "docs/fill_results.py")
    for _ in range(2):
        for page, body in filling.pages(stored_run()).items():
            filling.fill(page, body)
    short, long = ((tmp_path / name).read_text() for name in ("README.md", "docs/results.md"))
    assert re.findall(r"^\| (\S+/\S+) .*x \| (?:.* )?(PASS|FAIL) \|", short, re.MULTILINE) == [("window256/16k", "PASS")]
    assert re.findall(r"^\| (\S+/\S+) .*x \| (?:.* )?(PASS|FAIL) \|", long.partition("<!-- end")[0], re.MULTILINE) == [
        ("window256/16k", "PASS"),
        ("ladder/window64/1k", "FAIL"),
    ]
    assert "2x [2, 2]" in short and "0.5x [0.5, 0.5]" in long
    assert "0123456789" in short and "0123456789abcdef" in long
    for name, text in (("README.md", short), ("docs/results.md", long)):
        outside = re.compile(r"(<!-- results of .*?-->).*(<!-- end of results -->)", re.DOTALL)
        assert outside.sub(r"\1\2", text) == outside.sub(r"\1\2", (ROOT / name).read_text())


def gpu_run():
    from perf.cuda_cases import CASES
    from sparse_attention.breakeven.race import Settings
    from sparse_attention.breakeven.store import Block, Record, Run

    def record(name, dense_s, sparse_s, pairs, rivals):
        (case,) = [case for case in CASES if case.id == name]
        scout = {"status": "ok", "candidate_s": sparse_s, "baselines": rivals, "work": {"pairs": pairs, "dense_pairs": 1000}}
        scout["baselines_absent"] = {"sdpa efficient_attention": "RuntimeError: no"}
        fastest = min(rivals, key=rivals.get)
        return Record(case, scout, [Block(n, fastest, [dense_s] * 9, [sparse_s] * 9, [True] * 9) for n in range(5)])

    sdpa = {"sdpa": 0.12, "sdpa cudnn_attention": 0.118}
    records = [
        record("window4096/128k/of-dense", 0.118, 0.00667, 31, sdpa), record("dilated1024x4/128k/of-dense", 0.118, 0.00211, 8, sdpa),
        record("window1024/128k/of-flex", 0.00375, 0.00209, 8, {"flex": 0.00375}),
    ]  # fmt: skip
    gpu = {"name": "NVIDIA H100", "memory_bytes": 80 << 30, "multiprocessors": 132, "driver": "580.1", "cuda": "13.0", "cudnn": "9.19.0"}
    machine = {**stored_run().machine, "class": "cuda/h100", "gpu": gpu}
    return Run(machine, Settings(threads=16, device="cuda").as_dict(), {r.case.id: r for r in records})


def test_results_of_a_gpu_have_a_part_of_their_own(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("docs/results.md", "docs/fill_results.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    filling = load(tmp_path / "docs/fill_results.py")
    page, before = tmp_path / "docs/results.md", (ROOT / "docs/results.md").read_text()
    for _ in range(2):
        filling.fill(page, filling.gpu_page(gpu_run()), "results on a GPU")
    head, mark, part = page.read_text().partition("<!-- results of results on a GPU:")
    assert mark and head == before.partition(mark)[0], "the CPU's part stays"
    assert "| device | NVIDIA H100, 80 GiB, 132 multiprocessors |" in part and "| driver | 580.1, CUDA 13.0, cuDNN 9.19.0 |" in part
    assert "| Sliding window, 4096 | 128K | 96.9 % | 118 ms | 6.67 ms | 17.7x [17.7, 17.7] |" in part
    assert "| Dilated, 1024 x 4 | 128K | 99.2 % | 118 ms | 2.11 ms | 55.9x [55.9, 55.9] |" in part
    assert "| Block-sparse, BigBird(64) | 128K | - | - | - | not measured |" in part
    ways = "sdpa cudnn_attention 118 ms, sdpa 120 ms, sdpa efficient_attention does not run"
    assert part.count(ways) == 1 and f"| window4096/128k/of-dense | {ways} |" in part, "once for cases of one baseline"
    assert re.search(r"^\| window1024/128k/of-flex \| 3.75 ms \| 2.09 ms \| 1.79x .* PASS \|", part, re.MULTILINE)
