"""Arguments that several commands take, and reading what they name.

PyTorch is imported where it is used: ``adaskip --help`` does not wait for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip_passes.errors import FileError, MissingFileError, OptionError

if TYPE_CHECKING:
    import torch

    from adaskip_compile.inspection.swept_plans import SweptPlan

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def add_counts(group: Any, *counts: tuple[str, int, str]) -> None:
    """Add options that take a number of 1 or more, each given by its name, its default and what it counts."""
    for name, default, what in counts:
        text = f"{what} (default: %(default)s)"
        group.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=text)


def add_model_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add MODEL and how to load it."""
    kinds = "a folder, a .gguf file, a hub id, or a short name: smollm2, gemma3-270m"
    parser.add_argument("model", metavar="MODEL", help=kinds, nargs="?" if optional else None)
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add in what dtype, where and with how many threads a model runs."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights (default: %(default)s)")
    parser.add_argument("--device", help="where to run, such as cuda (default: the CPU)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's choice)")


def load_model(arguments: argparse.Namespace, name: str | None = None) -> tuple[Any, Any]:
    """Return the model and tokenizer called ``name``, by default what ``arguments.model`` says."""
    import torch

    from adaskip_compile.checkpoints import load_checkpoint

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    named = arguments.model if name is None else name
    return load_checkpoint(named, dtype=getattr(torch, arguments.dtype), device=_device(arguments.device))


def read_texts(files: Sequence[str]) -> list[str]:
    """Return the contents of text files, UTF-8.

    Raises:
        MissingFileError: one is not there.
        FileError: one cannot be read, is not UTF-8, or is empty.
    """
    return [_read_text(Path(file)) for file in files]


def read_report(file: str) -> dict[str, Any]:
    """Return the run-time report in a file that ``adaskip run --json`` wrote.

    Raises:
        MissingFileError: It is not there.
        FileError: It is something else.
    """
    text = _read_text(Path(file))
    try:
        return {"sessions": json.loads(text)["report"]["sessions"]}
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file}: no report; 'adaskip run MODEL --json {file}' writes one") from error


def read_sweep(file: str) -> list[SweptPlan]:
    """Return the plans in a file that ``adaskip sweep --json`` wrote, with what was measured of each.

    Raises:
        MissingFileError: It is not there.
        FileError: It is something else.
    """
    from adaskip_compile.inspection.swept_plans import SweptPlan

    text = _read_text(Path(file))
    try:
        return [SweptPlan.of(row) for row in json.loads(text)["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file}: no sweep; 'adaskip sweep MODEL --json {file}' writes one") from error


def _read_text(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(f"{file}: there is no such file") from error
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: not a text file in UTF-8") from error
    if not text.strip():
        raise FileError(f"{file}: holds no text")
    return text


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    import torch

    if name.partition(":")[0] == "meta":
        raise OptionError(f"--device {name}: it holds no weights, so nothing runs there; 'adaskip inspect' reads none")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"--device {name}: PyTorch cannot use it here ({str(error).partition(chr(10))[0]})"
        ) from error
    return device
