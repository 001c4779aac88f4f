"""The command line is of one piece: what every command takes, and what those take that measure."""

import pytest

from sparse_attention.breakeven.cli import main

MEASURING = ("run", "gate", "plan", "study", "calibrate", "proof")
READING = ("list", "selftest", "report", "ingest", "regate")


@pytest.mark.parametrize("command", (*MEASURING, *READING))
def test_options_are_the_same_everywhere(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    wanted = ["--cases PATTERN", "--json FILE"]
    wanted += ["--budget TIME", "--resume FILE", "--dry-run", "--quiet"] * (command in MEASURING)
    assert [option for option in wanted if option not in shown] == []


def test_selftest_of_chosen_noise(capsys):
    assert main(["selftest", "--runs", "20", "--cases", "bimodal", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "bimodal" in shown.out and "drift" not in shown.out and not shown.err
    assert main(["selftest", "--cases", "silence"]) == 13
    assert "no noise matches 'silence': there are independent, " in capsys.readouterr().err


def test_selftest_says_how_long_it_will_take(capsys):
    assert main(["selftest", "--runs", "5", "--cases", "drift"]) in (0, 1)
    assert "drift, 0% slower" in capsys.readouterr().err
