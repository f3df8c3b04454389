"""Files with one value changed for another: what reads them refuses them with an error of ours, or makes sense of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaskip_compile
from adaskip_compile import AdaSkipError, DamagedFileError, FileError, Profile, SkipPlan
from adaskip_compile.costs.timers import CALIBRATION_FORMAT, Measured
from adaskip_compile.evaluation.sweep_results import SWEEP_FORMAT, SweepResults
from adaskip_compile.exporting.folders import EXPORT_FORMAT
from adaskip_compile.files.versioned_json import DocumentFormat, checksum
from adaskip_compile.planning.skip_plan import PLAN_FORMAT
from adaskip_compile.profiling.profiles import PROFILE_FORMAT
from tests.models import tiny, tokens

ABOUT = {"model": "tiny"}
VALUES: list[Any] = [
    10**400,
    2**63,
    -1,
    0,
    0.5,
    -0.0,
    "",
    "a\0b",
    "x" * 10_000,
    "1e999",
    [],
    [[]],
    [None],
    None,
    True,
    {},
    {"a": [1]},
]
ODD = st.sampled_from(VALUES)


class Forge:
    """Writes documents with a right checksum, and one value of the payload changed."""

    def __init__(self, path: Path, format_: DocumentFormat, read: Callable[[Path], object]) -> None:
        self.path, self.read = path, read
        self.format = format_
        self.payload = format_.read(path)
        self.places = list(places(self.payload))

    def write(self, place: tuple[Any, ...], value: Any) -> None:
        payload = copy.deepcopy(self.payload)
        *above, last = place
        owner = payload
        for key in above:
            owner = owner[key]
        owner[last] = value
        document = {"format": self.format.name, "version": self.format.version, "payload": payload}
        self.path.write_text(json.dumps({**document, "checksum": checksum(payload)}))


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value in ``value``; of long lists, of the first two."""
    keys = value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ()
    for key in keys:
        yield (*above, key)
        yield from places(value[key], (*above, key))


@pytest.fixture(scope="module")
def forges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forge]:
    folder = tmp_path_factory.mktemp("forged")
    model, samples = tiny("llama"), [tokens(1, 17), tokens(1, 19)]
    profile = adaskip_compile.profile(model, samples, progress=False)
    profile = adaskip_compile.fit(model, profile, samples, forms=["low_rank"], rank=2, progress=False)
    profile = adaskip_compile.order_by_loss(model, profile, samples, most=1, progress=False)
    profile.save(folder / "profile.json")
    adaskip_compile.plan(profile, skip=1, compensation="low_rank").save(folder / "plan.json")
    adaskip_compile.plan(profile, skip=1, phase="decode").save(folder / "ramp.json")
    results = SweepResults(folder / "sweep.json", ABOUT)
    results.add_quality("full", "nll", (1.0, 2.0))
    results.add_round({"full": (1.0, 2.0, 3.0), "adaskip/1/scale": (1.0, 2.0, 3.0)})
    Measured((8, 16), {"prefill": ((1.0, 2.0), (3.0, 4.0))}, "machine", (("model.layers.0.mlp",),)).save(
        folder / "times.json"
    )
    EXPORT_FORMAT.write(folder / "manifest.json", {"batch": 1, "programs": {"prefill": {"file": "prefill.pt2"}}})
    return {
        "profile": Forge(folder / "profile.json", PROFILE_FORMAT, Profile.load),
        "plan": Forge(folder / "plan.json", PLAN_FORMAT, SkipPlan.load),
        "ramp": Forge(folder / "ramp.json", PLAN_FORMAT, SkipPlan.load),
        "sweep": Forge(folder / "sweep.json", SWEEP_FORMAT, read_sweep),
        "times": Forge(folder / "times.json", CALIBRATION_FORMAT, Measured.load),
        "manifest": Forge(folder / "manifest.json", EXPORT_FORMAT, EXPORT_FORMAT.read),
    }


def read_sweep(path: Path) -> None:
    found = SweepResults.open(path, ABOUT)
    found.measure_by({"full": SkipPlan.none(), "adaskip/1/scale": SkipPlan.none()})
    found.speedups("adaskip/1/scale", "first", "later")


@pytest.mark.parametrize("kind", ["profile", "plan", "ramp", "sweep", "times", "manifest"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=ODD)
def test_one_odd_value_is_refused_by_an_error_of_ours(forges: dict[str, Forge], kind: str, data: Any, value: Any):
    forge = forges[kind]
    forge.write(data.draw(st.sampled_from(forge.places)), value)
    try:
        forge.read(forge.path)
    except AdaSkipError as error:
        assert forge.path.name in str(error) or "safetensors" in str(error)  # noqa: PT017 - not raised is right too


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-" + "9" * 5000, "1e999", "NaN", "-Infinity", str(2**63)])
def test_numbers_out_of_range_are_refused(number: str, forges: dict[str, Forge], tmp_path: Path):
    forge = forges["profile"]
    forge.write(("sublayers", 0, "tokens", 0), 123456789)
    path = tmp_path / "profile.json"
    path.write_text(forge.path.read_text().replace("123456789", number))
    with pytest.raises(DamagedFileError, match=r"profile\.json is not a usable adaskip-profile: .*(not JSON|range)"):
        Profile.load(path)


@pytest.mark.parametrize("kind", [SkipPlan, Profile, Measured])
def test_a_nul_in_a_path_is_refused(kind: Any):
    with pytest.raises(FileError, match=r"'a\\x00b' cannot be read"):
        kind.load("a\0b")


def test_a_nul_in_a_path_to_write_is_refused():
    with pytest.raises(FileError, match="holds a NUL"):
        SkipPlan.none().save("a\0b")
    with pytest.raises(FileError, match="holds no NUL"):
        adaskip_compile.export(tiny("llama"), None, "a\0b")


def test_an_integer_that_no_float_holds_is_no_finite_number():
    with pytest.raises(adaskip_compile.PlanError, match="takes a finite number above 0"):
        SkipPlan.from_scales({"model.layers.0.mlp": 10**400})


def test_a_file_of_maps_with_other_tensors_is_refused(forges: dict[str, Forge], tmp_path: Path):
    from safetensors.torch import save

    forge = forges["plan"]
    [path] = forge.payload["maps"]["errors"]
    wrong: list[dict[str, torch.Tensor]] = [{f"{path}/low_rank/shift": torch.tensor(1.0)}, {"shift": torch.ones(2)}, {}]
    for tensors in wrong:
        data = save(tensors)
        forge.write(("maps", "sha256"), hashlib.sha256(data).hexdigest())
        (tmp_path / "plan.json").write_bytes(forge.path.read_bytes())
        (tmp_path / forge.payload["maps"]["file"]).write_bytes(data)
        with pytest.raises(DamagedFileError, match="holds no stream maps"):
            SkipPlan.load(tmp_path / "plan.json")
