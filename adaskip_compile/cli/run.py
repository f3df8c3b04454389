"""Generate text with a model, skipping what a plan or a profile says.

With --plan, that plan is used. With --profile, one is made from it. With --max-loss, a plan for the prompt is found that
loses no more, which takes minutes, once. With none of them everything runs, compiled.

A prompt goes through the tokenizer's chat template, where it has one; --raw continues it as it stands. Text is shown as it is
decoded. Several prompts are answered one after the other. With --chat, a conversation goes on from line to line of
standard input: an empty line is nothing, /new begins anew, Ctrl-C ends an answer, and /exit or the end of the input the talk.

examples:
  adaskip run smollm2 --plan plan.json --prompt 'What is the capital of France?'
  adaskip run smollm2 --max-loss 0.02 --prompt-file question.txt --prompt-file other.txt
  adaskip run smollm2 --raw --prompt 'The capital of France is' --temperature 0.7 --top-p 0.9 --seed 1
  adaskip run smollm2 --chat --system 'Answer in one sentence.'
  cat page.txt | adaskip run smollm2 --prompt-file -
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from adaskip_compile.cli import arguments as common
from adaskip_compile.cli.output import Output
from adaskip_compile.planning.policy_names import POLICIES
from adaskip_passes.errors import OptionError

if TYPE_CHECKING:
    from adaskip_compile.cli.answers import Answer, Conversation

_STDIN, _NEW, _EXIT = "-", "/new", "/exit"
_TITLE_WIDTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
    common.add_model_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="what to answer; may be repeated"
    )
    prompts.add_argument(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        help="a text file to answer, or - for standard input",
    )
    prompts.add_argument("--chat", action="store_true", help="go on with a conversation, after these prompts")
    prompts.add_argument("--raw", action="store_true", help="continue a prompt as it stands, without a chat template")
    prompts.add_argument("--system", metavar="TEXT", help="what the model is told before a prompt")
    guide = parser.add_mutually_exclusive_group()
    guide.add_argument("--plan", metavar="PATH", help="a file that 'adaskip plan' wrote for this model")
    guide.add_argument("--profile", metavar="PATH", help="a file that 'adaskip profile' wrote for this model")
    guide.add_argument(
        "--max-loss", type=float, metavar="NATS", help="what the text may lose a token: 0.02 is 2 %% of perplexity"
    )
    parser.add_argument(
        "--max-new-tokens", type=common.positive, default=64, metavar="N", help="of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0 takes the likeliest (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="with --temperature, draw from the likeliest tokens of this share"
    )
    parser.add_argument("--skip", type=int, metavar="N", help="with --profile, sublayers to skip (default: 8)")
    parser.add_argument(
        "--policy", choices=tuple(POLICIES), help="with --profile, how to choose them (default: adaskip)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="what sampling and the policy 'random' draw with (default: 0)"
    )
    parser.add_argument("--inner", choices=("inductor", "eager"), help="the backend that compiles each region")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Carry the command out and return its exit code."""
    prompts = _prompts(arguments)
    sampling = _sampling(arguments)
    model, tokenizer = common.load_model(arguments)
    import torch

    import adaskip_compile
    from adaskip_compile.cli.answers import Answering, Conversation, Sampling

    answering = Answering(model, tokenizer, Sampling(**sampling), arguments.max_new_tokens, output.write)
    begin = partial(Conversation, answering, arguments.system)
    # Refused, where it is, before a plan is looked for.
    refusable = begin() if arguments.chat or arguments.system is not None else None
    conversation = refusable if arguments.chat else None
    options = _options(arguments)
    if arguments.max_loss is not None:
        options |= {"tokenizer": tokenizer, "max_loss": arguments.max_loss, "progress": output.watched}
    adaskip_compile.compile(model, **options)
    torch.manual_seed(arguments.seed or 0)

    def ask(prompt: str) -> Answer:
        if conversation is not None:
            return conversation.ask(prompt)
        if arguments.raw or not (tokenizer.chat_template or arguments.system):
            return answering.continued(prompt)
        return begin().ask(prompt)

    answers = []
    for number, prompt in enumerate(prompts, start=1):
        if len(prompts) > 1:
            output.say(f"== {number} of {len(prompts)}: {_first_words(prompt)}")
        answers.append(_shown(prompt, ask(prompt), output))
    if conversation is not None:
        answers += _chat(conversation, output)
    report = adaskip_compile.report(model)
    output.say(report)
    output.results({"model": arguments.model, "answers": answers, "report": report.to_dict()})
    return 0


def _shown(prompt: str, answer: Answer, output: Output) -> dict[str, Any]:
    """Say how long ``answer``, whose text has been shown, took; return what JSON shows of it."""
    output.say(f"\n[{answer}]\n")
    return {"prompt": prompt, **answer.to_dict()}


def _chat(conversation: Conversation, output: Output) -> list[dict[str, Any]]:
    """Answer line by line until the input ends. An interrupt ends the answer that is being given, not the conversation."""
    answers = []
    for line in _lines(output):
        if line == _NEW:
            conversation.begin_anew()
            continue
        try:
            answer = conversation.ask(line)
        except KeyboardInterrupt:
            output.say("\n[interrupted: this question and its answer are forgotten]\n")
        else:
            answers.append(_shown(line, answer, output))
    return answers


def _lines(output: Output) -> Iterator[str]:
    """Yield the lines of standard input that hold something, up to its end or to ``/exit``."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - input() edits lines with it
    while True:
        try:
            line = input("> " if output.watched else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise OptionError("standard input: not text in UTF-8") from error
        if line == _EXIT:
            return
        if line:
            yield line


def _first_words(prompt: str) -> str:
    return shorten(prompt, width=_TITLE_WIDTH, placeholder=" ...")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts in the order of --prompt, then --prompt-file.

    Raises:
        OptionError: There is none, or one is empty, or what is asked for excludes each other.
    """
    if not (arguments.prompt or arguments.prompt_file or arguments.chat):
        raise OptionError("one of --prompt, --prompt-file and --chat is needed")
    if arguments.raw and (arguments.chat or arguments.system is not None):
        raise OptionError("--raw goes without a chat template, which --chat and --system need")
    from_stdin = arguments.prompt_file.count(_STDIN)
    if from_stdin > 1 or (from_stdin and arguments.chat):
        raise OptionError("--prompt-file - takes all of standard input: give it once, and not with --chat")
    if not -(2**63) <= (arguments.seed or 0) < 2**63:
        raise OptionError(f"--seed {arguments.seed}: takes a number of 64 bits")
    for prompt in arguments.prompt:
        if not prompt.strip():
            raise OptionError(f"--prompt {prompt!r}: takes some text to answer")
    return [*arguments.prompt, *(_read(file) for file in arguments.prompt_file)]


def _read(file: str) -> str:
    if file != _STDIN:
        return common.read_texts([file])[0]
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise OptionError("--prompt-file -: not text in UTF-8") from error
    if not text.strip():
        raise OptionError("--prompt-file -: standard input holds no text")
    return text


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    if not (math.isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise OptionError(f"--temperature {arguments.temperature}: takes 0 or more")
    if arguments.top_p is not None and not (arguments.temperature and 0 < arguments.top_p <= 1):
        raise OptionError(f"--top-p {arguments.top_p}: takes a share above 0, up to 1, and a --temperature above 0")
    return {
        "temperature": arguments.temperature,
        "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
    }


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what ``compile`` takes; a seed is for sampling too, so without a profile it is none of its options."""
    names = ("profile", "skip", "policy", "inner", *(("seed",) if arguments.profile is not None else ()))
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.plan is not None:
        from adaskip_compile.planning.skip_plan import SkipPlan

        options["plan"] = SkipPlan.load(arguments.plan)
    return options
