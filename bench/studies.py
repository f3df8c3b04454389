"""What all studies of quality share: their arguments, texts, profiles, and the page that each writes to ``results``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import adaskip_compile
from adaskip_compile.checkpoints import load_checkpoint
from adaskip_compile.evaluation.candidates import complete_profile
from adaskip_compile.evaluation.domains import mixed_windows, read_domains
from adaskip_compile.evaluation.likelihood import window_nlls
from adaskip_compile.evaluation.scores import Scores
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_compile.texts import Domain

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "transformers")


def study_parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser of what every study takes, and of one integer for each of ``defaults``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id or short name")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=DIR", help="folders of text: a domain each")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the page and plots go")
    return parser


class Study:
    """One run of a study: the model, the domains, and the lines of its page."""

    def __init__(self, name: str, question: str, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        self.name, self.arguments = name, arguments
        self.model, self.tokenizer = load_checkpoint(arguments.model, device=arguments.device)
        self.domains = read_domains(arguments.texts)
        # Pages are read elsewhere: where a model lies on this machine is nobody's business.
        self.shown = Path(arguments.model).stem if Path(arguments.model).exists() else arguments.model
        self.stem = f"{name}_{self.shown.replace('/', '-')}"
        self.lines = [f"# {question}", "", self._circumstances(), ""]

    def profile(
        self,
        domains: Sequence[Domain] | None = None,
        *,
        policies: Sequence[str] = (),
        compensations: Sequence[str] = (),
        most: int = 0,
    ) -> Profile:
        """Return what ``--samples`` windows of ``--length`` tokens say, of the profiling halves of ``domains`` in turn.

        With what ``policies`` and ``compensations`` need to skip up to ``most`` sublayers, learned from the same windows.
        """
        how = self.arguments
        chosen = mixed_windows(domains or self.domains, self.tokenizer, "profiling", how.samples, how.length)
        found = adaskip_compile.profile(self.model, chosen, max_samples=how.samples, progress=False)
        return complete_profile(self.model, found, chosen, policies, compensations, most=most, progress=False)

    def windows(self) -> dict[str, list[torch.Tensor]]:
        """Return ``--windows`` windows of ``--length`` tokens of the evaluation half of each domain, by its name."""
        how = self.arguments
        return {
            domain.name: domain.windows(self.tokenizer, "evaluation", how.windows, how.length)
            for domain in self.domains
        }

    def nlls(self, plan: SkipPlan, windows: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, Scores]:
        """Return the NLL of each window under ``plan``, by domain."""
        adaskip_compile.compile(self.model, plan, inner="eager")
        return {name: Scores(window_nlls(self.model, some)) for name, some in windows.items()}

    def say(self, *lines: str) -> None:
        """Add lines to the page."""
        self.lines.extend(lines)
        print("\n".join(lines), flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a Markdown table to the page; its first column is text and the others are numbers."""
        self.say(f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}")
        self.say(*(f"| {' | '.join(map(str, row))} |" for row in rows), "")

    def plot(self, title: str, xlabel: str, ylabel: str, draw: Callable[[Any], None], *, suffix: str = "") -> None:
        """Let ``draw`` fill the axes of a plot, and put the plot on the page."""
        from adaskip_compile.display.plots import write_plot

        file = self.arguments.out / f"{self.stem}{suffix}.png"
        write_plot(file, draw, title=title, xlabel=xlabel, ylabel=ylabel)
        self.say(f"![{title}]({file.name})", "")

    def write(self) -> None:
        """Write the page."""
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        (self.arguments.out / f"{self.stem}.md").write_text("\n".join(self.lines).rstrip() + "\n")

    @property
    def machine(self) -> str:
        """Where this runs, as pages tell it: dtype, device and versions."""
        versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in VERSIONS)
        return f"float32, {self.model.device.type}, Python {platform.python_version()}, {versions}"

    def _circumstances(self) -> str:
        given = {
            name: value
            for name, value in vars(self.arguments).items()
            if name not in ("texts", "model", "device") and value is not None and not isinstance(value, Path)
        }
        sizes = ", ".join(
            f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in given.items()
        )
        texts = ", ".join(domain.name for domain in self.domains)
        return f"`python -m bench.{self.name} --model {self.shown}`: {sizes}; domains: {texts}. {self.machine}."


def mean_over_domains(scores: Mapping[str, Scores]) -> float:
    """Return the mean over domains of their mean scores: each domain counts the same."""
    return sum(each.mean for each in scores.values()) / len(scores)
