"""pytest's own options, handed on to the fresh processes in which a test is run again: a kernel chosen by one must stay chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

# What selects, stops, lists, reports or counts belongs to the session, not to what its tests do.
_SESSION = {
    "--basetemp", "--cache-clear", "--capture", "--co", "--collect-only", "--color", "--config-file", "--deselect", "--dist",
    "--durations", "--durations-min", "--exitfirst", "--failed-first", "--ff", "--last-failed", "--last-failed-no-failures",
    "--lf", "--lfnf", "--looponfail", "--maxfail", "--maxprocesses", "--new-first", "--nf", "--numprocesses", "--pastebin",
    "--pdb", "--pdbcls", "--px", "--quiet", "--rootdir", "--setup-only", "--setup-plan", "--setup-show", "--show-capture",
    "--showlocals", "--stepwise", "--stepwise-reset", "--stepwise-skip", "--sw", "--sw-reset", "--sw-skip", "--tb", "--trace",
    "--tx", "--verbose", "--verbosity", "--",
}  # fmt: skip
_SESSION_FAMILIES = ("--benchmark-", "--breakeven-", "--cov", "--html", "--json-report", "--junit", "--log-", "--report-", "--no-cov")
_SHORT_WITH_VALUE = "kmncr"
_SHORT_FLAGS = set("xvqslhdf")
_SESSION_NAMES = {
    "cacheclear", "capture", "collectonly", "color", "css", "deselect", "dist", "distload", "durations", "durations_min",
    "failedfirst", "file_or_dir", "inifilename", "keyword", "last_failed_no_failures", "lf", "looponfail", "markexpr",
    "maxfail", "maxprocesses", "newfirst", "no_cov", "numprocesses", "override_ini", "pastebin", "plugins", "px",
    "reportchars", "rootdir", "quiet", "setuponly", "setupplan", "setupshow", "showcapture", "showlocals", "stepwise",
    "stepwise_reset", "stepwise_skip", "tbstyle", "trace", "tx", "usepdb", "usepdb_cls", "verbose", "xmlpath", "basetemp",
}  # fmt: skip
_SESSION_NAME_FAMILIES = ("benchmark_", "breakeven_", "cov", "html", "json_report", "junit", "log_", "report_")


def forwarded(config: pytest.Config, cache: str) -> list[str]:
    """The options of this invocation, without its paths and without what is the session's; then what must hold in any case.

    `cache` is a folder for pytest's cache, so that the session's own is left alone.
    """
    options = _kept(config.invocation_params.args, config.option.file_or_dir or [])
    has = config.pluginmanager.hasplugin
    if config.inipath is not None:
        options += ["-c", str(config.inipath)]
    options += ["--rootdir", str(config.rootpath), "-q", "-k", "", "-m", "", "--maxfail", "0"]  # whatever addopts say
    if has("cacheprovider"):
        options += ["-o", f"cache_dir={cache}"]
    if has("xdist") or has("xdist.plugin"):
        options.append("-n0")
    return options


def comparable(options: Mapping[str, Any]) -> dict[str, str]:
    """By name, the options that a fresh process must have as its session has them."""
    plain = (str, int, float, bool, type(None), list, tuple)
    mine = {n: v for n, v in options.items() if n not in _SESSION_NAMES and not n.startswith(_SESSION_NAME_FAMILIES)}
    return {name: repr(value) for name, value in mine.items() if isinstance(value, plain) and " at 0x" not in repr(value)}


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Why a fresh process did not run what its session runs; "" where their options are the same."""
    names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    said = [f"{name} is {here.get(name, 'unknown')} in this session and {there.get(name, 'unknown')} there" for name in names]
    return f"a fresh process has other options: {'; '.join(said)}" if said else ""


def _kept(arguments: Sequence[Any], paths: Sequence[str]) -> list[str]:
    words = [str(word) for word in arguments]
    positional = _positions(words, paths)
    kept: list[str] = []
    dropping = False  # the values of an option that was left out
    for at, word in enumerate(words):
        if at in positional:
            continue
        if word.startswith("-"):
            dropping = _is_the_session_s(word)
        if not dropping:
            kept.append(word)
    return kept


def _positions(words: Sequence[str], paths: Sequence[str]) -> set[int]:
    """Where the paths stand; a word that is also some option's value is taken for one where it follows an option."""
    found: set[int] = set()
    for path in set(paths):
        places = [at for at, word in enumerate(words) if word == path]
        places.sort(key=lambda at: at > 0 and words[at - 1].startswith("-") and "=" not in words[at - 1])
        found.update(places[: list(paths).count(path)])
    return found


def _is_the_session_s(word: str) -> bool:
    if word.startswith("--"):
        return word.partition("=")[0] in _SESSION or word.startswith(_SESSION_FAMILIES)
    return word[1:2] in _SHORT_WITH_VALUE or set(word[1:]) <= _SHORT_FLAGS
