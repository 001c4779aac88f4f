"""Results that many machines share: a branch of the repository that holds nothing but stored runs and asv's files.

The branch is written without touching the index or HEAD, and files that are here already stay as they are. What is pushed is
what others stored and what is new here, together: nothing is dropped, and a file is replaced only by one that was changed here.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .store import Run

BRANCH, FOLDER = "perf-results", "perf/results"
_TRIES = 3  # others may push at the same time


class PublishError(ValueError):
    """git refused."""


def store(run: Run, folder: str | os.PathLike) -> Path:
    """Save `run` as FOLDER/MACHINE CLASS/TIME-COMMIT.json; returns the path."""
    time = "".join(c for c in run.machine["time"] if c.isalnum())
    commit = (run.machine.get("commit") or "no-commit")[:10] + ("-changed" if run.machine.get("dirty") else "")
    against = f"-against-{run.settings['base'][:10]}" if run.settings.get("base") else ""
    path = Path(folder, *run.machine["class"].split("/"), f"{time}-{commit}{against}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    run.save(path)
    return path


def pull(folder: str | os.PathLike, branch: str = BRANCH, remote: str = "origin") -> int:
    """Bring the branch's files that are missing below `folder`; returns how many. A branch that does not exist has none."""
    root, prefix = _place(folder)
    theirs = _fetch(root, remote, branch)
    if theirs is None:
        return 0
    archive = _git(root, "archive", "--format=tar", theirs, text=False)
    added = 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            path = root / member.name
            if member.isfile() and member.name.startswith(f"{prefix}/") and ".." not in member.name.split("/") and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.extractfile(member).read())
                added += 1
    return added


def push(folder: str | os.PathLike, branch: str = BRANCH, remote: str = "origin", message: str = "Add results") -> str:
    """Put the files below `folder` that are new or changed on the branch, beside what is there; returns what was done."""
    root, prefix = _place(folder)
    for attempt in range(_TRIES):
        pull(folder, branch, remote)
        theirs = _fetch(root, remote, branch)
        commit = _commit(root, prefix, theirs, message)
        if commit is None:
            return f"{branch} holds all of it already"
        try:
            _git(root, "push", "--quiet", remote, f"{commit}:refs/heads/{branch}")
            return f"pushed to {branch} of {remote}"
        except PublishError:
            if attempt == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _commit(root: Path, prefix: str, parent: str | None, message: str) -> str | None:
    """A commit of what is new or changed below `prefix` on top of `parent`; None where it would change nothing."""
    stored = _names(root, "ls-tree", "-r", "-z", "--name-only", parent) if parent else set()
    ours = _names(root, "ls-files", "-z", "--others", "--modified", "--", prefix)
    here = {path.relative_to(root).as_posix() for path in (root / prefix).rglob("*") if path.is_file()}
    chosen = sorted(name for name in here if name in ours or name not in stored)
    if not chosen:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
        _git(root, "read-tree", *([parent] if parent else ["--empty"]), environment=index)
        listed = os.path.join(scratch, "names")
        Path(listed).write_text("\0".join(chosen))
        choice = (f"--pathspec-from-file={listed}", "--pathspec-file-nul")
        _git(root, "--literal-pathspecs", "add", "--force", *choice, environment=index)
        tree = _git(root, "write-tree", environment=index)
    if parent and tree == _git(root, "rev-parse", f"{parent}^{{tree}}"):
        return None
    return _git(root, "commit-tree", tree, *(["-p", parent] if parent else []), "-m", message, environment=_author(root))


def _names(root: Path, *arguments: str) -> set[str]:
    return set(filter(None, _git(root, *arguments).split("\0")))


def _author(root: Path) -> Mapping[str, str]:
    """Somebody to commit as, where git does not know who this is."""
    try:
        _git(root, "var", "GIT_COMMITTER_IDENT")
        return {}
    except PublishError:
        roles = ("AUTHOR", "COMMITTER")
        return {f"GIT_{role}_{key}": value for role in roles for key, value in (("NAME", "breakeven"), ("EMAIL", "breakeven@localhost"))}


def _place(folder: str | os.PathLike) -> tuple[Path, str]:
    """Root of the repository around `folder`, and the folder's path inside it."""
    path = Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    root = Path(_git(path, "rev-parse", "--show-toplevel"))
    if path == root:
        raise PublishError(f"results must have a folder of their own in {root}, got the whole of it")
    return root, path.relative_to(root).as_posix()


def _fetch(root: Path, remote: str, branch: str) -> str | None:
    if not _git(root, "ls-remote", "--heads", remote, f"refs/heads/{branch}"):
        return None
    _git(root, "fetch", "--quiet", remote, f"refs/heads/{branch}")
    return _git(root, "rev-parse", "FETCH_HEAD")


def _git(root: Path, *arguments: str, environment: Mapping[str, str] | None = None, text: bool = True):
    command = ["git", "-C", os.fspath(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env={**os.environ, **(environment or {})})
    except OSError as error:
        raise PublishError(f"git does not run: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise PublishError(f"git {arguments[0]} failed: {said or f'exit status {done.returncode}'}")
    return done.stdout.decode().strip() if text else done.stdout


def run_command(runs: Iterable[str], folder: str, branch: str, remote: str, only_pull: bool) -> Iterable[str]:
    """The `publish` command: lines to print."""
    for path in runs:
        yield f"stored {store(Run.load(path), folder)}"
    yield f"{pull(folder, branch, remote)} results came from {branch}"
    if not only_pull:
        yield push(folder, branch, remote)
