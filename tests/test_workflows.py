"""The GitHub workflows: they parse, their commands are ones that the command line takes, and none gives away its rights."""

import re
import shlex
from pathlib import Path

import pytest

from sparse_attention.breakeven import cli

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HARNESS = "python -m sparse_attention.breakeven "


def load(name):
    text = (ROOT / ".github" / "workflows" / name).read_text()
    return yaml.safe_load(text)


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow):
    return [step["run"] for step in steps(workflow) if "run" in step]


@pytest.fixture(params=[path.name for path in FILES])
def workflow(request):
    return load(request.param)


def test_the_workflows_are_there():
    assert [path.name for path in FILES] == ["comment.yml", "gate.yml", "nightly-gpu.yml", "tests.yml"]


def test_structure(workflow):
    assert workflow["name"] and True in workflow  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"], "a workflow says which rights it needs"
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 180
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4"))
        assert set(step) <= {"uses", "run", "name", "id", "if", "env", "with", "continue-on-error"}, step


def test_no_shell_logic(workflow):
    """One command a step, at most after what the README has before it; what decides lives in the command line."""
    for command in commands(workflow):
        assert not re.search(r"[|;`\n]|\$\(|\b(if|for|while|grep|sed|jq|curl)\b", command.strip()), command
        assert command.count("&&") <= command.count('pip install -e ".[dev]" && pytest ')


def test_no_text_of_others_is_pasted_into_a_command(workflow):
    for command in commands(workflow):
        assert "${{" not in command, "pass it through env"


def test_the_harness_takes_these_commands(workflow):
    parser = cli._parser()
    for command in commands(workflow):
        if not command.startswith(HARNESS):
            continue
        words = shlex.split(re.sub(r"\$\w+", "0123abc", command))
        options = parser.parse_args(words[3:])
        assert callable(options.command)


def test_every_command_line_explains_itself(workflow, capsys):
    for name in {command.split()[3] for command in commands(workflow) if command.startswith(HARNESS)}:
        with pytest.raises(SystemExit) as done:
            cli.main([name, "--help"])
        assert done.value.code == 0 and f"sparse_attention.breakeven {name}" in capsys.readouterr().out


def test_variables_of_commands_are_defined(workflow):
    for step in steps(workflow):
        used = set(re.findall(r"\$(\w+)", step.get("run", "")))
        assert used <= set(step.get("env", {})), step


def test_the_readmes_commands_on_every_python():
    workflow = load("tests.yml")
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    readme = (ROOT / "README.md").read_text()
    both = [command for command in commands(workflow) if "pytest" in command]
    assert len(both) == 2 and all(command in readme for command in both)


def test_what_runs_others_code_may_not_write():
    for name in ("gate.yml", "tests.yml"):
        workflow = load(name)
        assert workflow["permissions"] == {"contents": "read"}
        assert "secrets." not in str(workflow) and "pull_request_target" not in str(workflow[True])


def test_what_may_comment_runs_no_code_of_the_pull_request():
    workflow = load("comment.yml")
    assert list(workflow[True]) == ["workflow_run"] and workflow[True]["workflow_run"]["workflows"] == [load("gate.yml")["name"]]
    (checkout,) = [step for step in steps(workflow) if step.get("uses", "").startswith("actions/checkout")]
    assert "with" not in checkout, "the default branch"
    assert [command.split()[3] for command in commands(workflow)] == ["comment"]
    (download,) = [step for step in steps(workflow) if step.get("uses", "").startswith("actions/download-artifact")]
    names = [step["with"]["name"] for step in steps(load("gate.yml")) if step.get("uses", "").startswith("actions/upload-artifact")]
    assert names == [download["with"]["name"]] and download["with"]["path"] in commands(workflow)[0].split()


def test_the_gates_findings_are_always_kept():
    gate = steps(load("gate.yml"))
    upload = gate[-1]
    assert upload["uses"].startswith("actions/upload-artifact") and upload["if"] == "${{ always() }}"
    (report,) = [step for step in gate if " report " in step.get("run", "")]
    assert report["if"] == "${{ !cancelled() }}"
    written = [word for word in shlex.split(report["run"]) if word.endswith((".html", ".md", ".json"))]
    assert set(written) <= set(upload["with"]["path"].split())
    assert not any(step.get("continue-on-error") for step in gate)
