from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaskip_compile.costs.timers import ROOFLINES, Measured, Timer, cost_at, predict
from adaskip_compile.inspection.inspection import Inspection, inspect_model
from adaskip_compile.inspection.pages import inspection_page
from adaskip_compile.inspection.report import inspection_report
from adaskip_compile.inspection.swept_plans import SweptPlan
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile, SublayerProfile
from adaskip_passes.errors import OptionError
from tests.adaskip_compile.inspection.browsers import browser
from tests.models import tiny

MEASURED = Measured(
    (64, 512, 2048),
    {"prefill": ((2.0, 3.0, 9.0), (1.0, 1.5, 1.0), (0.1, 0.1, 0.1))}
    | {"decode": ((2.0, 4.0, 8.0), (1.0, 1.0, 1.0), (3.0, 3.0, 3.0))},
    "a test",
)


@functools.cache
def inspected(layers: int = 3) -> Inspection:
    plan = replace(
        SkipPlan.from_scales({"model.layers.1.self_attn": 0.98, "model.layers.0.mlp": 1.02}, window=5), beta=0.9
    )
    model = tiny("llama", num_hidden_layers=layers, max_position_embeddings=8192)
    bare = inspect_model(model)
    measured = (
        SublayerProfile(one.path, one.kind, one.stateful, (0.9,), (1.1,), (1.1,), (64,)) for one in bare.sublayers
    )
    return inspect_model(model, name="a </script> model", profile=Profile(None, tuple(measured)), plan=plan)


def page_of(timer: Timer, folder: Path, **how: Any) -> str:
    file = folder / "page.html"
    file.write_text(inspection_page(inspection_report(inspected(), timer, 1000, **how)))
    return file.as_uri()


def bare_page(folder: Path) -> str:
    """Return the address of a page about a model without a profile or a plan."""
    model = tiny("llama", num_hidden_layers=3, max_position_embeddings=8192)
    file = folder / "page.html"
    file.write_text(inspection_page(inspection_report(inspect_model(model, name="bare"), ROOFLINES["cpu"], 1000)))
    return file.as_uri()


def long_session() -> dict[str, Any]:
    """Return a session of a report with texts that have no place to break."""
    tokens, seconds = {"prefill": 1234, "window": 5, "steady": 9}, {"prefill": 2.0, "window": 0.5, "steady": 0.9}
    request: dict[str, Any] = {"number": 1, "batch": 1, "tokens": tokens, "seconds": seconds, "kv_bytes": 5_000_000}
    request["skipped"] = {"model.layers.1.self_attn": 1.0}
    guard = "L['past_key_values'].layers[0].keys.size()[2]==" * 6
    return {
        "requests": [{**request, "extra": {f"model.layers.{layer}.mlp": 1.0 for layer in range(20)}}],
        "graphs": [{"phase": "decode", "captured_because": guard}],
        "unskipped_graphs": [],
        "notes": [],
    }


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Return a function that opens a page, and check at the end that it asked for nothing and complained of nothing."""
    context = chromium.new_context()
    requests: list[str] = []
    complaints: list[str] = []

    def open_page(address: str) -> Any:
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    assert complaints == []
    assert [url for url in requests if not url.startswith("file://")] == []
    assert len(requests) == 1
    context.close()


def slide(page: Any, stop: int) -> int:
    """Move the slider to a stop and return the context length that it then shows."""
    page.evaluate(
        "stop => { const slider = document.getElementById('context'); slider.value = stop;"
        "slider.dispatchEvent(new Event('input')); }",
        stop,
    )
    return int(page.inner_text("#context-value").replace(",", "").split()[0])


def value(page: Any, tile: str) -> float:
    return float(page.get_attribute(f"#{tile}", "value"))


@pytest.mark.parametrize("timer", [ROOFLINES["cpu"], MEASURED], ids=["roofline", "measured"])
def test_the_slider_moves_figures_to_the_values_of_the_cost_model(timer: Timer, tmp_path: Path, visit: Any):
    found = inspected()
    page = visit(page_of(timer, tmp_path))
    last = int(page.get_attribute("#context", "max"))
    seen = set()
    for stop in (0, 7, last // 2, last):
        context = slide(page, stop)
        seen.add(context)
        for phase in found.phases:
            expected = predict(found, timer, phase, context).speedup(found, found.skipped)
            assert value(page, f"{phase}-speedup") == pytest.approx(expected, rel=1e-9)
            assert f"{expected:.2f}\N{MULTIPLICATION SIGN}" in page.inner_text("#tiles")
        kept = [one for one in found.sublayers if not one.skipped]
        cache = sum(cost_at(found.groups[one.group].cost["decode"], "decode", context)["cache_bytes"] for one in kept)
        assert value(page, "cache-bytes") == cache
        for cell in page.query_selector_all("#formulas td[data-part]"):
            group, phase, part = (cell.get_attribute(f"data-{name}") for name in ("group", "phase", "part"))
            cost = found.groups[int(group)].cost if int(group) < len(found.groups) else found.rest
            assert float(cell.inner_text().replace(",", "")) == round(cost_at(cost[phase], phase, context)[part])
    assert len(seen) == 4
    assert max(seen) == 8192


def test_every_section_says_what_was_found(tmp_path: Path, visit: Any):
    page = visit(page_of(ROOFLINES["cpu"], tmp_path))
    assert page.inner_text("h1") == "a </script> model"
    assert page.locator("#stream .phase").count() == 3
    assert page.locator("#stream .phase").first.locator(".cell.skipped").count() == 2
    assert page.locator("#stream .phase").last.locator(".cell.open").count() == 2
    assert page.locator("#similarity-chart circle").count() == 6
    page.uncheck("#grouped")
    assert page.locator("#table tbody tr").count() == 6
    page.fill("#filter", "layers.1")
    assert page.locator("#table tbody tr").count() == 2
    page.locator("summary", has_text="skip-sublayers").first.click()
    assert "adaskip_scales" in page.locator("details[open] pre .plus").first.inner_text()
    assert page.locator("#runtime-section").is_hidden()


@pytest.mark.parametrize("width", [1200, 390])
def test_126_layers_stay_usable(width: int, tmp_path: Path, visit: Any):
    found = inspected()
    layers = (
        replace(one, path=one.path.replace("layers.0", f"layers.{layer}"))
        for layer in range(126)
        for one in found.sublayers[:2]
    )
    file = tmp_path / "page.html"
    file.write_text(inspection_page(inspection_report(replace(found, sublayers=tuple(layers)), ROOFLINES["cpu"], 1000)))
    page = visit(file.as_uri())
    page.set_viewport_size({"width": width, "height": 800})
    assert page.locator("#stream .phase").first.locator(".cell").count() == 252
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    chains = page.locator(".chain")
    assert all(chain.evaluate("box => box.scrollWidth <= box.clientWidth + 1") for chain in chains.all())
    began = time.perf_counter()
    for stop in range(10):
        slide(page, stop)
    assert time.perf_counter() - began < 10


def test_the_chain_is_walked_with_the_keyboard(tmp_path: Path, visit: Any):
    page = visit(page_of(ROOFLINES["cpu"], tmp_path))
    page.locator("#stream .cell[tabindex='0']").first.focus()
    for key, path in (("ArrowRight", "layers.0.mlp"), ("End", "layers.2.mlp"), ("Home", "layers.0.self_attn")):
        page.keyboard.press(key)
        assert path in page.inner_text("#chosen")
    assert page.locator("#stream .phase").first.locator("[tabindex='0']").count() == 1


def test_light_and_dark_are_told_apart(tmp_path: Path, chromium: Any):
    grounds = {}
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(page_of(ROOFLINES["cpu"], tmp_path))
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        grounds[f"not {scheme}"] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] == grounds["not dark"] != grounds["dark"] == grounds["not light"]


def test_a_model_without_a_stream_has_a_page_with_advice_only(tmp_path: Path, visit: Any):
    found = Inspection("m", "M", "float32", 1, problems=("no stream",))
    file = tmp_path / "page.html"
    file.write_text(inspection_page(inspection_report(found, ROOFLINES["cpu"], 64)))
    page = visit(file.as_uri())
    assert "no stream" in page.inner_text("#advice")
    assert page.locator("main > section:visible").count() == 1


def test_what_really_ran_is_shown(tmp_path: Path, visit: Any):
    tokens, seconds = {"prefill": 1234, "window": 5, "steady": 9}, {"prefill": 2.0, "window": 0.5, "steady": 0.9}
    request: dict[str, Any] = {"number": 1, "batch": 1, "tokens": tokens, "seconds": seconds, "kv_bytes": 5_000_000}
    request |= {"skipped": {"a": 1.0}, "extra": {"model.layers.7.mlp": 0.99}}
    session: dict[str, Any] = {"requests": [request], "unskipped_graphs": [], "notes": ["a note"]}
    session["graphs"] = [{"phase": "decode", "captured_because": "a guard"}]
    page = visit(page_of(ROOFLINES["cpu"], tmp_path, runtime={"sessions": [session]}))
    text = page.inner_text("#runtime-section")
    assert "1,234" in text
    assert "100 ms" in text
    assert "5 MB" in text
    assert "a note" in text
    assert "A decode graph was captured because this did not hold: a guard" in text
    assert "Request 1 skipped these too after its window: model.layers.7.mlp" in text


def test_without_a_plan_nothing_is_drawn_as_skipped(tmp_path: Path, visit: Any):
    page = visit(bare_page(tmp_path))
    assert page.locator("#skip-set option").all_inner_texts() == ["2 sublayers, for illustration"]
    assert value(page, "decode-speedup") > 1
    assert page.locator("#stream .cell").count() == 6
    assert page.locator(".cell.skipped, tr.skipped, .dot.skipped").count() == 0
    assert "a plan says which" in page.inner_text("#tiles")


def test_what_is_not_decided_yet_does_not_look_skipped(tmp_path: Path, visit: Any):
    page = visit(page_of(ROOFLINES["cpu"], tmp_path))
    fills = {
        name: page.locator(f"#stream .cell.{name}").last.evaluate("cell => getComputedStyle(cell).fill")
        for name in ("kept.ffn", "open.ffn", "skipped")
    }
    assert fills["open.ffn"] != fills["skipped"]
    assert page.locator("#stream .phase").last.locator(".hole").count() == 2


def test_equal_rows_are_one_and_columns_sort(tmp_path: Path, visit: Any):
    page = visit(bare_page(tmp_path))
    rows = page.locator("#table tbody tr")
    names = page.locator("#table tbody td:first-child")
    assert names.all_inner_texts() == [
        f"3 \N{MULTIPLICATION SIGN} model.layers.*.{name}" for name in ("self_attn", "mlp")
    ]
    shares = page.locator("#table tbody td:nth-child(8)").all_inner_texts()
    page.uncheck("#grouped")
    assert rows.count() == 6
    each = [float(text.split()[0]) for text in page.locator("#table tbody td:nth-child(8)").all_inner_texts()]
    assert sum(each[::2]) == pytest.approx(float(shares[0].split()[0]), abs=0.02)

    sort = page.get_by_role("button", name="Parameters")
    parameters = page.locator("#table tbody td:nth-child(3)")
    for order in ("descending", "ascending"):
        sort.click()
        numbers = [int(text.replace(",", "")) for text in parameters.all_inner_texts()]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert page.locator(f"th[aria-sort={order}]").inner_text().startswith("Parameters")
    sort.click()
    assert page.locator("th:not([aria-sort=none])").count() == page.locator("#formulas th").count()
    assert "layers.0.self_attn" in names.first.inner_text()


def test_what_is_looked_at_stands_in_the_address(tmp_path: Path, chromium: Any):
    address = page_of(ROOFLINES["cpu"], tmp_path)
    page = chromium.new_page()
    page.goto(address)
    assert "#" not in page.url
    context = slide(page, 7)
    page.uncheck("#grouped")
    page.fill("#filter", "mlp")
    page.select_option("#table-phase", "decode")
    page.get_by_role("button", name="Weights").click()

    again = chromium.new_page()
    again.goto(page.url)
    assert int(again.inner_text("#context-value").replace(",", "").split()[0]) == context
    assert again.inner_text("#table") == page.inner_text("#table")
    assert again.input_value("#filter") == "mlp"
    assert again.input_value("#table-phase") == "decode"
    assert not again.is_checked("#grouped")

    again.goto(f"{address}#context=nonsense&set=nobody&phase=lunch&sort=sideways")
    again.reload()
    assert again.locator("#table tbody tr").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_every_part_fits_and_is_accessible(width: int, scheme: Any, tmp_path: Path, chromium: Any):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    complaints: list[str] = []
    page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    sweep = [swept("full", 0, 1), swept("adaskip/1/scale", 0.02, 1.1, "model.layers.0.mlp")]
    page.goto(page_of(ROOFLINES["cpu"], tmp_path, runtime={"sessions": [long_session()]}, sweep=sweep))
    for part in page.locator("details").all():
        part.evaluate("part => { part.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    told = [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]
    assert [one for one in found if one["impact"] in ("serious", "critical")] == [], told
    assert complaints == []


def swept(name: str, loss: float, speed: float, *skipped: str) -> SweptPlan:
    spread = {"median": speed, "low": speed - 0.05, "high": speed + 0.1}
    speedup = dict.fromkeys(("request", "prefill", "decode"), spread)
    row = {"name": name, "nll_loss": loss, "speedup": speedup, "cache_bytes": 1_000_000}
    return SweptPlan.of({**row, "skipped": [*skipped], "prompt_skipped": []})


def test_what_plans_lose_is_shown(tmp_path: Path, visit: Any):
    ours = ("model.layers.1.self_attn", "model.layers.0.mlp")
    rows = [
        swept("full", 0, 1),
        swept("adaskip/1/scale", 0.02, 1.1, ours[0]),
        swept("adaskip/2/scale", 0.1, 1.3, *ours),
    ]
    page = visit(page_of(ROOFLINES["cpu"], tmp_path, sweep=rows))
    assert value(page, "perplexity") == pytest.approx(math.expm1(0.1))
    table = page.inner_text("#sweep")
    assert "adaskip/2/scale (the plan)" in table
    assert "+10.5 %" in table
    assert "1.10\N{MULTIPLICATION SIGN} (1.05 to 1.20)" in table
    places = [
        (float(dot.get_attribute("cx")), -float(dot.get_attribute("cy")))
        for dot in page.locator("#sweep-chart circle").all()
    ]
    assert len(places) == 3
    assert places == sorted(places)
    with pytest.raises(OptionError, match="over another model: a </script> model has no sublayer elsewhere"):
        page_of(ROOFLINES["cpu"], tmp_path, sweep=[swept("other", 0, 1, "elsewhere")])


def test_without_a_sweep_nothing_is_said_of_losses(tmp_path: Path, visit: Any):
    page = visit(page_of(ROOFLINES["cpu"], tmp_path))
    assert page.locator("#sweep-section").is_hidden()
    assert page.locator("#perplexity").count() == 0


def test_a_page_that_is_not_shown_draws_without_complaint(tmp_path: Path, visit: Any):
    page = visit(page_of(ROOFLINES["cpu"], tmp_path))
    page.evaluate("document.querySelector('main').style.display = 'none'; dispatchEvent(new Event('resize'));")
    widths = page.evaluate(
        "[...document.querySelectorAll('#gain-chart line, #similarity-chart line')].map((line) => line.x2.baseVal.value - line.x1.baseVal.value)"
    )
    assert widths
    assert min(widths) >= 0


def test_the_page_names_no_other_file():
    page = inspection_page(inspection_report(inspected(), ROOFLINES["cpu"], 1000))
    data = page[page.index('id="report">') + len('id="report">') :]
    assert json.loads(data[: data.index("</script>")].replace("\\u003c", "<"))["context"] == 1000
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")
