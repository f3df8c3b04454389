"""Every command on bad input: one clear line on standard error, an exit code that is not 0, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaskip_compile import Profile
from adaskip_compile.cli import main
from tests.adaskip_compile.profiling.profiling_data import TINY
from tests.tiny_checkpoints import save_tiny

ROOT = Path(__file__).parents[3]
COMMANDS = ("demo", "profile", "plan", "inspect", "run", "sweep", "export")
SMALL_DEMO = "--inner eager --samples 2 --length 320 --held-out 2 --needles 2 --prompt-tokens 40 --new-tokens 9 --rounds 1 --skip 2 --window 3"

SMALL_SWEEP = "--inner eager --windows 1 --length 32 --context 32 --new-tokens 4 --window 1 --rounds 1"


def swept(path: str, loss: float = 0.1) -> dict[str, Any]:
    """Return a row of a sweep whose plan skips ``path``."""
    speedup = {what: {"median": 1.0, "low": 1.0, "high": 1.0} for what in ("request", "prefill", "decode")}
    return {
        "name": "a",
        "nll_loss": loss,
        "speedup": speedup,
        "cache_bytes": 1,
        "skipped": [path],
        "prompt_skipped": [],
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a model, its profile and plan, and the same of another model."""
    folder = tmp_path_factory.mktemp("files")
    found = {"model": str(save_tiny(folder / "model")), "other": str(save_tiny(folder / "other", num_hidden_layers=3))}
    found |= {name: str(folder / f"{name}.json") for name in ("profile", "plan")}
    assert main(["profile", found["model"], "--out", found["profile"], "--samples", "2", "--length", "32"]) == 0
    assert main(["plan", found["profile"], "--out", found["plan"], "--skip", "2"]) == 0
    return found


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command line, checks that it fails as it should, and returns its line."""

    def run(arguments: list[str], code: int = 2) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(arguments) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("adaskip: ")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return lines[0]

    return run


def command_line(command: str, files: dict[str, str], out: Path, **changed: str) -> list[str]:
    """Return arguments with which a command works, and writes to ``out``, but for what ``changed`` says."""
    at = {**files, **changed}
    return {
        "demo": ["demo", "--model", at["model"], *SMALL_DEMO.split(), "--json", str(out)],
        "profile": ["profile", at["model"], "--out", str(out), "--samples", "2", "--length", "32"],
        "plan": ["plan", at["profile"], "--out", str(out), "--skip", "2"],
        "inspect": ["inspect", at["model"], "--plan", at["plan"], "--html", str(out)],
        "run": f"run {at['model']} --plan {at['plan']} --prompt word --max-new-tokens 3 --inner eager --json {out}".split(),
        "sweep": f"sweep {at['model']} --profile {at['profile']} --results {out} --skips 2 {SMALL_SWEEP}".split(),
        "export": f"export {at['model']} --plan {at['plan']} --max-length 32 --out {out}".split(),
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_file_is_named(command: str, files: dict[str, str], tmp_path: Path, fails: Callable[..., str]):
    missing = str(tmp_path / "none")
    line = fails(command_line(command, files, tmp_path / "out", model=missing, profile=missing))
    assert missing in line
    assert "there is no such file" in line or "does not exist" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_kind_is_refused(
    command: str, files: dict[str, str], tmp_path: Path, fails: Callable[..., str]
):
    no_model = tmp_path / "no-model"
    no_model.mkdir()
    (no_model / "config.json").write_text('{"model_type": "no-such-type"}')
    line = fails(command_line(command, files, tmp_path / "out", model=str(no_model), profile=files["plan"]))
    expected = "is of format adaskip-plan, and adaskip-profile is needed" if command == "plan" else "no-such-type"
    assert expected in line


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_a_plan_of_another_model_is_refused(
    command: str, files: dict[str, str], tmp_path: Path, fails: Callable[..., str]
):
    line = fails(command_line(command, files, tmp_path / "out", model=files["other"]))
    assert "was made for" in line or "which LlamaForCausalLM lacks" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_read_is_named(
    command: str, files: dict[str, str], tmp_path: Path, fails: Callable[..., str]
):
    folder = tmp_path / "folder"
    (folder / "config.json").mkdir(parents=True)
    line = fails(command_line(command, files, tmp_path / "out", model=str(folder), profile=str(folder)))
    assert str(folder) in line


# export writes a folder, not a file: tests/adaskip_compile/exporting/test_folders.py; sweep goes on from what it finds.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("sweep", "export")])
@pytest.mark.parametrize("kind", ["full", "interrupted"])
def test_what_cannot_be_written_leaves_nothing(
    command: str,
    kind: str,
    files: dict[str, str],
    tmp_path: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    out.write_text("what was there")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if kind == "full" else KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    line = fails(command_line(command, files, out), 2 if kind == "full" else 130)
    assert line == "adaskip: interrupted" or (str(out) in line and "No space left on device" in line)


def test_a_profile_of_another_model_is_refused(files: dict[str, str], tmp_path: Path, fails: Callable[..., str]):
    from dataclasses import replace

    foreign = tmp_path / "foreign.json"
    replace(Profile.load(files["profile"]), model=TINY).save(foreign)
    for arguments in (["inspect", files["model"]], ["run", files["model"], "--prompt", "a"]):
        assert str(foreign) in fails([*arguments, "--profile", str(foreign)])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"hidden_size": 8}'])
def test_a_config_that_is_none_is_refused(content: str, tmp_path: Path, fails: Callable[..., str]):
    config = tmp_path / "config.json"
    config.write_text(content)
    assert str(config) in fails(["inspect", "--config", str(config)])


def test_a_disk_that_is_really_full(files: dict[str, str], tmp_path: Path):
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64));"
        "from adaskip_compile.cli import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "plan",
        files["profile"],
        "--skip",
        "2",
        "--out",
        str(tmp_path / "plan.json"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ))
    assert found.returncode == 2
    assert found.stderr.endswith("plan.json was not written: File too large\n")
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_pytorch():
    script = "import sys; from adaskip_compile.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.stdout.endswith("False\n")


def test_completion_knows_commands_options_and_files(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "fish", "tcsh"):
        with pytest.raises(SystemExit, match="0"):
            main(["--print-completion", shell])
        text = capsys.readouterr().out
        assert all(word in text for word in ("inspect", "node-data", "calibrate", "clear"))


def test_without_shtab_completion_says_what_to_install(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'adaskip-compile[completion]'" in fails(["--print-completion", "bash"])


def test_a_report_that_is_none_is_refused(tmp_path: Path, files: dict[str, str], fails: Callable[..., str]):
    runtime = tmp_path / "runtime.json"
    runtime.write_text(json.dumps({"something": "else"}))
    assert "no report" in fails(["inspect", files["model"], "--runtime", str(runtime)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no sweep; 'adaskip sweep MODEL --json"),
        ([{"name": "a plan"}], "no sweep"),
        ([swept("model.layers.0.mlp", loss=float("nan"))], "no sweep"),
        ([swept("model.layers.77.mlp")], "the sweep is over another model"),
    ],
)
def test_a_sweep_that_is_none_or_of_another_model_is_refused(
    rows: Any, message: str, tmp_path: Path, files: dict[str, str], fails: Callable[..., str]
):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"rows": rows}))
    assert message in fails(["inspect", files["model"], "--sweep", str(file)])


@pytest.mark.parametrize("prompt", ["", "  "])
def test_a_prompt_without_text_is_refused(prompt: str, files: dict[str, str], fails: Callable[..., str]):
    assert "--prompt '" in (line := fails(["run", files["model"], "--prompt", prompt, "--inner", "eager"]))
    assert "takes some text to answer" in line


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_a_device_that_holds_no_weights_is_refused(device: str, files: dict[str, str], fails: Callable[..., str]):
    line = fails(["run", files["model"], "--prompt", "a", "--device", device])
    assert f"--device {device}: it holds no weights" in line


_LIMITED = """
import resource, signal, sys
import torch
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from adaskip_compile.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("room", [2_000, 20_000])
def test_an_export_that_finds_no_room_says_so_and_leaves_nothing(room: int, files: dict[str, str], tmp_path: Path):
    arguments = command_line("export", files, tmp_path / "out")
    # The caches of PyTorch write files too.
    where = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "passes"))), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(room), *arguments],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "was not written: File too large" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
