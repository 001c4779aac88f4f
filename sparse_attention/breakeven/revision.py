"""Another revision of a package, imported under another name beside the one that is here, in the same process.

Modules of the other revision are compiled from source with every import of the package renamed, in functions too, so that
none of them reaches this revision's modules. So are texts that name its modules ("package.module": pybind11 gives out a module
that it knows by its name, whatever file is asked for), and operators that it registers with torch in a namespace of its own name
("package::op", `torch.ops.package`). Types that two extension modules bind must be local to each (`py::module_local()` with
pybind11); operators registered from C++ cannot be loaded twice.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from .imports import Imports

HARNESS = "sparse_attention.breakeven"  # measures both sides: never taken from another revision
_KEPT_CHECKOUTS = 8
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class RevisionError(ValueError):
    """The other revision cannot be found, unpacked or kept apart from this one."""


class NotThere(RevisionError):
    """The other revision has no such package."""


class ComparedWithItself(RevisionError):
    """What was to run in the other revision runs in this one."""


def resolve(revision: str, repository: str | os.PathLike) -> str:
    """The commit that `revision` names in the git repository around `repository`. Raises RevisionError."""
    return _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", wrong=f"no revision {revision!r}").strip()


def read(commit: str, path: str | os.PathLike) -> str | None:
    """The text of a file in `commit`; None where it did not exist."""
    path = Path(path).resolve()
    root = Path(_git(path.parent, "rev-parse", "--show-toplevel", wrong="not in a git repository").strip())
    name = path.relative_to(root.resolve()).as_posix()
    if not _git(root, "ls-tree", commit, "--", name, wrong=f"cannot read {commit}"):
        return None
    return _git(root, "show", f"{commit}:{name}", wrong=f"cannot read {name} of {commit}")


def checkout(commit: str, repository: str | os.PathLike, prepare: str = "") -> Path:
    """A folder in the user's cache with the files of `commit`, in which the shell command `prepare` was run.

    The repository is only read: its index, working tree and worktrees stay as they are. Raises RevisionError.
    """
    root = _git(repository, "rev-parse", "--show-toplevel", wrong="not in a git repository").strip()
    which = hashlib.sha256(f"{root}\0{commit}\0{prepare}".encode()).hexdigest()[:16]
    folder = cache_folder() / which
    if folder.is_dir():
        os.utime(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix="unpacking-", dir=folder.parent))
    try:
        index = {"GIT_INDEX_FILE": str(fresh / ".index")}
        _git(root, "read-tree", commit, wrong=f"cannot read {commit}", environment=index)
        _git(root, "checkout-index", "--all", f"--prefix={fresh}/", wrong=f"cannot unpack {commit}", environment=index)
        (fresh / ".index").unlink()
        if prepare:
            done = subprocess.run(prepare, shell=True, cwd=fresh, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RevisionError(f"{prepare!r} failed in {commit[:10]}: {' '.join(done.stdout.split()[-40:])}")
        os.rename(fresh, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _drop_old(folder)
    return folder


def cache_folder() -> Path:
    """Where other revisions are unpacked: BREAKEVEN_CACHE, or `breakeven/revisions` in the user's cache folder."""
    chosen = os.environ.get("BREAKEVEN_CACHE")
    base = Path(chosen or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "revisions" if chosen else base / "breakeven" / "revisions"


def load(folder: str | os.PathLike, packages: Iterable[str], along: Iterable[str] = (), label: str = "base") -> Renamed:
    """Make the `packages` of `folder` importable as `<package>__<label>`.

    Modules named in `along` are this revision's, imported once more so that they use the other revision's packages: the
    builders of workloads, for one.
    """
    folder = Path(folder).resolve()
    places = {name: _find_in(folder, name) for name in packages}
    places |= {name: _find_here(name) for name in along if name not in places}
    finder = Renamed(folder, {name: f"{name}__{label}" for name in places}, places)
    sys.meta_path.insert(0, finder)
    return finder


class Renamed(importlib.abc.MetaPathFinder):
    """Finds the modules of the other revision under their new names."""

    def __init__(self, folder: Path, names: Mapping[str, str], places: Mapping[str, str]):
        self.folder, self._names, self._places = folder, dict(names), dict(places)
        self._originals = {alias: name for name, alias in names.items()}
        self.imports = Imports(self._originals)

    def name(self, original: str) -> str:
        """The name under which the module `original` of the other revision is imported."""
        top, dot, rest = original.partition(".")
        return self._names[top] + dot + rest if renamed(original, self._names) else original

    def module(self, original: str) -> ModuleType:
        """Import the other revision's `original`."""
        return importlib.import_module(self.name(original))

    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        if top not in self._originals:
            return None
        if fullname == top:
            spec = importlib.machinery.PathFinder.find_spec(self._originals[top], [self._places[self._originals[top]]])
            inside = None if spec is None else spec.submodule_search_locations
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"no {self._originals[top]} in {self._places[self._originals[top]]}", name=fullname)
            spec = importlib.util.spec_from_file_location(fullname, spec.origin, submodule_search_locations=inside)
        else:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Renaming(fullname, spec.origin, self._names)
        return spec

    def require_used(self, packages: Iterable[str], builder: str, repository: Path | None) -> None:
        """ComparedWithItself unless what ran since `imports.watched()` used one of the `packages` of the other revision, and
        none of this one's modules in `repository` but the harness.
        """
        reached = self.imports.reached(self.name(builder))
        wanted = {self._names[name] for name in packages}
        advice = "name the package that holds the kernel with --package"
        ours = sorted(name for name in reached if name.partition(".")[0] not in self._originals and _lies_in(repository, name))
        if ours:
            raise ComparedWithItself(f"{ours[0]} is this revision's on both sides, as it is not in --package: {advice}")
        if not any(name.partition(".")[0] in wanted for name in reached):
            raise ComparedWithItself(f"the kernel is not in --package, so it would be compared with itself: {advice}")

    def require_apart(self) -> None:
        """RevisionError when a module of the other revision holds something of this one's."""
        for name, module in list(sys.modules.items()):
            if module is None or name.partition(".")[0] not in self._originals:
                continue
            for attribute, value in list(vars(module).items()):
                home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
                if isinstance(home, str) and renamed(home, self._names) and _is_loaded(home):
                    raise RevisionError(
                        f"{name}.{attribute} of the other revision is {home}'s of this one: they would be compared with themselves"
                    )


def renamed(module: str, names: Iterable[str]) -> bool:
    """Whether the other revision's `module` gets a new name."""
    return module.partition(".")[0] in names and not (module == HARNESS or module.startswith(HARNESS + "."))


class _Renaming(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, names: Mapping[str, str]):
        super().__init__(fullname, path)
        self._names = names

    def get_code(self, fullname):
        # Not from, nor to, the byte code caches: those belong to the text as it stands.
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data, path, *, _optimize=-1):
        tree = _Imports(self._names).visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)


class _Imports(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]):
        self._names = names

    def visit_Import(self, node):
        out = []
        for item in node.names:
            if not renamed(item.name, self._names):
                out.append(ast.Import([item]))
                continue
            out.append(ast.Import([ast.alias(self._new(item.name), item.asname)]))
            if item.asname is None:  # `import a.b` binds a
                top = item.name.partition(".")[0]
                out.append(ast.Import([ast.alias(self._names[top], top)]))
        return [ast.copy_location(statement, node) for statement in out]

    def visit_ImportFrom(self, node):
        if node.level or not renamed(node.module, self._names):
            return node
        kept = [item for item in node.names if not renamed(f"{node.module}.{item.name}", self._names)]
        other = [item for item in node.names if item not in kept]
        out = [ast.ImportFrom(node.module, kept, 0)] * bool(kept) + [ast.ImportFrom(self._new(node.module), other, 0)] * bool(other)
        return [ast.copy_location(statement, node) for statement in out]

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            space, colons, rest = node.value.partition("::")
            if colons and space in self._names:
                return ast.copy_location(ast.Constant(self._names[space] + colons + rest), node)
            if _MODULE.fullmatch(node.value) and renamed(node.value, self._names):
                return ast.copy_location(ast.Constant(self._new(node.value)), node)
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if node.attr in self._names and isinstance(node.value, ast.Attribute) and node.value.attr == "ops":
            return ast.copy_location(ast.Attribute(node.value, self._names[node.attr], node.ctx), node)
        return node

    def _new(self, module: str) -> str:
        top, dot, rest = module.partition(".")
        return self._names[top] + dot + rest


def _lies_in(repository: Path | None, module: str) -> bool:
    """Whether it was imported from the repository's own files: not the harness, nor what is installed into a folder there."""
    loaded = sys.modules.get(module)
    places = [getattr(loaded, "__file__", None) or "", *getattr(loaded, "__path__", [])][:1]
    if repository is None or not places or not places[0] or _is_harness(module):
        return False
    place = Path(places[0]).resolve()
    return place.is_relative_to(repository) and "site-packages" not in place.parts


def repository_of(module: str) -> Path | None:
    """The folder around this revision's `module` that is a git working tree."""
    place = Path(_find_here(module)).resolve()
    return next((folder for folder in (place, *place.parents) if (folder / ".git").exists()), None)


def _is_harness(module: str) -> bool:
    return module == HARNESS or module.startswith(HARNESS + ".") or HARNESS.startswith(module + ".")


def _is_loaded(module: str) -> bool:
    return module in sys.modules


def _find_in(folder: Path, package: str) -> str:
    for place in (folder, folder / "src"):
        if (place / package).is_dir() or (place / f"{package}.py").is_file():
            return str(place)
    raise NotThere(f"the other revision has no package {package!r}: name what holds the kernels with --package")


def _find_here(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RevisionError(f"the builders' module {module!r} has no file")
    origin = Path(spec.origin)
    return str(origin.parent.parent if spec.submodule_search_locations else origin.parent)


def _git(repository, *arguments, wrong: str, environment: Mapping[str, str] | None = None) -> str:
    command = ["git", "-C", os.fspath(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    except OSError as error:
        raise RevisionError(f"{wrong}: git does not run ({error})") from error
    if done.returncode:
        raise RevisionError(f"{wrong}: git says {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _drop_old(newest: Path) -> None:
    folders = sorted((f for f in newest.parent.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
    for folder in folders[:-_KEPT_CHECKOUTS]:
        if folder != newest:
            shutil.rmtree(folder, ignore_errors=True)
