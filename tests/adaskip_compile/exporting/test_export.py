"""Exported programs: the same tokens as the model itself, in a process that has PyTorch alone, and nothing skipped in them."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import adaskip_compile
from adaskip_compile import (
    CaptureError,
    ForeignFileError,
    LegalityError,
    OptionError,
    PlanError,
    RampStep,
    SkipPlan,
    UnknownSublayerError,
)
from adaskip_compile.exporting.folders import EXPORT_FORMAT
from adaskip_compile.exporting.runner import ExportedModel
from adaskip_compile.files.model_identity import identify
from adaskip_compile.kv_cache.cache_argument import cache_argument, cache_of
from tests.adaskip_compile.exporting.exports import (
    FAMILIES,
    STEPS,
    exported,
    exported_in_full,
    generate_alone,
    model_of,
    run_alone,
    some_plan,
)
from tests.architectures import tiny_architecture
from tests.generation import generate
from tests.models import plain, tiny, tokens
from tests.reference import omit_sublayers

every_family = pytest.mark.parametrize("family", FAMILIES)


def weights_of(folder: Path, name: str) -> set[str]:
    return set(torch.export.load(folder / f"{name}.pt2").state_dict)


@every_family
def test_tokens_equal_the_models_own_with_pytorch_alone(family):
    found = exported(family)
    assert len(set(found.wanted[0].tolist())) > 5
    assert not torch.equal(found.wanted, found.full)
    assert torch.equal(generate_alone(found.graphs, found.ids, STEPS), found.wanted)


def test_the_process_of_these_tests_has_pytorch_alone(tmp_path):
    for name in ("transformers", "adaskip_compile", "adaskip_passes", "numpy", "safetensors"):
        script = tmp_path / "script.py"
        script.write_text(f"import {name}")
        assert f"No module named '{name}'" in run_alone(script).stderr


@every_family
def test_without_skips_tokens_equal_eager(family):
    model = ExportedModel(exported_in_full(family).directory)
    assert torch.equal(model.generate(exported(family).ids, STEPS), exported(family).full)


@every_family
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_what_is_skipped_is_not_in_the_files(family, name):
    found, full = exported(family), exported_in_full(family)
    weights, all_weights = (weights_of(graphs.directory, name) for graphs in (found.graphs, full))
    skipped = {weight for weight in all_weights if weight.startswith(tuple(f"{path}." for path in found.plan.paths))}
    assert len(skipped) >= 3
    assert not weights & skipped
    assert weights < all_weights
    program, whole = found.graphs.manifest["programs"][name], full.manifest["programs"][name]
    assert set(program["skipped"]) == set(found.plan.paths)
    assert whole["weight_bytes"] == full.manifest["full_weight_bytes"]
    saved = whole["weight_bytes"] - program["weight_bytes"]
    saved += full.manifest["cache_bytes"] - found.graphs.manifest["cache_bytes"]
    assert whole["bytes"] - program["bytes"] >= saved


@every_family
def test_a_skipped_attention_has_no_cache(family):
    found, full = exported(family), exported_in_full(family)
    manifest = found.graphs.manifest
    assert full.manifest["cache_bytes"] == full.manifest["full_cache_bytes"] == manifest["full_cache_bytes"]
    assert manifest["cache_bytes"] * 2 == manifest["full_cache_bytes"]  # two attentions of four
    for name in ("prefill", "decode"):
        program = torch.export.load(found.graphs.directory / f"{name}.pt2")
        buffers = {path: buffer for path, buffer in program.named_buffers() if "_cache_" in path}
        assert set(buffers) == {"key_cache_1", "value_cache_1", "key_cache_3", "value_cache_3"}
        assert {entry["name"]: entry["shape"] for entry in manifest["cache"]} == {
            path: list(buffer.shape) for path, buffer in buffers.items()
        }
        assert not any(buffer.any() for buffer in buffers.values())
    owners = {entry["sublayer"] for entry in manifest["cache"]}
    assert owners == set(adaskip_compile.analyze(found.model).paths[2::4])


def test_the_folder_holds_what_the_manifest_says():
    found = exported("llama")
    files = {path.name: path for path in found.graphs.files}
    assert set(files) == {"decode.pt2", "decode.txt", "generate.py", "manifest.json", "prefill.pt2", "prefill.txt"}
    manifest = EXPORT_FORMAT.read(files["manifest.json"])
    assert manifest == found.graphs.manifest
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["model"]["structure"] == identify(found.model).structure
    assert manifest["programs"]["prefill"]["plan"]["skipped"][0]["scale"] == 0.97
    for name, length in (("prefill", "tokens"), ("decode", 1)):
        program = manifest["programs"][name]
        assert program["bytes"] == files[f"{name}.pt2"].stat().st_size
        assert [entry["shape"] for entry in program["inputs"]] == [[1, length], [length]]
        assert [entry["shape"] for entry in program["outputs"]] == [[1, 1, 128]]
        assert "eliminate-dead-code" in program["passes"][-1]
    assert str(found.graphs).count("skips 3 sublayers") == 2


def test_the_text_of_the_graphs_shows_the_skips():
    found = exported("llama")
    for name in ("prefill", "decode"):
        text = (found.graphs.directory / f"{name}.txt").read_text()
        assert text.count("aten.scaled_dot_product_attention") == 2
        assert text.count("aten.index_copy_") == 4
        for scale in found.plan.scales.values():
            assert f", {torch.tensor(scale).item()!r})" in text
        assert "# model.layers.1.self_attn.q_proj\n" in text


def test_files_say_nothing_of_the_machine_that_made_them():
    folder = exported("llama").graphs.directory
    for file in folder.iterdir():
        for word in (str(Path(torch.__file__).parents[1]), str(Path(__file__).parents[3]), "modeling_llama.py"):
            assert word.encode() not in file.read_bytes(), (file.name, word)


def test_a_prompt_of_any_length_and_a_text_that_goes_on():
    found = exported("llama")
    model = ExportedModel(found.graphs.directory)
    with torch.no_grad(), omit_sublayers(found.model, found.plan.scales):
        for length in (1, 2, 13, 90):
            ids = tokens(1, length, seed=length)
            wanted = generate(found.model, ids, torch.ones_like(ids), 5)
            assert torch.equal(model.generate(ids, 5), wanted), length
        # A second turn of a conversation is a prefill that does not start at 0.
        ids = tokens(1, 40, seed=3)
        for start, stop in ((0, 25), (25, 40)):
            logits = model.prefill(ids[:, start:stop], torch.arange(start, stop))
            torch.testing.assert_close(logits[:, 0], found.model(ids[:, :stop]).logits[:, -1])


def test_generation_ends_where_the_text_does():
    found = exported("llama")
    model = ExportedModel(found.graphs.directory)
    wanted: list[int] = found.wanted[0].tolist()
    stopped = model.generate(found.ids, STEPS, stop=wanted[2:3])
    assert stopped[0].tolist() == wanted[: wanted.index(wanted[2]) + 1]


def test_what_does_not_fit_is_refused_by_the_runner():
    model = ExportedModel(exported("llama").graphs.directory)
    for ids, steps in ((tokens(1, 90), 7), (tokens(2, 5), 5), (tokens(1, 0), 5)):
        with pytest.raises(ValueError, match="do not fit programs for 1 rows of 96 tokens"):
            model.generate(ids, steps)
    for strange in (128, -1):
        with pytest.raises(ValueError, match=f"{strange} is no id of a token: this model's are 0 to 127"):
            model.generate(torch.tensor([[3, strange, 5]]), 2)
    with pytest.raises(ValueError, match="holds no AOTInductor package"):
        ExportedModel(exported("llama").graphs.directory, compiled=True)


def test_rows_of_a_batch(tmp_path):
    model, ids = model_of("llama"), torch.cat([tokens(1, 9, seed=1), tokens(1, 9, seed=2)])
    plan = some_plan(model)
    adaskip_compile.export(model, plan, tmp_path / "out", batch=2, max_length=64)
    with omit_sublayers(model, plan.scales):
        wanted = generate(model, ids, torch.ones_like(ids), 20)
    assert torch.equal(ExportedModel(tmp_path / "out").generate(ids, 20), wanted)


def test_what_cannot_be_proved_of_all_lengths_is_checked_at_run_time(tmp_path):
    model, ids = tiny_architecture("llama4_text"), tokens(1, 21)
    adaskip_compile.export(model, None, tmp_path / "out", max_length=64)
    # Later versions write their masks so that nothing is left to check.
    assumes = Version(transformers.__version__) <= Version("5.23.0")
    assert ("aten._assert_scalar" in (tmp_path / "out" / "prefill.txt").read_text()) >= assumes
    for length in (5, 16, 21):
        wanted = generate(model, ids[:, :length], torch.ones(1, length, dtype=torch.long), 24)
        assert torch.equal(ExportedModel(tmp_path / "out").generate(ids[:, :length], 24), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_bfloat16(family, tmp_path):
    model = model_of(family).to(torch.bfloat16)
    plan, ids = some_plan(model), tokens(1, 9)
    graphs = adaskip_compile.export(model, plan, tmp_path / "out", max_length=64)
    assert {entry["dtype"] for entry in graphs.manifest["cache"]} == {"bfloat16"}
    assert ("aten._grouped_mm" in (tmp_path / "out" / "decode.txt").read_text()) == (family == "qwen3_moe")
    adaskip_compile.compile(model, plan, inner="eager")
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
        got = ExportedModel(tmp_path / "out").prefill(ids, torch.arange(9))[:, 0]
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_other_ffns_in_decode(tmp_path):
    model, ids = model_of("llama"), tokens(1, 9)
    plan = SkipPlan.from_scales({"model.layers.1.self_attn": 0.9, "model.layers.2.mlp": 0.95})
    decode = SkipPlan.from_scales({**plan.scales, "model.layers.0.mlp": 0.9, "model.layers.3.mlp": 1.1})
    plan.save(tmp_path / "plan.json")
    decode.save(tmp_path / "decode.json")
    graphs = adaskip_compile.export(
        model, tmp_path / "plan.json", tmp_path / "out", decode_plan=tmp_path / "decode.json", max_length=64
    )
    assert [len(program["skipped"]) for program in graphs.manifest["programs"].values()] == [2, 4]
    scales = dict(plan.scales)
    with torch.no_grad(), omit_sublayers(model, scales):
        result = model(ids, use_cache=True)
        wanted = [result.logits[:, -1:].argmax(-1)]
        scales.update(decode.scales)
        for _ in range(9):
            result = model(wanted[-1], use_cache=True, **cache_argument(model, cache_of(result)))
            wanted.append(result.logits[:, -1:].argmax(-1))
    assert torch.equal(ExportedModel(tmp_path / "out").generate(ids, 10), torch.cat(wanted, dim=1))


def test_plans_that_leave_different_caches_are_refused(tmp_path):
    model = model_of("llama")
    plan = SkipPlan.from_scales({"model.layers.1.self_attn": 0.9})
    other = SkipPlan.from_scales({"model.layers.2.self_attn": 0.9})
    with pytest.raises(
        LegalityError, match=r"model\.layers\.1\.self_attn, model\.layers\.2\.self_attn: skipped by one"
    ):
        adaskip_compile.export(model, plan, tmp_path / "out", decode_plan=other)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_changes_while_it_runs_is_refused(tmp_path):
    model = model_of("llama")
    ramp = (RampStep(0, SkipPlan.from_scales({"model.layers.1.mlp": 0.9}).skipped),)
    with pytest.raises(PlanError, match="this plan has a ramp, and programs do not change while they run"):
        adaskip_compile.export(model, replace(SkipPlan.none(), ramp=ramp), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_is_as_it_was(tmp_path):
    model = model_of("qwen3_moe").train()
    before = model.get_experts_implementation()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adaskip_compile.export(model, some_plan(model), tmp_path / "out", max_length=32)
    assert model.training
    assert model.get_experts_implementation() == before
    assert model._compiled_call_impl is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.newest("to load a compiled package, 2.11 needs setuptools beside it")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_compiled_package_generates_with_pytorch_alone(family, tmp_path):
    found = exported(family)
    graphs = adaskip_compile.export(found.model, found.plan, tmp_path / "out", max_length=96, aot=True)
    assert graphs.manifest["aot"]["bytes"] == (tmp_path / "out" / "aot.pt2").stat().st_size
    assert torch.equal(generate_alone(graphs, found.ids, STEPS, "--compiled"), found.wanted)


def test_executorch_takes_both_programs_over_one_cache(tmp_path):
    exir = pytest.importorskip("executorch.exir")
    passes = pytest.importorskip("executorch.exir.passes")
    runtime = pytest.importorskip("executorch.runtime")
    found = exported("llama")
    names = ("prefill", "decode")
    programs = {name: torch.export.load(found.graphs.directory / f"{name}.pt2") for name in names}
    lowered = exir.to_edge(programs, compile_config=exir.EdgeCompileConfig(_check_ir_validity=False))
    planning = passes.MemoryPlanningPass(share_mutable_buffers=True)
    binary = lowered.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=planning))
    (tmp_path / "model.pte").write_bytes(binary.buffer)
    program = runtime.Runtime.get().load_program(tmp_path / "model.pte")
    prefill, decode = (program.load_method(name) for name in names)
    ids, chosen = found.ids, torch.empty(1, 0, dtype=torch.long)
    (logits,) = prefill.execute((ids, torch.arange(ids.shape[1])))
    for step in range(16):
        chosen = torch.cat([chosen, logits[:, -1:].argmax(-1)], dim=1)
        (logits,) = decode.execute((chosen[:, -1:].contiguous(), torch.tensor([ids.shape[1] + step])))
    assert torch.equal(chosen, found.wanted[:, :16])


@pytest.mark.slow
def test_a_real_model(part_of_smollm2, tmp_path):
    model, tokenizer = part_of_smollm2
    attentions = [path for path in adaskip_compile.analyze(model).paths if path.endswith("self_attn")]
    plan = SkipPlan.from_scales(dict.fromkeys((attentions[0], *attentions[3:10:3]), 1.02))
    ids = tokenizer("In the beginning the universe was created.", return_tensors="pt")["input_ids"]
    graphs = adaskip_compile.export(model, plan, tmp_path / "out", max_length=128)
    assert graphs.manifest["cache_bytes"] * 10 == graphs.manifest["full_cache_bytes"] * 6
    try:
        adaskip_compile.compile(model, plan, inner="eager")
        wanted = generate(model, ids, torch.ones_like(ids), STEPS)
    finally:
        model._compiled_call_impl = None
    assert torch.equal(generate_alone(graphs, ids, STEPS, "--ignore-end"), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0: takes a number of rows, 1 or more"),
        ({"max_length": 5}, "max_length=5: takes a number of tokens, 14 or more"),
        ({"max_length": 300}, "max_length=300: this model has 256 positions"),
    ],
)
def test_sizes_that_cannot_be(options, message, tmp_path):
    with pytest.raises(OptionError, match=re.escape(message)):
        adaskip_compile.export(tiny("llama"), None, tmp_path / "out", **options)


def test_models_that_cannot_be_exported(tmp_path):
    for model, message in (
        (plain(), "export knows how to call models of transformers, and PlainDecoder is none"),
        (tiny("mamba"), "keeps its state in a LinearAttentionLayer; export handles keys and values"),
        (tiny("llama").to("meta"), "export needs the weights on one device, and here they are on meta"),
    ):
        with pytest.raises(CaptureError, match=message):
            adaskip_compile.export(model, None, tmp_path / "out", max_length=32)
    assert list(tmp_path.iterdir()) == []


def test_plans_that_the_model_cannot_have(tmp_path):
    model = tiny("llama")
    with pytest.raises(UnknownSublayerError, match=r"skips model\.layers\.9\.mlp"):
        adaskip_compile.export(model, SkipPlan.from_scales({"model.layers.9.mlp": 1.0}), tmp_path / "out")
    with pytest.raises(UnknownSublayerError, match=r"no sublayer 'model\.norm' in this graph"):
        adaskip_compile.export(model, SkipPlan.from_scales({"model.norm": 1.0}), tmp_path / "out", max_length=32)
    foreign = adaskip_compile.plan(adaskip_compile.profile(tiny("llama", seed=1), [tokens(1, 9)]), skip=1)
    foreign.save(tmp_path / "plan.json")
    with pytest.raises(ForeignFileError, match=r"plan\.json was made for another LlamaForCausalLM"):
        adaskip_compile.export(model, tmp_path / "plan.json", tmp_path / "out")


def test_nothing_of_the_model_is_kept_alive(tmp_path):
    model = tiny("llama")
    weight = weakref.ref(model.lm_head.weight)
    adaskip_compile.export(model, None, tmp_path / "out", max_length=32)
    del model
    gc.collect()
    assert weight() is None
