"""A checkpoint keeps its identity through casts and processes; another checkpoint has another one."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaskip_compile.files.model_identity import (
    SAMPLED_WEIGHTS,
    ModelIdentity,
    _same_weight,
    check_identity,
    identify,
    identify_parameters,
)
from adaskip_passes.errors import ForeignFileError, ProfileError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width)


class Model(nn.Module):
    def __init__(self, width: int = 32, seed: int = 0, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 7, bias=False)


@torch.no_grad()
def perturbed(model: Model, part: str, relative: float) -> Model:
    changed = copy.deepcopy(model)
    for path, parameter in changed.named_parameters():
        if part in path:
            parameter.add_(torch.randn_like(parameter) * parameter.std() * relative)
    return changed


@pytest.mark.parametrize("ours", DTYPES)
@pytest.mark.parametrize("theirs", DTYPES)
@pytest.mark.parametrize("released", DTYPES)
def test_a_cast_keeps_the_identity(released: torch.dtype, ours: torch.dtype, theirs: torch.dtype) -> None:
    model = Model().to(released)
    first, second = identify(copy.deepcopy(model).to(ours)), identify(copy.deepcopy(model).to(theirs))
    assert first.difference(second) is None
    assert first.matches(second)
    assert second.matches(first)


@pytest.mark.parametrize("released", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_keeps_even_its_key(released: torch.dtype) -> None:
    model = Model().to(released)
    keys = {identify(copy.deepcopy(model).to(dtype)).key for dtype in DTYPES}
    assert len(keys) == 1


def test_a_digest_would_not_do() -> None:
    """The reason to compare numbers: by way of float16, weights round to bfloat16 another way."""
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    changed = weights.to(torch.bfloat16) != weights.to(torch.float16).to(torch.bfloat16)
    assert changed.float().mean().item() == pytest.approx(1 / 16, rel=0.25)


@given(st.floats(width=32, min_value=-60000, max_value=60000))
def test_no_cast_moves_a_weight_out_of_tolerance(weight: float) -> None:
    value = torch.tensor(weight)
    rounded = [value.to(dtype).to(torch.bfloat16).item() for dtype in DTYPES]
    assert all(_same_weight(ours, theirs) for ours in rounded for theirs in rounded)


@pytest.mark.parametrize("weight", [1e-4, 0.02, 1.0, 500.0])
def test_a_weight_that_moved_by_two_percent_is_another(weight: float) -> None:
    assert not _same_weight(weight, weight * 1.02)


def test_another_seed_is_another_model() -> None:
    difference = identify(Model(seed=0)).difference(identify(Model(seed=1)))
    assert difference is not None
    assert difference.startswith("it has the same structure but other weights (")
    assert int(difference.split("(")[1].split()[0]) > SAMPLED_WEIGHTS * 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("part", "relative"), [("", 0.01), ("q_proj.weight", 0.03), ("layers.2.q_proj.weight", 0.1)])
def test_a_fine_tune_is_another_model(part: str, relative: float, dtype: torch.dtype) -> None:
    """Of all parts, of the query projections alone, and of a single matrix; compared across dtypes."""
    model = Model(width=64)
    assert not identify(model).matches(identify(perturbed(model, part, relative).to(dtype)))


def test_norms_and_biases_do_not_dilute_the_sample() -> None:
    model = Model(layers=1)
    weights = identify(model).weights
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(1.0)
    assert identify(model).weights == weights


def test_structure_is_names_and_shapes() -> None:
    base = identify(Model())
    assert identify(Model(seed=1).half()).structure == base.structure
    for other in (Model(width=16), Model(layers=5)):
        assert base.difference(identify(other)) == "its parameters have other names or shapes"
    renamed = [(path.replace("q_proj", "query"), value) for path, value in Model().named_parameters()]
    assert identify_parameters("m", renamed).structure != base.structure


def test_order_of_the_parameters_is_nothing() -> None:
    parameters = list(Model().named_parameters())
    assert identify_parameters("m", parameters) == identify_parameters("m", reversed(parameters))


def test_meta_model_is_told_by_structure_alone() -> None:
    with torch.device("meta"):
        meta = identify(Model())
    assert meta.weights is None
    assert meta.matches(identify(Model()))
    assert identify(Model(seed=1)).matches(meta)
    assert not meta.matches(identify(Model(width=16)))


def test_partly_readable_model_is_told_by_structure_alone() -> None:
    model = Model()
    model.head.to("meta")
    assert identify(model).weights is None


def test_views_and_tied_weights() -> None:
    model = Model()
    weights = identify(model).weights
    with torch.no_grad():
        model.head.weight = nn.Parameter(model.head.weight.t().contiguous().t())
    assert not model.head.weight.is_contiguous()
    assert identify(model).weights == weights, "a place is counted in elements, not in memory"


def test_models_with_few_or_no_weights() -> None:
    assert identify(nn.Identity()).weights is None
    half = SAMPLED_WEIGHTS // 2
    assert identify(nn.LayerNorm(4)).weights == "0000" * half + "3f80" * half, "bias and weight, where there is no more"
    assert identify(nn.Linear(1, 1)).weights is not None


def test_compiled_wrapper_is_the_model() -> None:
    model = Model()
    assert identify(torch.compile(model, backend="eager")) == identify(model)  # type: ignore[arg-type]


def test_names_are_for_people() -> None:
    model = Model()
    assert identify(model).name == "Model"
    for given_name, shown in [("org/tiny", "org/tiny"), ("", "Model"), ("/home/someone/checkpoints/tiny", "tiny")]:
        model.config = SimpleNamespace(name_or_path=given_name)  # type: ignore[assignment]
        assert identify(model).name == shown
        assert identify(model).matches(identify(Model()))


def test_places_and_text_stay_as_they_are() -> None:
    """Files hold identities for years: this fails when the digest, the places or the notation change."""
    weight = torch.arange(1000, dtype=torch.float32).reshape(20, 50)
    identity = identify_parameters("ramp", [("weight", weight)])
    assert identity.structure == "3b1b4a9825bbb37b8d454616e5763746"
    assert identity.weights is not None
    assert identity.weights[:32] == "0000441a436c445643ec42b4443143a3"


def test_places_spread_evenly() -> None:
    values = identify_parameters("ramp", [("weight", torch.arange(128.0).reshape(8, 16))]).weights
    assert values is not None
    seen = [values[i : i + 4] for i in range(0, len(values), 4)]
    counts = [seen.count(value) for value in set(seen)]
    assert len(counts) == 128
    assert max(counts) <= 6, "512 samples of 128 places: four each, give or take"


def test_other_processes_agree() -> None:
    code = (
        "import torch; from torch import nn; from adaskip_compile.files.model_identity import identify;"
        "m = nn.Linear(64, 64);"
        "m.weight.data = torch.arange(4096.).reshape(64, 64).sin();"
        "print(identify(m).key)"
    )
    keys = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        keys.add(done.stdout)
    assert len(keys) == 1


def test_is_fast() -> None:
    """A generous bound for busy machines; 5 ms is usual, whatever the size of the matrices."""
    model = Model(width=256, layers=30)
    identify(model)
    fastest = math.inf
    for _ in range(5):
        start = time.perf_counter()
        identify(model)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 0.05


def test_check_passes_the_same_model() -> None:
    check_identity(identify(Model()), identify(Model().half()), source="p.json")


def test_check_names_both_models_and_the_remedy() -> None:
    ours, theirs = identify(Model()), identify(Model(width=16))
    with pytest.raises(ForeignFileError) as caught:
        check_identity(ModelIdentity("org/tiny", ours.structure, ours.weights), theirs, source="p.json")
    assert str(caught.value) == (
        "p.json was made for org/tiny, and this model is Model: its parameters have other names or shapes. Measure "
        "this model itself, with adaskip_compile.profile(model, samples) or `adaskip profile`"
    )


def test_check_of_another_checkpoint_of_the_same_name() -> None:
    with pytest.raises(ForeignFileError, match=r"^this plan was made for another Model: it has the same structure but"):
        check_identity(identify(Model()), identify(Model(seed=1)), source="this plan")


@pytest.mark.parametrize("weights", ["", "3f80", "zz" * 2 * SAMPLED_WEIGHTS, "3F80" * SAMPLED_WEIGHTS])
def test_senseless_weights_are_refused(weights: str) -> None:
    with pytest.raises(ProfileError, match="512 numbers of four hexadecimal digits"):
        ModelIdentity("m", "s", weights)


def test_senseless_names_are_refused() -> None:
    with pytest.raises(ProfileError, match="text"):
        ModelIdentity("m", 3, None)  # type: ignore[arg-type]
