"""A budget of loss: what is found keeps it, is kept for the next process, and says what it was measured to lose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_compile
from adaskip_compile import SkipPlan
from adaskip_compile.fitting import kept_plans, loss_budget
from adaskip_compile.fitting.budget_texts import BudgetSizes, BudgetTexts, domains_of
from adaskip_compile.fitting.depths import WINDOW, Depths
from adaskip_compile.fitting.loss_budget import plan_within_loss, prompt_flops
from adaskip_compile.fitting.prompt_quality import PromptJudge
from adaskip_compile.fitting.sequence import SequenceFitter, fit_prompt_skips
from adaskip_compile.inspection.phase_graphs import capture_phases
from adaskip_compile.needles import Needle, make_needles
from adaskip_compile.planning.prompt_skips import HEAD, PromptSkips, Trade
from adaskip_compile.planning.quality import Quality
from adaskip_passes.errors import LegalityError, OptionError, ProfileError
from tests.made_up_texts import made_up
from tests.models import tiny, tokens
from tests.reference import Body, decoder_layers, replace_body
from tests.tiny_checkpoints import byte_tokenizer

SMALL = BudgetSizes(prompt=192, continued=32, fitted=2, measured=2, needles=2)


def test_deepest_layers_go_first() -> None:
    layers = (("2.attn",), ("2.ffn",)), (("1.attn",), ("1.ffn",)), (("0.attn",), ("0.ffn",))
    depths = Depths(1, 2, 3)
    assert depths.skipped(layers) == ("2.attn", "2.ffn", "1.ffn")
    assert depths.windowed(layers) == {"1.attn": WINDOW, "0.attn": WINDOW}
    assert str(depths) == "1 attentions, 2 FFNs, 2 windows"
    assert str(Depths(2, 2, 2)) == "2 attentions, 2 FFNs"


@pytest.mark.newest("before, how a mask is made is captured, and counts")
def test_arithmetic_is_that_of_the_rows_that_are_computed() -> None:
    """Counted by hand for the tiny Llama: products of 12 tokens in layer 0, of layer 1 keys and values alone, and the logits.

    Of the scores, and of what is summed up by them, half: 12 * 11 / 2 pairs are hidden.
    """
    prefill, _ = capture_phases(tiny("llama"))
    rows, width, kv, inner = 12, 64, 32, 96
    attention = 2 * rows * (2 * width * width + 2 * width * kv) + 4 * (rows * rows - rows * (rows - 1) // 2) * width
    whole = 2 * attention + 2 * 3 * 2 * rows * width * inner + 2 * width * 128
    assert prompt_flops(prefill.gm, rows) == whole


def stream_before(model: Any, path: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the stream before and after an MLP of the eager model."""
    layer: Any = dict(decoder_layers(model))[path.removesuffix(".mlp")]
    seen: list[torch.Tensor] = []
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        layer.register_forward_hook(lambda _, args, out: seen.append(out)),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


class TestFitting:
    samples = tuple(tokens(1, 60, seed=seed)[0] for seed in range(12))

    def test_a_map_imitates_the_sublayer(self) -> None:
        model, path = tiny("llama", num_hidden_layers=3), "model.layers.1.mlp"
        skips = fit_prompt_skips(model, [path], self.samples, rank=64, progress=False)
        before, after = stream_before(model, path, self.samples[0][None])
        missed = (skips.maps[path](before) - after)[:, 1:].square().sum() / (after - before)[:, 1:].square().sum()
        assert missed < 0.8
        assert skips.paths == (path,)
        assert skips.skipped[0].kind == "ffn"

    def test_a_later_map_takes_the_stream_that_the_earlier_ones_leave(self) -> None:
        """In sequence the last value of the stream comes nearer to the full model's than with maps fitted one by one."""
        model = tiny("llama", num_hidden_layers=4)
        paths = [f"model.layers.{layer}.{part}" for layer in (1, 2, 3) for part in ("self_attn", "mlp")]
        fitter = SequenceFitter(model, self.samples)
        missed = {}
        for in_sequence in (True, False):
            skips = fitter.fit(paths, rank=16, in_sequence=in_sequence, progress=False)
            plan = replace(SkipPlan.none(), prompt=skips)
            with torch.no_grad():
                full = torch.cat([model._call_impl(ids[None]).logits for ids in self.samples])
                adaskip_compile.compile(model, plan, inner="eager", keep_captures=False)
                # 60 tokens are too few for a body: the same twice again behind them changes nothing of the first
                got = torch.cat([model(ids[None].repeat(1, 3)).logits[:, :60] for ids in self.samples])
            adaskip_compile.restore(model)
            missed[in_sequence] = float((got - full).square().mean())
        assert missed[True] < missed[False]

    def test_what_is_run_once_changes_nothing(self) -> None:
        model = tiny("llama", num_hidden_layers=4)
        paths = [f"model.layers.{layer}.{part}" for layer in (2, 3) for part in ("self_attn", "mlp")]
        begun, anew = SequenceFitter(model, self.samples), SequenceFitter(model, self.samples)
        begun.begin_at(["model.layers.2.mlp", "model.layers.1.mlp"])
        wanted = anew.fit(paths, rank=16, progress=False)
        for _ in range(2):  # the first fit leaves the samples where they stand
            got = begun.fit(paths, rank=16, progress=False)
            for path in paths:
                torch.testing.assert_close(got.maps[path].tensors, wanted.maps[path].tensors, rtol=0, atol=0)
        with pytest.raises(OptionError, match=r"model\.layers\.1\.self_attn lies before the sublayer at which"):
            begun.fit(["model.layers.1.self_attn"], progress=False)

    def test_maps_make_up_for_windows_before_them(self) -> None:
        """Fitted on the stream that windows leave, they bring its last value nearer to the full model's."""
        model = tiny("llama", num_hidden_layers=4)
        windows, paths = {"model.layers.1.self_attn": 4}, ["model.layers.1.mlp", "model.layers.2.mlp"]
        fitter = SequenceFitter(model, self.samples)
        knowing = fitter.fit(paths, rank=64, windows=windows, progress=False)
        assert knowing.windows == windows
        ignorant = replace(fitter.fit(paths, rank=64, progress=False), windows=windows)
        missed = []
        for skips in (knowing, ignorant):
            with torch.no_grad():
                full = torch.cat([model._call_impl(ids[None].repeat(1, 3)).logits for ids in self.samples])
                plan = replace(SkipPlan.none(), prompt=skips)
                adaskip_compile.compile(model, plan, inner="eager", keep_captures=False)
                got = torch.cat([model(ids[None].repeat(1, 3)).logits for ids in self.samples])
            adaskip_compile.restore(model)
            missed.append(float((got - full)[:, 1:60].square().mean()))
        assert missed[0] < missed[1]

    def test_the_stream_that_windows_leave_is_that_of_a_hand_written_layer(self) -> None:
        model, ids = tiny("llama", num_hidden_layers=4), self.samples[0]
        path, windows = "model.layers.2.mlp", {"model.layers.1.self_attn": 4, "model.layers.2.self_attn": 4}
        seen: list[torch.Tensor] = []

        class Noted(SequenceFitter):
            def _fitted(self, path: str, runs: Any, rank: int, unit_share: float, head: int) -> Any:
                seen.append(runs[0].before)
                return super()._fitted(path, runs, rank, unit_share, head)

        Noted(model, self.samples).fit([path], windows=windows, progress=False)
        with replace_body(model, Body({}, HEAD, 16, windows)):
            # 60 tokens are no prompt for the reference, but their body is one of a longer prompt's all the same
            before, _ = stream_before(model, path, torch.cat([ids, tokens(1, 60)[0]])[None])
        torch.testing.assert_close(seen[0][:, :28], before[:, :28], rtol=1e-5, atol=1e-5)

    def test_an_attention_that_takes_no_window(self) -> None:
        model = tiny("bloom")
        path = adaskip_compile.analyze(model, input_ids=tokens(1, 20)).paths[0]
        with pytest.raises(LegalityError, match=f"{path}: its attention is not known to be causal and no more"):
            fit_prompt_skips(model, [], self.samples, windows={path: 4}, progress=False)

    def test_senseless(self) -> None:
        model = tiny("llama")
        path = "model.layers.0.mlp"
        with pytest.raises(OptionError, match="rank=65: takes a number from 1 to the width of the stream, 64"):
            fit_prompt_skips(model, [path], self.samples, rank=65, progress=False)
        with pytest.raises(ProfileError, match="a sample has 9 tokens; maps of a prompt's body need more than 33"):
            fit_prompt_skips(model, [path], [tokens(1, 9)[0]], progress=False)

    def test_recurrent_sublayers_are_refused(self) -> None:
        model = tiny("mamba")
        path = adaskip_compile.analyze(model, input_ids=tokens(1, 20)).paths[0]
        with pytest.raises(LegalityError, match=f"{path} carries a state"):
            fit_prompt_skips(model, [path], self.samples, progress=False)


@pytest.mark.parametrize(
    ("option", "message"), [({"max_loss": -1}, "max_loss=-1: takes"), ({"context": 3}, "context=3: takes")]
)
def test_senseless_budget(option: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_within_loss(tiny("llama"), None, **option)


def test_a_tokenizer_beside_a_plan_is_refused() -> None:
    with pytest.raises(OptionError, match="tokenizer= is to find a plan with, and a plan or profile is given"):
        adaskip_compile.compile(tiny("llama"), SkipPlan.none(), tokenizer=object())


def test_depths_are_bisected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 layers below the last: 5 deepest of both keep the budget, 6 FFNs, and no more attentions."""
    search = loss_budget._Search.__new__(loss_budget._Search)
    search._most = 6
    search._layers = tuple(((f"{layer}.attn",), (f"{layer}.ffn",)) for layer in range(12))
    tries: list[tuple[int, int, int]] = []

    def attempt(_: Any, max_loss: float, one: Depths) -> tuple[Trade, PromptSkips]:
        tries.append((one.attentions, one.ffns, one.windows))
        quality = Quality(0.01 * one.attentions + 0.01 * max(0, one.ffns - 1) + 0.004 * one.windows, 0.0)
        return Trade(one.attentions, one.ffns, 1.0, quality.loss <= max_loss, quality), PromptSkips(())

    monkeypatch.setattr(loss_budget._Search, "_try", attempt)
    monkeypatch.setattr(loss_budget._Search, "_gain", lambda _, one: 1 + one.ffns + pays * one.windows)
    pays = 0
    within = [(trade.attentions, trade.ffns) for trade, _ in search.trades(0.1) if trade.within]
    assert max(within) == (5, 6)
    assert tries == [(4, 4, 0), (5, 5, 0), (6, 6, 0), (5, 6, 0), (6, 6, 0)]
    # Where windows pay they go in step with FFNs, and attentions are skipped last.
    tries.clear()
    pays = 1
    within = [(trade.attentions, trade.ffns) for trade, _ in search.trades(0.057) if trade.within]
    assert tries == [(0, 4, 4), (0, 5, 5), (0, 5, 4), (0, 6, 4), (3, 5, 4), (1, 5, 4)]
    assert within == [(0, 4), (0, 5)]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_few_layers(layers: int) -> None:
    """One layer below the last one may go, and a model without any has nothing to skip: its plan is empty."""
    model = tiny("llama", num_hidden_layers=layers, vocab_size=260, max_position_embeddings=420)
    sizes = BudgetSizes(prompt=512, continued=16, fitted=2, measured=2, needles=2)  # more than there are positions
    plan = plan_within_loss(model, byte_tokenizer(), max_loss=99, context=404, sizes=sizes, progress=False)
    assert plan.prompt is not None
    assert max((trade.attentions for trade in plan.prompt.frontier), default=0) == layers - 1


def test_a_likelihood_that_overflows_is_no_quality() -> None:
    with pytest.raises(ProfileError, match="overflows"):
        Quality.of((1.0, float("nan")), (1.0, 1.0))


def test_no_more_facts_are_asked_for_than_decide() -> None:
    needle = Needle(tokens(1, 80)[0], "", 0.5)
    judge = PromptJudge(tiny("llama"), [], [(needle, [1, 2])] * 6)
    assert judge.answers(SkipPlan.none(), 1).found == (0.0,) * 6
    assert judge.answers(SkipPlan.none(), 3).found == (0.0,) * 4


def test_facts_are_strewn_in_every_third_prompt_to_fit_on() -> None:
    tokenizer = byte_tokenizer()
    samples = BudgetTexts(tokenizer, 600, BudgetSizes(prompt=400, fitted=18), domains_of(None)).to_fit()
    assert [len(ids) for ids in samples] == [400] * 9 + [600] * 6
    facts = [tokenizer.decode(ids).count("The code of the") > 2 for ids in samples]
    assert facts == [False, False, True] * 5
    asked = make_needles(tokenizer, ["words " * 200], context=400, count=3)
    assert not any(needle.code in tokenizer.decode(ids) for needle in asked for ids in samples)


def test_prompts_to_tune_on_have_what_follows_them() -> None:
    tokenizer = byte_tokenizer()
    texts = BudgetTexts(tokenizer, 600, BudgetSizes(prompt=400, fitted=18), domains_of(None))
    fitted, tuned = ([tokenizer.decode(ids) for ids in found] for found in (texts.to_fit(), texts.to_tune(64)))
    assert len(fitted) == len(tuned)
    for index, (shorter, longer) in enumerate(zip(fitted, tuned, strict=True)):
        if index % 3 < 2:
            assert len(longer) == len(shorter) + 64
            continue
        assert longer.startswith(shorter)
        asked = re.findall(r"What is the code of the ([\w ]+)\?\nThe code of the \1 is (\d+)\.", longer)
        assert len(asked) == 3
        assert all(f"\nThe code of the {name} is {code}.\n" in shorter for name, code in asked)


def decoded(texts: list[tuple[torch.Tensor, int]]) -> list[str]:
    return [byte_tokenizer().decode(ids) for ids, _ in texts]


def test_further_texts_are_others() -> None:
    texts = BudgetTexts(byte_tokenizer(), 300, BudgetSizes(prompt=300, measured=6), domains_of(None))
    seen, further = (decoded(texts.to_measure(further=further).texts) for further in (False, True))
    assert len(seen) == len(further) == 6
    assert not {*seen} & {*further}


class TestOwnTexts:
    """Documents of the user's own: some to fit on, the others to measure with, and nothing else."""

    documents = tuple(made_up(name, seed, words=1200) for seed in range(4) for name in ("sea", "city"))
    sizes = BudgetSizes(prompt=300, continued=32, fitted=9, measured=4, needles=3)

    def texts(self, documents: Sequence[str]) -> BudgetTexts:
        return BudgetTexts(byte_tokenizer(), 300, self.sizes, domains_of(documents))

    def test_what_is_fitted_on_is_never_measured(self) -> None:
        texts = self.texts(self.documents)  # the sea to fit on, the city to measure: in turn
        plain = [byte_tokenizer().decode(ids) for ids in texts.to_fit()][0:9:3]
        assert len(plain) == 3
        assert all("wave" in text and "tram" not in text for text in plain)
        for further in (False, True):
            found = texts.to_measure(further=further)
            assert len(found.texts) == 4
            assert all(prompt == 300 and len(ids) == 332 for ids, prompt in found.texts)
            assert all("tram" in text and "wave" not in text for text in decoded(found.texts))
            assert not any("wave" in byte_tokenizer().decode(needle.ids) for needle, _ in found.needles)

    def test_a_lone_document_is_cut_in_two(self) -> None:
        texts = self.texts([made_up("sea", 1, words=4000) + made_up("city", 1, words=4000)])
        assert "wave" not in decoded(texts.to_measure().texts)[0]

    def test_too_little_text_is_refused(self) -> None:
        with pytest.raises(OptionError, match="too little in them to fit on some and to measure others"):
            self.texts([" "])
        with pytest.raises(OptionError, match=r"make \d prompts of 300 tokens to fit on, and 8 are needed"):
            self.texts(["word " * 200] * 2).to_fit()
        with pytest.raises(OptionError, match="has 20 tokens, too few for a prompt and 32 after it"):
            self.texts(["word " * 5] * 2).to_measure()

    def test_they_are_what_a_plan_is_found_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The plan is kept for these texts: other ones have one of their own, and the same ones find it again."""
        seen: list[Any] = []

        def found(*_: Any, texts: Any, **__: Any) -> SkipPlan:
            seen.append(texts)
            return SkipPlan.none()

        monkeypatch.setattr(kept_plans, "plan_within_loss", found)
        for documents in (self.documents, self.documents[:4], None, iter(self.documents)):
            model: Any = tiny("llama", num_hidden_layers=1)
            adaskip_compile.compile(model, tokenizer=byte_tokenizer(), texts=documents, inner="eager")
        assert seen == [self.documents, self.documents[:4], None]
        with pytest.raises(OptionError, match="give tokenizer= too"):
            adaskip_compile.compile(tiny("llama"), texts=self.documents)

    def test_a_plan_is_found_with_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And with maps that may be made of an FFN's own units."""
        shares: list[float] = []
        fit = SequenceFitter.fit

        def noted(fitter: SequenceFitter, paths: Any, *, unit_share: float, **how: Any) -> PromptSkips:
            shares.append(unit_share)
            return fit(fitter, paths, unit_share=unit_share, **how)

        monkeypatch.setattr(SequenceFitter, "fit", noted)
        model = tiny("llama", num_hidden_layers=3, vocab_size=260, max_position_embeddings=1024)
        plan = plan_within_loss(
            model, byte_tokenizer(), max_loss=99, context=300, texts=self.documents, sizes=self.sizes, progress=False
        )
        assert plan.prompt is not None
        assert plan.prompt.frontier
        assert set(shares) == {1 / 8}


@pytest.mark.pretrained
@pytest.mark.slow
def test_a_real_model_from_nothing(part_of_smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = part_of_smollm2
    monkeypatch.setattr(loss_budget, "BudgetSizes", lambda: SMALL)
    monkeypatch.setattr(loss_budget, "_DEEPEST", 1 / 3)
    options: dict[str, Any] = {"inner": "eager", "cache_dir": tmp_path, "progress": False, "context": 192}
    adaskip_compile.compile(model, tokenizer=tokenizer, max_loss=0.1, **options)
    [file] = (tmp_path / "plans").glob("*.json")
    plan = SkipPlan.load(file)
    assert plan.prompt is not None
    assert plan.prompt.frontier
    within = [trade for trade in plan.prompt.frontier if trade.within]
    assert all(trade.quality.loss <= 0.1 for trade in within)
    if within:
        assert plan.prompt.measured is not None
        assert plan.prompt.measured == max(within, key=lambda trade: trade.speedup)
        assert plan.prompt.measured.speedup > 1
    else:
        assert not plan.prompt.skipped
    ids = tokens(1, 192)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2)
    request = adaskip_compile.report(model).requests[-1]  # other tests may have compiled this model before
    assert request.body_tokens == (159 if within else 0)
    assert request.skipped == {}

    # The next time it is there at once.
    monkeypatch.setattr(kept_plans, "plan_within_loss", None)
    adaskip_compile.compile(model, tokenizer=tokenizer, max_loss=0.1, **options)
    adaskip_compile.restore(model)
