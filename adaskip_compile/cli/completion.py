"""Completion of command lines by the shell, as scripts that are made once: completing runs no Python."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from adaskip_passes.errors import OptionError

SHELLS = ("bash", "zsh", "fish", "tcsh")

_FILES = ("FILE", "MODEL", "PATH", "PROFILE", "PT2")


class PrintCompletion(argparse.Action):
    """The option that prints the script for one shell and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Print the script and exit."""
        print(completion_script(parser, str(values)))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return what to put into a shell's completion folder.

    Raises:
        OptionError: The package that writes such scripts is not installed, or too old for this shell.
    """
    try:
        import shtab
    except ImportError as error:
        raise OptionError("--print-completion needs shtab: pip install 'adaskip-compile[completion]'") from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise OptionError(f"--print-completion {shell} needs a newer shtab: pip install --upgrade shtab")
    _complete_files(parser, shtab.FILE)
    return shtab.complete(parser, shell)


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    for action in parser._actions:
        if action.metavar in _FILES:
            action.complete = files  # type: ignore[attr-defined]  # the attribute that shtab looks for
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
