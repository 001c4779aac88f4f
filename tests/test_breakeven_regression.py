"""Two revisions in one process: the renamed import, the gate against a base revision, and two builds of the kernels at once."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attention.breakeven import Case, Race, Sequential, Settings, Unavailable, Verdict, regression, results, revision
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.progress import Silent
from sparse_attention.breakeven.result import Result
from sparse_attention.breakeven.statistics import interval
from tests import breakeven_toys as toys

KERNELS = """
from tests.breakeven_toys import take
SECONDS = {seconds}

def double(x):
    from toykernels import tables

    take(SECONDS)
    return tables.FACTOR * x
"""

BENCH = """
from sparse_attention.breakeven import Case, Workload
import numpy as np

CASES = [Case("double", "bench:double"), Case("again", "bench:double", {"kept": True}, tags=("more",))]

def double(kept=False):
    import toykernels.kernels

    x = np.arange(8.0)
    outputs = {}

    def candidate():
        return toykernels.kernels.double(x)

    def check(out):
        np.testing.assert_array_equal(out, 2.0 * x)

    return Workload(candidate, {"plain": lambda: 2.0 * x}, check, inputs=[x])
"""


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A project of its own whose kernel took 1 ms in the commits `first` and `wrong`, and takes 1.2 ms in the working tree."""
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    package = folder / "toykernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tables.py").write_text("FACTOR = 2.0\n")
    (package / "kernels.py").write_text(KERNELS.format(seconds=1e-3))
    (folder / "bench.py").write_text(BENCH)
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    git(folder, "tag", "first")
    (package / "tables.py").write_text("FACTOR = 3.0\n")
    git(folder, "commit", "-am", "wrong")
    git(folder, "tag", "wrong")
    (package / "tables.py").unlink()
    git(folder, "commit", "-am", "without tables")
    git(folder, "tag", "without")
    (package / "tables.py").write_text("FACTOR = 2.0\n")
    (package / "kernels.py").write_text(KERNELS.format(seconds=1.2e-3))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("bench", "toykernels", "toykernels.kernels", "toykernels.tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bench", "toykernels")]:
        del sys.modules[name]


GATE = ["gate", "--table", "bench:CASES", "--package", "toykernels", "--device", toys.DEVICE, "--quiet", "--policy", "sequential"]


def test_gate_against_a_base_revision(repository, capsys):
    before = git(repository, "status", "--porcelain"), git(repository, "worktree", "list"), git(repository, "rev-parse", "HEAD")
    assert main([*GATE, "--base", "first", "--cases", "double"]) == 10
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("double"))
    speedup = float(re.search(r"([\d.]+)x \[", row)[1])
    assert abs(speedup - 1 / 1.2) < 0.03 and "0.97x" in row and "FAIL" in row
    assert "base" in said and "head" in said
    assert "double: the kernel moved: " in said and "% slower than in " + git(repository, "rev-parse", "first")[:10] in said
    assert "slowdowns of a kernel found with 95 % power" in said
    after = git(repository, "status", "--porcelain"), git(repository, "worktree", "list"), git(repository, "rev-parse", "HEAD")
    assert after == before, "the repository is only read"
    assert main([*GATE, "--base", "first", "--cases", "double", "--floor", "0.8"]) == 0


@pytest.mark.parametrize(
    "base, reason", [("wrong", "AssertionError: Arrays are not equal"), ("without", "ImportError: cannot import name 'tables'")]
)
def test_a_base_that_cannot_serve_is_not_evaluated(repository, capsys, base, reason):
    assert main([*GATE, "--base", base]) == 12
    said = " ".join(capsys.readouterr().out.split())
    for packages in ("toykernels", "bench, toykernels"):
        assert f"with {packages} of the base: {reason}" in said


OUTSIDE = """
def moved(where):
    import numpy as np
    from sparse_attention.breakeven import Workload
    if where == "package":
        from toykernels.kernels import double
    elif where == "table":
        def double(x):
            return 2.0 * x
    elif where == "elsewhere":
        from elsewhere import double
    else:
        import importlib
        import toykernels.tables
        double = importlib.import_module("elsewhere").double
    x = np.arange(8.0)
    return Workload(lambda: double(x), {"plain": lambda: 2.0 * x}, inputs=[x])
CASES += [Case(where, "bench:moved", {"where": where}) for where in ("package", "table", "elsewhere", "partly")]
"""


@pytest.fixture
def outside(repository):
    """With kernels that no `--package` names."""
    for name, text in (("bench.py", BENCH + OUTSIDE), ("elsewhere.py", "def double(x):\n    return 2.0 * x\n")):
        (repository / name).write_text(text)
    git(repository, "add", ".")
    git(repository, "commit", "-m", "outside")
    git(repository, "tag", "outside")
    yield repository
    sys.modules.pop("elsewhere", None)


@pytest.mark.parametrize("case", ["elsewhere", "partly"])
def test_a_kernel_outside_the_package_is_not_compared_with_itself(outside, capsys, case):
    assert main([*GATE, "--base", "outside", "--cases", case]) == 1
    said = capsys.readouterr().out
    assert "elsewhere is this revision's on both sides, as it is not in --package" in said


def test_kernels_that_are_the_base_s_are_told_apart(outside):
    commit = revision.resolve("outside", outside)
    folder = str(revision.checkout(commit, outside))
    for where in ("elsewhere", "package", "partly", "table", "package"):
        arguments = ("bench:moved", {"where": where}, commit, folder, ("toykernels",))
        if where in ("elsewhere", "partly"):
            with pytest.raises(revision.ComparedWithItself):
                regression.pair(*arguments)
        else:
            regression.pair(*arguments)
    with pytest.raises(revision.ComparedWithItself, match="the kernel is not in --package"):
        others = revision.load(folder, ["toykernels"], ["bench"], label="unused")
        with others.imports.watched():
            others.module("bench").moved("table")
        others.require_used(["toykernels"], "bench", outside)


def test_a_case_that_only_this_revision_has_says_so(outside, capsys):
    assert main([*GATE, "--base", "without", "--cases", "package"]) == 12
    assert regression.NOT_IN_THE_BASE in capsys.readouterr().out


def test_a_case_that_only_this_revision_has_does_not_decide_beside_others(repository, capsys):
    with open(repository / "toykernels/kernels.py", "a") as f:
        f.write("\nthrice_not_twice = double\n")
    with open(repository / "bench.py", "a") as f:
        f.write("\n".join(["", "def newer():", "    from toykernels.kernels import thrice_not_twice", "    return double()", ""]))
        f.write('CASES += [Case("newer", "bench:newer")]\n')
    assert main([*GATE, "--base", "first", "--floor", "0.8"]) == 0
    assert "newer: NOT EVALUATED: not in the base" in capsys.readouterr().out
    assert main([*GATE, "--base", "first", "--cases", "newer"]) == 12


def test_a_base_older_than_the_builder_is_built_by_its_own(repository, capsys):
    (repository / "toykernels/kernels.py").write_text(KERNELS.format(seconds=1.2e-3).replace("def double", "def renamed"))
    (repository / "bench.py").write_text(BENCH.replace("kernels.double", "kernels.renamed"))
    assert main([*GATE, "--base", "first", "--cases", "double"]) == 10
    assert re.search(r"the kernel moved: (19|20|21)\.\d % slower", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, said", [(["--base", "nowhere"], "no revision 'nowhere'"), (["--base", "first", "--prepare", "exit 3"], "'exit 3' failed")]
)
def test_a_base_that_cannot_be_had_is_usage(repository, capsys, arguments, said):
    assert main([*GATE, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_base_without_the_package_is_not_evaluated(repository, capsys):
    command = [argument for argument in GATE if argument not in ("--package", "toykernels")]
    assert main([*command, "--base", "first"]) == 12
    said = capsys.readouterr().out
    assert "no package 'sparse_attention'" in said and "--package" in said


def test_a_repository_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["gate", "--table", "tests.breakeven_toys:CASES", "--base", "HEAD"]) == 2
    assert "git says" in capsys.readouterr().err


def test_checkout_is_prepared_once_and_kept(repository):
    commit = revision.resolve("first", repository)
    one = revision.checkout(commit, repository, "echo built > built.txt")
    assert (one / "built.txt").read_text() == "built\n" and (one / "toykernels/kernels.py").exists()
    (one / "mark").touch()
    assert revision.checkout(commit, repository, "echo built > built.txt") == one and (one / "mark").exists()
    assert revision.checkout(commit, repository) != one
    for number in range(10):
        revision.checkout(commit, repository, f"echo {number}")
    assert len(list(revision.cache_folder().iterdir())) == 8


SOURCE = """
from __future__ import annotations
import os.path, pkg, pkg.sub
import pkg.sub as short
from pkg import sub, breakeven
from pkg.sub import VALUE
from . import sub as relative

def lazy():
    import pkg.late
    from pkg.late import WHO
    return pkg.late.WHO, WHO

NAMES = [pkg.sub.VALUE, short.VALUE, sub.VALUE, VALUE, relative.VALUE]
OPERATOR = "pkg::op", "other::op", "pkg"
MODULES = "pkg.sub", "pkg", "pkg.sub is", "other.pkg"
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The package `pkg` here, and another revision of it in a folder; each says who it is."""
    for who in ("here", "there"):
        package = tmp_path / who / "pkg"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "sub.py").write_text(f"VALUE = '{who}'\n")
        (package / "late.py").write_text(f"WHO = '{who}'\n")
        (package / "breakeven.py").write_text(f"WHO = '{who}'\n")
        (package / "user.py").write_text(SOURCE)
        (package / "leaky.py").write_text("import sys\nsub = sys.modules['pkg' + '.sub']\n")
        (package / "ops.py").write_text("import torch\n\ndef op():\n    return torch.ops.pkg.op, torch.ops.aten.add\n")
    (tmp_path / "here" / "outside.py").write_text("import pkg.user\n\ndef names():\n    return pkg.user.NAMES\n")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    import pkg.sub  # noqa: F401

    finder = revision.load(tmp_path / "there", ["pkg"], ["outside"], label="other")
    yield finder
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.partition(".")[0].removesuffix("__other") in ("pkg", "outside")]:
        del sys.modules[name]


def test_every_import_of_the_other_revision_stays_there(two):
    user = two.module("pkg.user")
    assert user.__name__ == "pkg__other.user"
    assert user.NAMES == ["there"] * 5
    assert user.lazy() == ("there", "there")
    assert user.OPERATOR == ("pkg__other::op", "other::op", "pkg")
    assert user.MODULES == ("pkg__other.sub", "pkg", "pkg.sub is", "other.pkg")
    assert sys.modules["pkg.sub"].VALUE == "here" and "pkg.user" not in sys.modules
    two.require_apart()


def test_modules_named_along_are_taken_from_here_over_the_other_packages(two):
    assert two.module("outside").names() == ["there"] * 5
    assert two.module("outside").__file__.endswith("here/outside.py")


def test_renamed_operators_are_looked_up_under_their_new_name(two):
    with pytest.raises(AttributeError, match="pkg__other"):
        two.module("pkg.ops").op()


def test_what_reaches_this_revision_is_found_out(two):
    two.module("pkg.leaky")
    with pytest.raises(revision.RevisionError, match="pkg__other.leaky.sub of the other revision is pkg.sub's of this one"):
        two.require_apart()


def test_the_harness_is_never_renamed():
    assert not revision.renamed("sparse_attention.breakeven.case", ["sparse_attention"])
    assert revision.renamed("sparse_attention.breakevenness", ["sparse_attention"])


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(revision.RevisionError, match="no package 'nothing'"):
        revision.load(tmp_path, ["nothing"])


def test_packages_under_src_are_found(tmp_path):
    (tmp_path / "src" / "inner").mkdir(parents=True)
    (tmp_path / "src" / "inner" / "__init__.py").write_text("X = 1\n")
    finder = revision.load(tmp_path, ["inner"])
    try:
        assert finder.module("inner").X == 1
    finally:
        sys.meta_path.remove(finder)


def test_both_sides_read_the_same_tensors():
    ours, theirs = torch.randn(4, 4), torch.zeros(4, 4)
    regression._share_inputs([theirs], [ours])
    assert theirs.data_ptr() == ours.data_ptr()
    with pytest.raises(ValueError, match="inputs must be alike"):
        regression._share_inputs([torch.zeros(2)], [ours])


@pytest.mark.parametrize(
    "one, other, alike",
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.001, 2.0]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.1, 2.0]), False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), False),
        ((torch.ones(3), torch.ones(2)), [torch.ones(3), torch.ones(2)], True),
        ((torch.ones(3), torch.ones(2)), (torch.ones(3), torch.zeros(2)), False),
        ((), (), False),
        (np.ones(3), np.ones(3), True),
        ("text", "text", False),
    ],
)
def test_a_less_exact_base_still_does_the_same_work(one, other, alike):
    assert regression._within_a_percent(one, other) is alike


def found(speedup, sd, verdict=Verdict.PASS):
    logs = [torch.tensor(speedup).log().item() + x * sd for x in (-1.2, -0.6, 0.0, 0.6, 1.2)]
    seen = interval(logs, 0.05)
    return Result(f"case {speedup}", verdict, 0.97, interval=seen, detects=0.02)


def test_only_kernels_that_moved_are_named():
    shown = regression.text([found(1.0, 0.01), found(0.9, 0.01), found(1.1, 0.01), found(0.99, 0.01)], "a" * 40).splitlines()
    assert [line.split(":")[0] for line in shown[:-1]] == ["case 0.9", "case 1.1"]
    assert "11.1 % slower" in shown[0] and "9.1 % faster" in shown[1]
    assert "5.2 %" in shown[-1], "down to the floor, and 2 % beyond it"
    assert regression.text([found(1.0, 0.01)], "a" * 40).startswith("no kernel moved")
    assert regression.text([], "a" * 40) == ""


def test_two_builds_of_the_kernels_load_side_by_side(tmp_path):
    from importlib.machinery import ExtensionFileLoader
    from importlib.util import module_from_spec, spec_from_file_location

    from sparse_attention import SlidingWindow
    from sparse_attention._build import kernels, library
    from sparse_attention.layout import layout

    copy = tmp_path / "kernels.so"
    shutil.copy(library(), copy)
    loader = ExtensionFileLoader("another._kernels", str(copy))
    second = module_from_spec(spec_from_file_location(loader.name, copy, loader=loader))
    loader.exec_module(second)
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    outs = []
    for native in (kernels(), second):
        parts = [list(part.tensors()) for part in layout(SlidingWindow(9), 100, 100, 2).parts]
        outs.append(native.tile_forward(q, k, v, native.Layout(2, 100, 100, parts), 0.25)[0])
    assert kernels().Layout is not second.Layout
    assert torch.equal(*outs)


TWICE = """
import os, shutil, torch
from sparse_attention import SlidingWindow, attention
from sparse_attention._build import kernels, library
from sparse_attention.breakeven import revision
from sparse_attention.ops import attention_op

q, k, v = torch.randn(3, 1, 2, 100, 16)
ours = attention(q, k, v, SlidingWindow(9), impl="tile")
other = revision.load(os.environ["ROOT"], ["sparse_attention"])
same = revision.load(os.environ["ROOT"], ["sparse_attention"], label="same").module("sparse_attention._build")
assert same.kernels() is kernels(), "one library is loaded once"
their_build = other.module("sparse_attention._build")
their_build.FLAGS.append("-DANOTHER")
shutil.copy(library(), their_build.cache_folder() / f"kernels-{their_build.tier()}-{their_build.key()}.so")
theirs, their_kernels = other.module("sparse_attention"), their_build.kernels()
assert torch.equal(theirs.attention(q, k, v, theirs.SlidingWindow(9), impl="tile"), ours)
other.require_apart()
assert theirs.SlidingWindow is not SlidingWindow and their_kernels.Layout is not kernels().Layout
assert their_kernels.__file__ != kernels().__file__
assert torch.ops.sparse_attention.attention.default is not torch.ops.sparse_attention__base.attention.default
assert torch.equal(attention_op(q, k, v, "SlidingWindow(9)", None, "tile")[0], ours)
"""


def test_this_package_loads_twice(tmp_path):
    """In a process of its own, since it registers operators; against the package as it is, with the same library and another."""
    from sparse_attention._build import library

    shutil.copy(library(), tmp_path)
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "ROOT": str(root), "SPARSE_ATTENTION_CACHE": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


PYTEST = """
import pytest, bench

@pytest.mark.parametrize("case", bench.CASES[:1], ids=lambda c: c.id)
def test_race(case, breakeven_race):
    breakeven_race(case)
"""


def test_pytest_against_a_base_revision(repository):
    (repository / "test_it.py").write_text(PYTEST)
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sparse_attention.breakeven.plugin", "test_it.py"]
    command += ["--breakeven-device", toys.DEVICE, "--breakeven-policy", "sequential", "--breakeven-package", "toykernels"]

    def session(*arguments):
        return subprocess.run([*command, *arguments], cwd=repository, capture_output=True, text=True, env=environment)

    found = session("--breakeven-base", "first")
    assert found.returncode == 10, found.stdout + found.stderr
    assert re.search(r"case +base +head", found.stdout) and "the kernel moved: " in found.stdout
    found = session("--breakeven-base", "nowhere")
    assert found.returncode == 4 and "no revision 'nowhere'" in found.stderr


def leaving(mark):
    """A workload that can be built once."""
    if os.path.exists(mark):
        raise Unavailable("it was here a moment ago")
    Path(mark).touch()
    return toys.doubling()


def test_what_is_not_there_in_a_block_is_not_evaluated_rather_than_wrong(tmp_path):
    case = Case("leaving", f"{__name__}:leaving", {"mark": str(tmp_path / "mark")})
    settings = Settings(budget_s=300.0, policy=Sequential((2,)), device=toys.DEVICE)
    run = Race([case, toys.case("quick")], settings, Silent()).execute()
    found = {r.id: r for r in results(run, settings.policy)}
    assert (found["leaving"].verdict, found["leaving"].reason) == (Verdict.NOT_EVALUATED, "it was here a moment ago")
    assert found["quick"].verdict is Verdict.PASS
