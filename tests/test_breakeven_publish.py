"""Sharing results through a branch, between clones of a repository."""

import subprocess

import pytest

from sparse_attention.breakeven import Run
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.publish import PublishError, pull, push, store
from tests import breakeven_stored as stored

PERSON = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": "/nonexistent", "EMAIL": ""}


def git(folder, *arguments):
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def clones(tmp_path, monkeypatch):
    """Two clones of one bare repository with a commit; git knows nobody's name."""
    for name, value in PERSON.items():
        monkeypatch.setenv(name, value)
    git(tmp_path, "init", "--quiet", "--bare", "shared.git")
    found = []
    for name in ("one", "two"):
        git(tmp_path, "clone", "--quiet", "shared.git", name)
        folder = tmp_path / name
        if not found:
            (folder / "README").write_text("hello")
            git(folder, "add", "README")
            git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
            git(folder, "push", "--quiet", "origin", "HEAD:main")
        found.append(folder)
    git(found[1], "pull", "--quiet", "origin", "main")
    return found


def run(day, **machine):
    return stored.run(stored.ladder()[:1], commit=f"{day}" * 10, day=day, **machine)


def test_runs_are_kept_by_machine_class_time_and_commit(tmp_path):
    path = store(run(3), tmp_path)
    assert path == tmp_path / "cpu" / "zen4" / "2c" / "20260303T120000Z-3333333333.json"
    assert Run.load(path).machine["commit"] == "3333333333"
    against = run(4, dirty=True)
    against.settings["base"] = "0123456789ab"
    assert store(against, tmp_path).name == "20260304T120000Z-4444444444-changed-against-0123456789.json"


def test_two_machines_share_their_results(clones):
    one, two = (folder / "perf" / "results" for folder in clones)
    store(run(1), one)
    assert pull(one) == 0
    assert push(one) == "pushed to perf-results of origin"
    store(run(2, **{"class": "cuda/h100"}), two)
    assert push(two) == "pushed to perf-results of origin"
    names = sorted(path.name for path in two.rglob("*.json"))
    assert names == ["20260301T120000Z-1111111111.json", "20260302T120000Z-2222222222.json"]
    assert pull(one) == 1 and push(one) == "perf-results holds all of it already"
    assert git(clones[0], "ls-tree", "-r", "--name-only", "FETCH_HEAD").count("perf/results/") == 2
    assert len(git(clones[0], "log", "--format=%H", "FETCH_HEAD").splitlines()) == 2


def test_the_working_tree_and_the_index_stay_as_they_are(clones):
    folder = clones[0] / "perf" / "results"
    store(run(1), folder)
    (clones[0] / "README").write_text("changed")
    (clones[0] / "staged").write_text("x")
    git(clones[0], "add", "staged")
    before = git(clones[0], "status", "--porcelain", "--branch")
    push(folder)
    assert git(clones[0], "status", "--porcelain", "--branch") == before
    assert git(clones[0], "ls-remote", "origin", "main").split()[0] == git(clones[0], "rev-parse", "HEAD")


def test_what_was_not_changed_here_replaces_nothing(clones):
    """A checkout holds results too; those that others stored since are newer."""
    one, two = (folder / "perf" / "results" for folder in clones)
    for folder in clones:
        (folder / "perf" / "results").mkdir(parents=True)
        (folder / "perf" / "results" / "a.json").write_text("old")
        git(folder, "add", "perf")
        git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "results")
    (one / "a.json").write_text("new")
    assert push(one) == "pushed to perf-results of origin"
    (two / "b.json").write_text("b")
    assert push(two) == "pushed to perf-results of origin"
    pull(one)
    assert (two / "a.json").read_text() == "old" and (one / "b.json").read_text() == "b"
    assert git(clones[0], "show", "FETCH_HEAD:perf/results/a.json") == "new"


def test_what_is_here_is_not_overwritten(clones):
    one, two = (folder / "perf" / "results" for folder in clones)
    path = store(run(1), one)
    push(one)
    mine = two / path.relative_to(one)
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert pull(two) == 0 and mine.read_text() == "mine"


def test_the_command_line(clones, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(clones[0])
    run(5).save(tmp_path / "run.json")
    assert main(["publish", str(tmp_path / "run.json")]) == 0
    assert main(["publish", "--pull"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("stored perf/results/cpu/zen4/2c/20260305") and said[2] == "pushed to perf-results of origin"
    assert said[3:] == ["0 results came from perf-results"]


def test_refusals_say_why(clones, tmp_path, monkeypatch, capsys):
    with pytest.raises(PublishError, match="a folder of their own"):
        push(clones[0])
    monkeypatch.chdir(tmp_path)
    assert main(["publish"]) == 2
    assert "git rev-parse failed: fatal: not a git repository" in capsys.readouterr().err
    monkeypatch.chdir(clones[0])
    assert main(["publish", "--remote", "nowhere", "--pull"]) == 2
    assert "git ls-remote failed" in capsys.readouterr().err
