"""The sticky comment, against a stand-in for `gh` that keeps what it is sent."""

import json
import os
import stat
import sys

import pytest

from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.report.sticky import MARK, MOST

HEAD = "5ha" + 37 * "0"
GH = f"""#!{sys.executable}
import json, os, sys
folder = os.path.dirname(__file__)
_, path, *options = sys.argv[1:]
method = options[options.index("--method") + 1]
sent = json.load(sys.stdin) if "--input" in options else None
with open(os.path.join(folder, "calls"), "a") as f:
    f.write(json.dumps([method, path, sent]) + "\\n")
answers = json.load(open(os.path.join(folder, "answers.json")))
if path not in answers:
    sys.exit("HTTP 403: Resource not accessible by integration")
sys.stdout.write(answers[path])
"""
PULLS = "repos/me/it/pulls?state=open&per_page=100"
COMMENTS = "repos/me/it/issues/7/comments?per_page=100"
THIS_PULL = json.dumps([{"number": 3, "head": {"sha": "other"}}]) + json.dumps([{"number": 7, "head": {"sha": HEAD}}])  # two pages
OURS = {"id": 42, "body": f"{MARK}\n\nold", "user": {"type": "Bot"}}
QUOTED = {"id": 41, "body": f"> {MARK}", "user": {"type": "User"}}
FORGED = {"id": 40, "body": f"{MARK} mine", "user": {"type": "User"}}


@pytest.fixture
def gh(tmp_path, monkeypatch):
    """A folder whose answers.json says what each path returns; calls() lists what was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gh").write_text(GH)
    (folder / "gh").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def calls(**answers):
        (folder / "answers.json").write_text(json.dumps(answers.pop("answers")))
        return lambda: [json.loads(line) for line in (folder / "calls").read_text().splitlines()]

    return calls


@pytest.fixture
def report(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "comment.md").write_text(f"{MARK}\n\n### Break-even: PASS\n")
    return folder


def run(folder, *more):
    return main(["comment", str(folder), "--head", HEAD, "--repository", "me/it", *more])


def test_the_first_time_it_is_posted(gh, report, capsys):
    posted = "repos/me/it/issues/7/comments"
    calls = gh(answers={PULLS: THIS_PULL, COMMENTS: json.dumps([QUOTED, FORGED]), posted: "{}"})
    assert run(report, "--link", "https://example.org/run/1") == 0
    method, path, sent = calls()[-1]
    assert (method, path) == ("POST", posted)
    assert sent["body"].startswith(f"{MARK}\n\n### Break-even: PASS") and "(https://example.org/run/1)" in sent["body"]
    assert capsys.readouterr().out == "commented on #7\n"


def test_afterwards_it_is_updated(gh, report, capsys):
    updated = "repos/me/it/issues/comments/42"
    calls = gh(answers={PULLS: THIS_PULL, COMMENTS: json.dumps([QUOTED]) + "\n" + json.dumps([OURS]), updated: "{}"})
    assert run(report) == 0
    assert [call[:2] for call in calls()] == [["GET", PULLS], ["GET", COMMENTS], ["PATCH", updated]]
    assert capsys.readouterr().out == "updated the comment on #7\n"


def test_a_commit_that_is_no_head_any_more_gets_no_comment(gh, report, capsys):
    calls = gh(answers={PULLS: json.dumps([{"number": 7, "head": {"sha": "newer"}}])})
    assert run(report) == 0
    assert len(calls()) == 1 and "nothing to say" in capsys.readouterr().out


def test_a_gate_that_left_no_report_is_told(tmp_path, capsys):
    assert main(["comment", str(tmp_path), "--head", HEAD, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(MARK) and "NOTHING CHECKED" in said


def test_a_text_of_others_is_cut_and_marked(tmp_path, capsys):
    (tmp_path / "comment.md").write_text("x" * 200_000)
    assert main(["comment", str(tmp_path), "--head", HEAD, "--link", "https://example.org", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(MARK) and len(said) < MOST + 200 and said.rstrip().endswith("(https://example.org)")


def test_a_refusal_is_exit_2_with_its_reason(gh, report, capsys):
    gh(answers={})
    assert run(report) == 2
    assert "HTTP 403" in capsys.readouterr().err


def test_without_gh_it_says_so(report, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert run(report) == 2
    assert "gh, the GitHub CLI, does not run" in capsys.readouterr().err


def test_a_repository_has_an_owner_and_a_name(report, capsys):
    assert main(["comment", str(report), "--head", HEAD, "--repository", "it"]) == 2
    assert "--repository must be owner/name, got 'it'" in capsys.readouterr().err
