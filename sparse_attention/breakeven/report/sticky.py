"""One comment on a pull request, posted once and then updated, through the GitHub CLI `gh`.

It runs with rights that the measured code must not have, in a workflow of its own. What it is handed by that code, the text, is
only ever data: the pull request is found by the commit that GitHub itself says the measuring workflow ran for.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

FILE = "comment.md"  # in the folder of a report
MARK = "<!-- breakeven -->"  # how a comment of ours begins, by which it is found again
MOST = 60_000  # characters; GitHub takes 65,536


class GitHubError(ValueError):
    """`gh` is missing or refused."""


def text(folder: Path, link: str = "") -> str:
    """The comment that `report` left in `folder`; one that says so where it left none."""
    file = folder / FILE
    if file.is_file():
        body = file.read_text(errors="replace")
        body = body if body.startswith(MARK) else f"{MARK}\n\n{body}"
    else:
        body = f"{MARK}\n\n### Break-even: ❌ NOTHING CHECKED\n\nThe gate ended before it had a report."
    return body[:MOST].rstrip() + (f"\n\n[The run and its whole report]({link})" if link else "") + "\n"


def post(repository: str, head: str, body: str) -> str:
    """Post or update the comment on the open pull request whose head is the commit `head`; says what was done."""
    opened = _api(f"repos/{repository}/pulls?state=open&per_page=100")
    numbers = [request["number"] for request in opened if request["head"]["sha"] == head]
    if not numbers:
        return f"no open pull request of {repository} has the head {head[:10]}: nothing to say"
    number = int(numbers[0])
    own = [
        found["id"]
        for found in _api(f"repos/{repository}/issues/{number}/comments?per_page=100")
        if found["body"].startswith(MARK) and found["user"]["type"] == "Bot"
    ]
    if own:
        _api(f"repos/{repository}/issues/comments/{int(own[0])}", "PATCH", {"body": body})
        return f"updated the comment on #{number}"
    _api(f"repos/{repository}/issues/{number}/comments", "POST", {"body": body})
    return f"commented on #{number}"


def _api(path: str, method: str = "GET", data: dict[str, Any] | None = None) -> Any:
    command = ["gh", "api", path, "--method", method]
    command += ["--paginate"] if method == "GET" else ["--input", "-"]
    try:
        done = subprocess.run(command, input=data and json.dumps(data), capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GitHubError(f"gh, the GitHub CLI, does not run: {error}") from error
    if done.returncode:
        raise GitHubError(f"gh api {path} failed: {done.stderr.strip() or done.stdout.strip()[:300]}")
    return _pages(done.stdout)


def _pages(text: str) -> Any:
    """The pages of a paginated answer follow one another: lists are joined."""
    decoder, pages, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        page, end = decoder.raw_decode(text, at)
        pages.append(page)
        at = end + len(text[end:]) - len(text[end:].lstrip())
    if all(isinstance(page, list) for page in pages):
        return [item for page in pages for item in page]
    return pages[0]
