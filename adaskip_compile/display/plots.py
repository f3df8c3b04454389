"""Plots, drawn by matplotlib where it is installed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaskip_compile.files.atomic_write import replace_file
from adaskip_passes.errors import FileError, OptionError

FORMATS = ("png", "svg", "pdf")
_SIZE = (7.5, 4.5)


def check_plot(file: str | Path) -> None:
    """Raise :class:`OptionError` if :func:`write_plot` cannot write ``file``: before hours of measuring."""
    if Path(file).suffix.lstrip(".") not in FORMATS:
        raise OptionError(f"--plot {file}: takes a file that ends in {', '.join(f'.{name}' for name in FORMATS)}")
    _figure()


def new_axes() -> Any:
    """Return a matplotlib ``Axes`` in a figure of its own, which a notebook shows.

    Raises:
        OptionError: matplotlib is not installed.
    """
    _figure()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=_SIZE, layout="constrained")[1]


def write_plot(file: str | Path, draw: Callable[[Any], object], **labels: str) -> None:
    """Let ``draw`` fill a matplotlib ``Axes`` with these labels (title, xlabel, ylabel) and write it to ``file``, whole or not at all.

    Raises:
        OptionError: The file's suffix is of no known format, or matplotlib is not installed.
        FileError: The file cannot be written.
    """
    check_plot(file)
    figure = _figure()(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set(**labels)
    axes.grid(alpha=0.3)
    draw(axes)
    data = io.BytesIO()
    figure.savefig(data, format=Path(file).suffix.lstrip("."), dpi=110)
    try:
        replace_file(Path(file), data.getvalue())
    except OSError as error:
        raise FileError(f"{file}: cannot be written ({error.strerror or error})") from error


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a plot needs matplotlib: pip install 'adaskip-compile[evaluation]'") from error
    return Figure
