import pytest

from vidworld import cli
from vidworld.errors import DivergedError, PreemptedError


def test_help_lists_every_command(capsys):
    assert cli.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_no_arguments_is_help(capsys):
    assert cli.run([]) == 0
    assert "usage: vidworld" in capsys.readouterr().out


def test_typo_is_one_line_and_exit_code_two(capsys):
    assert cli.run(["rolout", "x"]) == 2
    printed = capsys.readouterr().err
    assert printed == "vidworld: error: unknown command 'rolout'; did you mean 'rollout'?\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_refuses_unknown_flags(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run([name, "--help"])
    assert stopped.value.code == 0
    assert f"vidworld {name}" in capsys.readouterr().out
    assert cli.run([name, "--no-such-flag-at-all"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize(("error", "code"), [(PreemptedError("saved"), 3), (DivergedError("nan"), 4)])
def test_exit_codes_of_stopped_runs(error, code, monkeypatch, capsys):
    def stop(arguments, prog):
        raise error

    monkeypatch.setattr("vidworld.demo.main", stop)
    assert cli.run(["demo"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_faults_of_our_own_keep_their_traceback(monkeypatch):
    def fail(arguments, prog):
        raise ZeroDivisionError

    monkeypatch.setattr("vidworld.demo.main", fail)
    with pytest.raises(ZeroDivisionError):
        cli.run(["demo"])
