from __future__ import annotations

import runpy

import pytest

import adaskip_compile
from adaskip_compile import cli
from adaskip_compile.cli import COMMANDS, main, plan
from adaskip_passes.errors import OptionError

NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert f"\n  adaskip {name}" in text
    assert "--json" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in NAMES)


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("adaskip-compile")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["plan"], ["plan", "p.json", "--skip", "two"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "meant"), [(["insepct"], "inspect"), (["run", "m", "--inner", "egaer"], "eager"), (["zzzz"], None)]
)
def test_what_was_meant_is_named(arguments: list[str], meant: str | None, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert ("did you mean" in (err := capsys.readouterr().err)) == (meant is not None)
    assert meant is None or f"did you mean '{meant}'?" in err


def test_python_runs_the_package_as_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["adaskip_compile", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("adaskip_compile", run_name="__main__")
    assert capsys.readouterr().out.split()[-1] == adaskip_compile.__version__


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make the command ``plan`` raise what the test says, and run it."""

    def run(error: BaseException, *flags: str) -> int:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(plan, "run", fail)
        return main(["plan", "p.json", "--out", "q.json", *flags])

    return run


def test_a_mistake_is_one_line_and_2(failing, capsys: pytest.CaptureFixture[str]):
    assert failing(OptionError("skip: too many")) == cli.MISTAKE == 2
    assert capsys.readouterr() == ("", "adaskip: error: skip: too many\n")


def test_an_interrupt_is_130(failing, capsys: pytest.CaptureFixture[str]):
    assert failing(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "adaskip: interrupted\n"


def test_an_unexpected_failure_is_one_line_and_1(failing, capsys: pytest.CaptureFixture[str]):
    assert failing(ZeroDivisionError("division by zero\nmore")) == 1
    assert capsys.readouterr().err == "adaskip: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_debug_shows_where(failing, capsys: pytest.CaptureFixture[str]):
    assert failing(OptionError("skip: too many"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
