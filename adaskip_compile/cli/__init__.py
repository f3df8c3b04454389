"""The command line ``adaskip``: one file a command, each a thin layer over the library.

Exit codes: 0 done, 1 an unexpected failure, 2 a mistake in what was asked for, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from adaskip_compile.cli import cache, demo, diff, export, inspect, plan, profile, run, sweep, tune
from adaskip_compile.cli.completion import SHELLS, PrintCompletion
from adaskip_compile.cli.output import Output, complain
from adaskip_compile.files.versioned_json import producer
from adaskip_passes.errors import AdaSkipError

COMMANDS = (demo, profile, plan, tune, inspect, run, sweep, export, diff, cache)

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

_INVALID = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")

_DESCRIPTION = """\
Make a decoder faster by not running the sublayers that barely change its residual stream."""

_EXAMPLES = """\
examples:
  adaskip demo
  adaskip profile smollm2 --out profile.json
  adaskip plan profile.json --skip 8 --out plan.json
  adaskip inspect smollm2 --profile profile.json --plan plan.json
  adaskip run smollm2 --plan plan.json --prompt 'What is the capital of France?'
  adaskip sweep smollm2 --max-loss 0.3 --out plan.json
  adaskip export smollm2 --plan plan.json --out exported

'adaskip COMMAND --help' tells more about each.

exit codes: 0 done, 1 failed, 2 a mistake in what was asked for, 130 interrupted
completion: adaskip --print-completion bash > ~/.local/share/bash-completion/completions/adaskip"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``argv`` is without the program's name."""
    # torchao, where it is installed, registers its enums in a way that torch has since deprecated: nobody here can mend that.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        arguments = command_parser().parse_args(argv)
    except AdaSkipError as error:
        complain(f"error: {error}")
        return MISTAKE
    try:
        return arguments.run(arguments, Output(arguments.json))
    except KeyboardInterrupt:
        return _stop(arguments, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except AdaSkipError as error:
        return _stop(arguments, f"error: {error}", MISTAKE)
    except Exception as error:  # noqa: BLE001 - whatever it is, a person gets one line
        line = str(error).strip().partition("\n")[0]
        return _stop(arguments, f"{type(error).__name__}: {line} (--debug shows where)", FAILED)


class _Parser(argparse.ArgumentParser):
    """A parser that names what was probably meant, where a command or a value is none of those it can be."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with 2."""
        if found := _INVALID.search(message):
            given, known = found.groups()
            if close := difflib.get_close_matches(given, re.findall(r"[\w-]+", known), n=1):
                message = f"{message}; did you mean {close[0]!r}?"
        super().error(message)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("adaskip", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=producer())
    completion = "print a script for the shell to complete command lines with, and exit"
    parser.add_argument("--print-completion", choices=SHELLS, action=PrintCompletion, help=completion)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        summary, _, details = (module.__doc__ or "").partition("\n\n")
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=summary, description=summary, epilog=details, formatter_class=raw)
        module.add_arguments(command)
        command.add_argument("--json", metavar="PATH", help="also write the results as JSON; '-' is standard output")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def _stop(arguments: argparse.Namespace, line: str, code: int) -> int:
    if arguments.debug:
        traceback.print_exc()
    complain(line)
    return code
