from __future__ import annotations

import importlib
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaskip_compile
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.runtime import variants
from adaskip_passes.errors import FileError, PassError, VerificationError
from adaskip_passes.pipeline import verifier
from tests.models import plain, tiny, tokens

ROOT = Path(__file__).parents[3]
ATTENTION, FFN = "model.layers.0.self_attn", "model.layers.1.mlp"

BROKEN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from adaskip_passes.ir.graph import call
from adaskip_passes.pipeline.pipeline import PassResult


@dataclass(frozen=True)
class WidenOutput:
    """Give the first output another dtype, which no pass may."""

    name: ClassVar[str] = "widen-output"
    crash: bool = False

    def apply(self, gm, stream):
        output = gm.graph.output_node()
        first, *rest = output.args[0]
        with gm.graph.inserting_before(output):
            wide = call(gm.graph, "to", first, torch.float64)
        output.args = ((wide, *rest),)
        if self.crash:
            raise KeyError("output")
        return PassResult(stream, True, 1)
'''


def run(folder: Path | None, **options):
    model = tiny("llama")
    plan = SkipPlan.from_scales({ATTENTION: 0.9, FFN: 1.1})
    adaskip_compile.compile(model, plan, inner="eager", debug_dir=folder, **options)
    model.generate(tokens(length=6), max_new_tokens=3, do_sample=False)
    return model


def repro(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "passes"), **environment}
    command = [sys.executable, str(folder / "repro.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts the broken pass, with its options, in the middle of every pipeline."""
    (tmp_path / "widen_output.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "widen_output", raising=False)
    module = importlib.import_module("widen_output")
    skip_passes = variants.skip_passes

    def install(**options: bool) -> None:
        def passes(*how):
            probes, skips, dead = skip_passes(*how)
            return probes, skips, module.WidenOutput(**options), dead

        monkeypatch.setattr(variants, "skip_passes", passes)

    return install


def test_each_specialised_graph_has_a_folder(tmp_path: Path):
    run(tmp_path / "debug")
    folders = sorted((tmp_path / "debug").iterdir())
    assert [folder.name for folder in folders][:2] == [
        "001-LlamaForCausalLM-prefill-2-skipped-0-probed",
        "002-LlamaForCausalLM-decode-2-skipped-0-probed",
    ]
    first = folders[0]
    steps = [
        "01-simplify-masks",
        "02-straighten-stream",
        "03-append-in-place",
        "04-merge-equal-nodes",
        "05-narrow-rows",
        "06-eliminate-dead-code",
        "07-outline-regions",
        "08-insert-probes",
        "09-skip-sublayers",
        "10-eliminate-dead-code",
    ]
    others = {"00-captured.txt", "graph.json", "history.txt", "repro.py", "sublayers.txt"}
    files = {f"{step}.{kind}" for step in steps for kind in ("txt", "diff")}
    assert {file.name for file in first.iterdir()} == files | others
    captured, after = (first / "00-captured.txt").read_text(), (first / "10-eliminate-dead-code.txt").read_text()
    assert "model.layers.0.self_attn.q_proj" in captured
    assert "model.layers.0.self_attn.q_proj.weight)" not in after
    assert "adaskip_scales" in (first / "09-skip-sublayers.diff").read_text()
    assert (first / "08-insert-probes.diff").read_text() == ""
    assert (
        "9 skip-sublayers{paths=('model.layers.0.self_attn', 'model.layers.1.mlp')}\n    modified, matched 2"
        in (first / "history.txt").read_text()
    )


def test_the_script_does_again_what_was_done(tmp_path: Path):
    run(tmp_path)
    folder = next(tmp_path.glob("*-decode-2-skipped-0-probed"))
    found = repro(folder)
    assert (found.returncode, found.stderr) == (0, "")
    for diff in folder.glob("*.diff"):
        assert diff.read_text() in found.stdout
    assert found.stdout.endswith("# the last graph is that of 08-eliminate-dead-code.txt\n")


def test_the_script_tells_where_the_last_graph_is_another_one(tmp_path: Path):
    run(tmp_path)
    folder = next(tmp_path.glob("*-decode-2-skipped-0-probed"))
    last = folder / "08-eliminate-dead-code.txt"
    last.write_text(last.read_text().replace("%logits", "%logit"))
    found = repro(folder)
    assert found.returncode == 1
    assert found.stderr.startswith("the last graph is not that of 08-eliminate-dead-code.txt:\n--- before")


def run_again(folder: Path) -> int:
    """Run the script of a folder in this process."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "repro.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "mamba"])
def test_the_script_makes_the_very_graph_that_was_run(family: str, tmp_path: Path):
    model = tiny(family)
    paths = adaskip_compile.analyze(model, input_ids=tokens(length=6)).paths
    adaskip_compile.compile(model, SkipPlan.from_scales({paths[0]: 0.9}), inner="eager", debug_dir=tmp_path)
    model.generate(tokens(length=20), max_new_tokens=3, do_sample=False)
    folders = sorted(tmp_path.iterdir())
    assert {"prefill", "decode"} <= {folder.name.split("-")[2] for folder in folders}
    assert [run_again(folder) for folder in folders] == [0] * len(folders)


@pytest.mark.parametrize("first", [4, 40])
def test_the_script_knows_that_a_graph_was_meant_for_longer_prompts(first: int, tmp_path: Path):
    model = tiny("llama")
    plan = SkipPlan.from_prompt_scales({ATTENTION: 0.9, FFN: 1.1}, tail=4)
    adaskip_compile.compile(model, plan, inner="eager", debug_dir=tmp_path)
    with torch.no_grad():
        for length in (first, 40):
            model(tokens(length=length), logits_to_keep=1)
    folders = sorted(tmp_path.iterdir())
    assert any((folder / "history.txt").read_text().count("skip-body-rows") for folder in folders)
    assert [run_again(folder) for folder in folders] == [0] * len(folders)


@pytest.mark.parametrize("regions", ["shared", "whole"])
def test_what_is_lowered_is_shown_as_it_was_lowered(regions: str, tmp_path: Path):
    """The folders of the CPU's rewrites are of the very graphs that Inductor gets."""
    model = tiny("llama")
    plan = SkipPlan.from_scales({ATTENTION: 0.9, FFN: 1.1})
    adaskip_compile.compile(model, plan, regions=regions, debug_dir=tmp_path)
    with torch.no_grad():
        model(tokens(length=6))
    lowered = sorted(tmp_path.glob("*-lowered"))
    assert len(lowered) == (1 if regions == "whole" else len(list(tmp_path.glob("*-region_*"))))
    assert lowered
    for folder in lowered:
        assert (folder / "history.txt").read_text().count("-linear{}\n") == 2
        assert run_again(folder) == 0
    assert any(diff.read_text() for diff in tmp_path.glob("*-lowered/*.diff"))


def test_a_second_run_writes_beside_the_first(tmp_path: Path):
    run(tmp_path)
    names = {folder.name for folder in tmp_path.iterdir()}
    run(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(names)


@pytest.mark.parametrize(
    ("crash", "kind", "reason"),
    [
        (False, VerificationError, "output 0 was torch.float32"),
        (True, PassError, "failed: KeyError: 'output'"),
    ],
)
def test_a_broken_pass_is_named_and_runs_again_alone(broken, crash: bool, kind: type, reason: str, tmp_path: Path):
    broken(crash=crash)
    with pytest.raises(kind, match="widen-output") as caught:
        run(tmp_path / "debug")
    (folder,) = (tmp_path / "debug").iterdir()
    assert f"to see it alone: python {folder / 'repro.py'}" in str(caught.value)
    (diff,) = folder.glob("*-widen-output.diff")
    assert diff.read_text().count(", f64)") == 1
    assert "FAILED" in (folder / "history.txt").read_text()
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    (tmp_path / "widen_output.py").unlink()
    found = repro(moved)
    assert found.returncode == 1
    assert found.stderr.startswith("widen-output fails: ")
    assert reason in found.stderr
    assert "# widen-output: FAILED, and left this" in found.stdout
    assert ", f64)" in found.stdout


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"debug_dir=.*file/debug: cannot be written \(Not a directory\)"):
        run(tmp_path / "file" / "debug")


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run(None)
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_silent_by_default_and_tells_all_where_asked(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    with caplog.at_level(logging.INFO, logger="adaskip_compile"):
        run(tmp_path)
    text = caplog.text
    assert "LlamaForCausalLM: captured a prefill graph of 4 sublayers" in text
    assert "LlamaForCausalLM: made the prefill graph that skips 2 and probes 0 sublayers" in text
    assert f"graph before and after each pass: {tmp_path / '001'}" in text
    script = "import logging, adaskip_compile; logging.getLogger('adaskip_compile.runtime.session').warning('heard')"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ), cwd=ROOT)
    assert found.stderr == ""


class Wrapped(torch.nn.Module):
    """A model that Dynamo does not trace itself, around one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()

    @torch.compiler.disable(recursive=False)
    def forward(self, ids: torch.Tensor):
        return self.inner(ids)


def test_the_script_knows_a_graph_that_lies_below_a_prefix(tmp_path: Path):
    model = Wrapped().eval()
    plan = SkipPlan.from_scales({"inner.blocks.1.ffn": 0.9}, window=0)
    adaskip_compile.compile(model, plan, inner="eager", debug_dir=tmp_path)
    with torch.no_grad():
        model(tokens(length=6))
    (folder,) = tmp_path.iterdir()
    done = repro(folder)
    assert done.returncode == 0, done.stderr
    assert "skip-sublayers: modified, matched 1" in done.stdout


@pytest.mark.parametrize("debug", [True, False])
def test_a_graph_that_cannot_be_verified_runs_unskipped_and_says_why(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(gm: torch.fx.GraphModule):
        raise KeyError("strange")

    model, ids = tiny("llama"), tokens(length=6)
    with torch.no_grad():
        wanted = model(ids).logits
        adaskip_compile.compile(model, inner="eager", debug_dir=tmp_path if debug else None)
        with monkeypatch.context() as patched:
            patched.setattr(verifier, "find_effects", broken)
            found = model(ids).logits
    torch.testing.assert_close(found, wanted)
    assert "it has no canonical form: after capture: cannot be verified: KeyError" in str(adaskip_compile.report(model))
    assert len(list(tmp_path.iterdir())) == debug
