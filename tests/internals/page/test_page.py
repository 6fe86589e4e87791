"""The report page: its data against the study's figures, its sampler against the real one, the page in a browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from browser import CHROMIUM, Browser, Page
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.attribution.translators import Translators, fingerprint, saved_lens, translated
from minigpt.internals.causal.ablation import ablate
from minigpt.internals.page.render import PAGE, SCRIPTS, as_json, packed, packed_shares, render, unpacked
from minigpt.internals.page.report import Report, report
from minigpt.internals.page.views import SHOWN, next_token
from minigpt.internals.study import Study
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.recipe import cook
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.settings.orders import ORDERS
from minigpt.tokenizer.plain import CharTokenizer
from processor_cases import context_of
from toys import PRESETS, random_ids, random_model, tiny_config

LETTERS = [chr(48 + i) for i in range(61)]
TEXT = "ABC DEF ABC".replace(" ", "_")
HOSTILE = "</script><img src=x onerror=\"window.harmed='token'\"><b>"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")


def written(preset: str, **changes: Any) -> Study:
    """A random model over 61 characters."""
    return Study.of(random_model(tiny_config(preset, **changes)), CharTokenizer(LETTERS))


# The data.


def test_arrays_come_back_as_they_were_packed() -> None:
    whole = np.arange(24).reshape(2, 3, 4) * 40
    assert (unpacked(packed(whole, "u16")) == whole).all()
    floats = torch.randn(5, 2)
    assert (unpacked(packed(floats, "f32")) == floats.numpy()).all()
    shares = np.array([0, 1e-4, 0.003, 0.5, 1])
    np.testing.assert_allclose(unpacked(packed_shares(shares, "u16")), shares, rtol=2e-3)
    np.testing.assert_allclose(np.sqrt(unpacked(packed_shares(shares, "u8"))), np.sqrt(shares), atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_data_are_the_studys_own_figures(preset: str) -> None:
    study = written(preset)
    data = report(study, TEXT).data
    ids = study.ids(TEXT)[0]
    logits, cache = study.run_with_cache(TEXT, "pattern")
    log_p, rows = logits[0].log_softmax(-1), len(ids)
    assert [token["id"] for token in data["tokens"]] == ids.tolist()
    assert "".join(token["s"] for token in data["tokens"]) == TEXT

    lower = torch.ones(rows, rows).tril().bool()
    stored = np.sqrt(unpacked(data["attn"]["weights"]))
    np.testing.assert_allclose(stored, cache.stack("pattern")[:, 0][:, :, lower].sqrt().numpy(), atol=0.51 / 255)

    loss = data["loss"]
    np.testing.assert_allclose(unpacked(loss["nats"]), study.losses(TEXT)[0].numpy(), rtol=1e-5)
    own = log_p[:-1].gather(1, ids[1:, None])
    assert unpacked(loss["rank"]).tolist() == (1 + (log_p[:-1] > own).sum(-1)).tolist()
    np.testing.assert_allclose(
        unpacked(loss["entropy"]), torch.distributions.Categorical(logits=log_p[:-1]).entropy(), rtol=1e-4
    )
    assert (unpacked(loss["ids"])[:, 0] == log_p[:-1].argmax(-1).numpy()).all()

    lens = data["lens"]["kinds"]["logit"]
    assert lens["rows"] == ["embed", "L0 attn", "L0 mlp", "L1 attn", "L1 mlp"]
    best = log_p.exp().topk(10)
    assert (unpacked(lens["ids"])[-1] == best.indices.numpy()).all()
    np.testing.assert_allclose(unpacked(lens["p"])[-1], best.values.numpy(), rtol=1e-3, atol=1e-6)
    assert unpacked(lens["kl"])[-1].max() < 1e-6 < unpacked(lens["kl"])[0].min()

    without = ablate(study, TEXT, parts="head")
    for name, badge in data["attn"]["badges"].items():
        assert badge["effect"] == pytest.approx(without[name, "loss"], abs=1e-6)
        assert all(0 <= badge[kind] <= 1 for kind in ("previous", "duplicate", "induction", "current", "first"))
    assert {int(id) for id in data["pieces"]} >= set(np.unique(unpacked(lens["ids"])).tolist())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_attribution_of_every_token_is_that_of_the_one_function(preset: str) -> None:
    study = written(preset)
    dla = report(study, TEXT).data["dla"]
    values, logit, residual = (unpacked(dla[name]) for name in ("values", "logit", "residual"))
    np.testing.assert_allclose(values.sum(-1) + residual, logit, atol=1e-4)
    assert np.abs(residual).max() < 1e-4
    for which, tokens in enumerate((dla["answer"], dla["versus"])):
        for position in (0, 4, len(TEXT) - 1):
            single = study.attribute_logit(TEXT, tokens[position], position=position, by="head")
            assert single.axes[0].labels == dla["rows"]
            np.testing.assert_allclose(values[which, position], single.values, atol=1e-4)
    if study.config.logit_softcap:
        np.testing.assert_allclose(unpacked(dla["capped"]), dla["cap"] * np.tanh(logit / dla["cap"]), rtol=1e-4)


def test_a_page_under_edits_shows_the_edited_model() -> None:
    study = written("llama")
    plain = unpacked(report(study, TEXT).data["loss"]["nats"])
    with study.hooks({("z", 0): 0.0}):
        data = report(study, TEXT).data
        np.testing.assert_allclose(unpacked(data["loss"]["nats"]), study.losses(TEXT)[0].numpy(), rtol=1e-5)
    assert not np.allclose(unpacked(data["loss"]["nats"]), plain, atol=1e-3)
    assert "effect" not in data["attn"]["badges"]["L0H0"]


def test_only_what_fits_is_shown_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    study = written("gpt2")
    assert len(report(study, "A" * 40).data["tokens"]) == 24
    assert "the first 24 of 40 tokens" in capsys.readouterr().err
    assert len(report(study, TEXT, most=3).data["tokens"]) == 3
    assert "loss" not in report(study, "A").data
    assert re.fullmatch(r"<?\d+>?", report(Study.of(study.model), random_ids(1, 2)).data["tokens"][0]["s"])
    with pytest.raises(DataError, match="has no tokens"):
        report(study, "")
    with pytest.raises(ConfigError, match="2 texts"):
        report(study, random_ids(2, 4))
    with pytest.raises(ConfigError, match="'flat' has 1 axes"):
        report(study, TEXT, results=[Result("flat", np.zeros(2), (Axis("a", ["x", "y"]),))])
    with torch.no_grad():
        study.model.unembed.weight[3] = math.nan
    with pytest.raises(DataError, match="not finite"):
        report(study, TEXT)


def test_a_lens_made_for_the_model_is_shown_and_another_models_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    study = Study(folder)
    ahead = {point.name: torch.eye(32) * (1 + point.layer) for point in translated(study)}
    shift = {name: torch.ones(32) for name in ahead}
    Translators("tuned", ahead, shift, fingerprint(study.model)).save(saved_lens(study, "tuned"))
    kinds = study.report(TEXT).data["lens"]["kinds"]
    found, plain = (unpacked(kinds[kind]["kl"]) for kind in ("tuned", "logit"))
    np.testing.assert_allclose(found, study.tuned_lens(TEXT, stat="kl").values, rtol=1e-4, atol=1e-6)
    assert not np.allclose(found[0], plain[0], rtol=0.01)
    Translators("tuned", ahead, shift, "another").save(saved_lens(study, "tuned"))
    assert list(study.report(TEXT).data["lens"]["kinds"]) == ["logit"]
    assert "tuned lens skipped" in capsys.readouterr().err


def test_the_docs_name_every_key_of_the_data(run: Path) -> None:
    data = Study(run).report(TEXT).data
    text = (Path(__file__).parents[3] / "docs" / "study" / "page.md").read_text(encoding="utf-8")
    table = text[text.index("## The data") :]
    named = set(re.findall(r"`([\w.]+)`", table))
    inside = {key for part in ("loss", "attn", "dla", "next", "runs") for key in data[part]}
    assert set(data) - named <= {"lens"} and "lens.kinds.logit" in named
    assert inside | set(data["lens"]["kinds"]["logit"]) <= named


def test_bytes_that_are_no_text_are_shown_as_numbers() -> None:
    study = written("gpt2")
    study.tokenizer.pieces[17] = b"\xe2\x82"
    assert report(study, "AB").data["tokens"][0]["s"] == "<E2 82>"


# The page as a text.


def test_the_page_holds_its_data_and_nothing_from_elsewhere() -> None:
    made = report(written("llama"), TEXT)
    page = made.html()
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(found) == made.data
    assert not re.search(r"https?:|//[a-z]+\.", page)
    assert "default-src 'none'" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page)
    assert sum(len((PAGE / f"{name}.js").read_text().splitlines()) for name in SCRIPTS) < 900
    assert {path.stem for path in PAGE.glob("*.js")} == set(SCRIPTS)


def test_what_is_put_into_the_page_is_not_read_as_markup_or_template() -> None:
    page = render({"title": "<b>&{{data}}", "x": f"{HOSTILE}{{{{script}}}}\u2028", "pieces": {}})
    assert "<title>&lt;b&gt;&amp;{{data}}</title>" in page
    assert HOSTILE not in page
    assert as_json({"x": HOSTILE}).count("<") == 0
    assert json.loads(as_json({"x": HOSTILE + "\u2028"}))["x"] == HOSTILE + "\u2028"
    assert json.loads(as_json("\ud800")) == "?"
    with pytest.raises(ValueError, match="JSON"):
        as_json([math.nan])


def test_a_report_is_saved_and_shown_in_a_notebook(tmp_path: Path) -> None:
    made = report(written("modern"), TEXT)
    assert made.save(tmp_path / "a.html").read_text(encoding="utf-8") == made.html()
    assert json.loads(made.save(tmp_path / "a.json").read_text()) == made.data
    with pytest.raises(ConfigError, match=r"\.html or \.json"):
        made.save(tmp_path / "a.pdf")
    assert 'sandbox="allow-scripts"' in made._repr_html_()
    assert "<script" not in made._repr_html_()


# The sampler in the page.


def settings(count: int) -> list[dict[str, Any]]:
    """Each step alone, at several strengths, then several together."""
    single: dict[str, list[Any]] = {
        "temperature": [0, 0.3, 1.7],
        "top_k": [1, 7, 49, 500],
        "top_p": [0, 0.3, 0.95],
        "min_p": [0.01, 0.3, 1.0],
        "typical_p": [0.05, 0.5, 0.97],
        "repetition_penalty": [0.7, 1.3],
        "presence_penalty": [-1, 0.8],
        "frequency_penalty": [-0.5, 0.6],
        "smoothing_factor": [0.2, 1.1],
        "top_h": [0.21, 0.79],
        "epsilon_cutoff": [0.005, 0.4],
        "eta_cutoff": [0.004, 0.3],
        "top_a": [0.1, 0.9],
        "tail_free": [0, 0.4, 0.95],
        "top_n_sigma": [0.5, 1.5],
        "p_less": [True],
    }
    made = [{name: value} for name, values in single.items() for value in values]
    made += [{"smoothing_factor": 0.3, "smoothing_curve": 2.5}, {"temperature": 0, "top_k": 3, "presence_penalty": 1}]
    made += [{"temperature": 0.9, "dynatemp_range": 0.6, "dynatemp_exponent": 1.4}, {"dynatemp_range": 2}]
    draw = random.Random(5)
    for _ in range(count):
        chosen = draw.sample(sorted(single), 4)
        some = {name: draw.choice([v for v in single[name] if v != 0 or name != "temperature"]) for name in chosen}
        made.append({**some, "order": draw.choice(list(ORDERS))})
    return [{"temperature": 1.0, **given} for given in made]


def python_stages(given: dict[str, Any], logits: torch.Tensor, history: list[int]) -> list[dict[str, Any]]:
    """The real processors' distributions, for rows of float64 logits."""
    config = SamplingConfig(**{"penalty_scope": "both", **given})
    config.validate()
    pipeline = Pipeline(cook([config], CharTokenizer(map(chr, range(100, 100 + len(logits)))), len(logits))[0])
    stages = [
        {"name": name, "p": stage[0].softmax(-1).tolist(), "possible": int((stage > -math.inf).sum())}
        for name, stage in pipeline.stages(context_of([history]), logits[None])
    ]
    if given["temperature"] == 0:
        likeliest = torch.tensor(stages[-1]["p"]).argmax()
        p = torch.nn.functional.one_hot(likeliest, len(logits)).tolist()
        stages.append({"name": "likeliest", "p": p, "possible": 1})
    return stages


def javascript(code: str) -> Any:
    """What the page's sampler, then this code, print as JSON."""
    source = "\n".join((PAGE / f"{name}.js").read_text() for name in ("sampler",))
    ran = subprocess.run(["node", "-"], input=f"{source}\n{code}", capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def page_stages(logits: torch.Tensor, history: list[int], cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The page's distributions, by token id."""
    off = next_token(written("gpt2"), logits, torch.tensor(history))
    given = [
        {"params": {**off["off"], **case}, "order": off["orders"][case.get("order", "transformers")]} for case in cases
    ]
    code = f"""
    const z = {logits.tolist()}, counts = {[history.count(id) for id in range(len(logits))]};
    console.log(JSON.stringify({json.dumps(given)}.map(({{ params, order }}) =>
      stagesOf({{ z, n: z.map(() => 1) }}, params, order, {json.dumps(off["off"])}, {{ counts }})
        .map(({{ name, p, possible, entropy, kl }}) => ({{ name, p, possible, entropy, kl }})))));"""
    return javascript(code)


@needs_node
@pytest.mark.parametrize("seed", [0, 1])
def test_the_pages_sampler_is_the_real_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(50, generator=generator, dtype=torch.float64)
    if seed:  # with ties, and some that are hopeless
        logits = logits.round()
        logits[7] = -60.0
    history = torch.randint(50, (20,), generator=generator).tolist()
    cases = settings(25)
    for given, found in zip(cases, page_stages(logits, history, cases), strict=True):
        expected = python_stages(given, logits, history)
        assert len(found) == len(expected), (given, [s["name"] for s in found], [s["name"] for s in expected])
        for page, real in zip(found, expected, strict=True):
            p, q = torch.tensor(page["p"], dtype=torch.float64), torch.tensor(real["p"], dtype=torch.float64)
            assert ((p > 0) == (q > 0)).all(), (given, page["name"])
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-12, msg=lambda m: f"{given} {page['name']}: {m}")  # noqa: B023
            assert page["possible"] == real["possible"]
            assert page["entropy"] == pytest.approx(float(torch.special.entr(q).sum()), abs=1e-9)
            model = logits.softmax(-1)
            assert page["kl"] == pytest.approx(float(torch.xlogy(q, q / model).sum()), abs=1e-6)


@needs_node
def test_the_rest_of_a_large_vocabulary_counts_in_groups() -> None:
    logits = 2 * torch.randn(20000, generator=torch.Generator().manual_seed(0))
    study = Study.of(random_model(tiny_config("gpt2", vocab_size=20000)))
    entry = next_token(study, logits, torch.tensor([1, 2]))
    assert sum(count for count, _ in entry["groups"]) == 20000 - 1024
    z = [*unpacked(entry["logits"]).tolist(), *(z for _, z in entry["groups"])]
    n = [1] * 1024 + [count for count, _ in entry["groups"]]
    for temperature, tolerance in ((1.0, 1e-6), (0.7, 2e-3), (1.5, 2e-3)):
        found = javascript(
            f"console.log(JSON.stringify(softmax({z}.map((v) => v / {temperature}), {n}).p.slice(0, 1024)))"
        )
        expected = (logits.double() / temperature).softmax(-1)[unpacked(entry["ids"]).astype(np.int64)]
        np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_every_slider_is_a_setting_of_the_sampler() -> None:
    sliders = set(re.findall(r"^  (\w+): \[\"|, (\w+): \[\"", (PAGE / "next.js").read_text(), re.MULTILINE))
    assert {name for pair in sliders for name in pair if name} == set(SHOWN)
    steps = set(re.findall(r"^  (\w+): \(z, n", (PAGE / "sampler.js").read_text(), re.MULTILINE))
    assert steps == set(SHOWN) - {"smoothing_curve", "dynatemp_range", "dynatemp_exponent"}
    assert all(steps <= set(order.steps) for order in ORDERS.values())


@pytest.mark.parametrize("settings", [{"top_k": 5, "top_p": 0.9, "temperature": 0.5}, {"xtc_probability": 0.5}, {}])
def test_the_sampler_starts_with_the_runs_own_settings(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    model = random_model(tiny_config("llama", vocab_size=64))  # three rows more than there are characters
    save_checkpoint(folder, model, CharTokenizer(LETTERS), sampling=settings)
    entry = report(Study(folder), "ABC").data["next"]
    assert {name: entry["params"][name] for name in settings if name in SHOWN} == {
        name: value for name, value in settings.items() if name in SHOWN
    }
    assert entry["others"] == [name for name in settings if name not in SHOWN]
    assert unpacked(entry["ids"]).max() == 60


# The page in a browser.


def series() -> str:
    """A metrics.jsonl with a line that was cut off."""
    rows = [{"step": s, "train/loss": 4 / s, "internals/induction/L0H1": s / 40, "note": "x"} for s in range(1, 31)]
    rows += [{"step": 30, "val/loss": 0.5, "internals/induction/L1H0": None, "internals/ablation/L1H0": 0.25}]
    return "\n".join(map(json.dumps, rows)) + '\n{"step": 31, "tr'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose names are markup."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=window.harmed=1>"
    train_config = {"data": {"source": "a/<b>corpus</b>"}}
    model = random_model(tiny_config("modern"))
    save_checkpoint(
        folder / "checkpoints" / "step-00000030", model, CharTokenizer(LETTERS), train_config=train_config,
        sampling={"temperature": 0.8, "top_k": 5},
    )  # fmt: skip
    (folder / "metrics.jsonl").write_text(series())
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = Study(run)
    grid = Result("<i>grid</i>", np.array([[1.0, -2.0], [0.5, 0.0]]), (Axis("y", ["a", "b"]), Axis("x", ["<u>", "d"])))
    return study.report(TEXT, results=[grid]).save(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def page(browser: Browser, file: Path) -> Page:
    return browser.open(file)


def text_of(page: Page, selector: str) -> str:
    return page.value(f"document.querySelector({json.dumps(selector)}).innerText")


@needs_chromium
def test_every_view_is_drawn_without_a_complaint_or_a_request(page: Page) -> None:
    sections = page.value("[...document.querySelectorAll('main > section')].map((s) => s.id)")
    assert sections == ["text", "attention", "lens", "attribution", "next", "grid0", "training"]
    assert page.complaints() == []
    assert [address[:5] for address in page.requests()] == ["file:"]
    assert "".join(page.value("[...document.querySelectorAll('#text .t')].map((t) => t.textContent)")) == TEXT
    assert page.value("document.querySelectorAll('.tile').length") == 8
    assert page.value("document.querySelectorAll('.lens tbody td').length") == 5 * len(TEXT)
    # Each section says in a sentence what it shows.
    assert page.value("[...document.querySelectorAll('section .say')].every((p) => p.innerText.endsWith('.'))")


@needs_chromium
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("text", ["A", TEXT])
def test_the_page_of_every_preset_is_drawn(browser: Browser, tmp_path: Path, preset: str, text: str) -> None:
    page = browser.open(report(written(preset), text).save(tmp_path / "page.html"))
    assert page.complaints() == []
    assert page.value("document.querySelectorAll('.terms li').length") >= 10


@needs_chromium
def test_markup_in_names_and_tokens_is_shown_as_text(browser: Browser, page: Page, tmp_path: Path) -> None:
    study = written("llama")
    study.tokenizer.pieces[17] = HOSTILE.encode()
    study.tokenizer.pieces[18] = "\u202eevil\u2066\x00\x1b".encode()
    hostile = browser.open(study.report("ABCAB").save(tmp_path / "page.html"))
    for each in (page, hostile):
        assert each.value("window.harmed") is None
        assert each.value("document.querySelectorAll('img, b b, section i i, u, iframe, script:not([id])').length") == 1
        assert [address[:5] for address in each.requests()] == ["file:"]
        assert each.complaints() == []
    assert hostile.value("document.querySelector('#text .t').textContent") == HOSTILE
    assert HOSTILE.replace(" ", "·") in hostile.value("document.querySelector('.lens thead').textContent")
    assert text_of(page, "h1") == "<img src=x onerror=window.harmed=1>"
    assert page.value("document.title") == "<img src=x onerror=window.harmed=1>"
    assert "<b>corpus</b>" in text_of(page, ".card")
    assert "<i>grid</i>" in text_of(page, "#grid0")


@needs_chromium
def test_the_policy_lets_nothing_in(page: Page) -> None:
    page.value("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.wait("performance.now() > 0 && document.images[0].complete")
    assert any("Content Security Policy" in str(complaint) for complaint in page.complaints())


@needs_chromium
def test_hovering_a_token_tells_what_was_expected_there(page: Page, run: Path) -> None:
    losses = Study(run).losses(TEXT)[0]
    page.hover("#text .t:nth-child(5)")
    assert "token 4" in text_of(page, "#text .panel")
    assert f"{losses[3]:.2f} nats" in text_of(page, "#text .panel")
    assert page.value("document.querySelectorAll('#text .panel .bars li').length") == 10
    page.hover("#text .t:nth-child(1)")
    assert "The first token is not predicted" in text_of(page, "#text .panel")


@needs_chromium
def test_a_click_holds_a_token_until_it_is_let_go(page: Page) -> None:
    page.click("#text .t:nth-child(5)")
    page.hover("#text .t:nth-child(2)")
    assert page.value("state.tok") == 4
    assert "tok=4" in page.value("location.hash")
    assert page.value("[...document.querySelectorAll('.lens thead th.on')].map((h) => h.cellIndex)") == [5]
    page.key("ArrowRight")
    assert page.value("state.tok") == 5
    page.key("Escape")
    page.hover("#text .t:nth-child(3)")
    assert page.value("state.tok") == 2
    assert "tok" not in page.value("location.hash")


@needs_chromium
def test_a_head_is_enlarged_by_a_click_and_read_row_by_row(page: Page, run: Path) -> None:
    page.click('.tile[data-head="L1H2"]')
    assert text_of(page, ".large h3").startswith("L1H2")
    assert "head=L1H2" in page.value("location.hash")
    _, cache = Study(run).run_with_cache(TEXT, ("pattern", 1))
    pattern = cache["pattern", 1][0, 2]
    side = page.value("document.querySelector('.big').getBoundingClientRect().height")
    page.hover(".big", dy=side * ((7.5 / len(TEXT)) - 0.5))  # the row of token 7
    assert page.value("state.tok") == 7
    weights = "[...document.querySelectorAll('.strip .t')].map((t) => t.style.getPropertyValue('--w') ** 2)"
    np.testing.assert_allclose(page.value(weights), pattern[7].numpy(), atol=0.005)
    page.click(".large .chooser button:last-child")
    np.testing.assert_allclose(page.value(weights), pattern[:, 7].numpy(), atol=0.005)
    page.key("ArrowUp", shift=True)
    assert page.value("state.head") == "L0H2"


@needs_chromium
def test_the_lens_tells_a_cells_candidates_and_changes_its_shading(page: Page, run: Path) -> None:
    page.hover(".lens tbody tr:nth-child(2) td:nth-child(4)")
    lens = Study(run).logit_lens(TEXT)
    likeliest, share = lens.candidates[lens.axes[0].labels.index("0 mid")][2][0]
    first = text_of(page, "#lens .panel .bars li")
    assert first.split()[0] == likeliest
    assert float(first.split()[1].rstrip("%")) == pytest.approx(100 * share, abs=0.51)
    shades = "[...document.querySelectorAll('.lens tbody td')].map((c) => +c.style.getPropertyValue('--w'))"
    before = page.value(shades)
    page.click("#lens .chooser button:nth-of-type(3)")
    assert page.value("state.lens") == "kl"
    after = page.value(shades)
    assert after != before
    assert after[-len(TEXT) :] == [1.0] * len(TEXT)  # the last row is where the model ends


@needs_chromium
@pytest.mark.parametrize("show", ["first", "last"])  # the largest and the sum of the others; all in order
def test_the_bars_add_up_to_the_logit_that_is_told(browser: Browser, tmp_path: Path, show: str) -> None:
    study = written("gpt2", n_layer=4)
    page = browser.open(report(study, TEXT).save(tmp_path / "page.html"))
    page.click(f"#attribution .chooser:last-child button:{show}-of-type")
    rows = page.value("document.querySelectorAll('.terms li').length")
    assert rows == (15 if show == "first" else 2 + 4 * (4 + 2) + 1)
    for button in ("first-of-type", "last-of-type"):
        page.click(f"#attribution .chooser:first-child button:{button}")
        shown = page.value(
            "[...document.querySelectorAll('.terms b')].map((b) => b.textContent.replace('\u2212', '-'))"
        )
        total = float(text_of(page, ".sum b").replace("\u2212", "-"))
        assert sum(map(float, shown)) == pytest.approx(total, abs=0.005 * len(shown) + 0.001)
    assert "remainder" in text_of(page, ".sum")


@needs_chromium
def test_sliders_recompute_the_distribution(page: Page, run: Path) -> None:
    heads = "[...document.querySelectorAll('.waterfall thead th')].map((h) => h.textContent)"
    assert page.value(heads) == ["", "model", "temperature", "top-k"]
    assert page.value("document.querySelector('.waterfall tfoot tr').lastChild.textContent") == "5"
    move = (
        "((name, value) => { const input = document.querySelector(`input[name=${name}]`); input.value = value;"
        " input.dispatchEvent(new Event('input', { bubbles: true })); })"
    )
    page.value(f"{move}('top_k', 2)")
    assert page.value("document.querySelector('.waterfall tfoot tr').lastChild.textContent") == "2"
    page.value(f"{move}('temperature', 2)")
    p = (Study(run).logits(TEXT)[0, -1] / 2).softmax(-1).topk(2).values
    shown = text_of(page, ".waterfall tbody tr td:last-child").rstrip("%")
    assert float(shown) == pytest.approx(100 * float(p[0] / p.sum()), abs=0.51)
    page.value(f"{move}('temperature', 0)")
    assert page.value(heads) == ["", "model", "likeliest"]
    page.click("#next .controls > button")
    assert page.value(heads) == ["", "model", "temperature", "top-k"]


@needs_chromium
def test_curves_show_the_run_and_name_the_point_under_the_pointer(page: Page) -> None:
    titles = page.value("[...document.querySelectorAll('figcaption')].map((c) => c.firstChild.textContent)")
    assert titles == ["Loss, nats per token", "Induction", "Loss without the head, nats"]
    page.hover("#training svg", dx=-131, dy=-70)
    assert "training 4 at step 1" in text_of(page, "#training figcaption")
    assert "0.75" in text_of(page, "#training figure:nth-of-type(2) figcaption")
    # No point lies outside of its picture.
    places = page.value(
        "[...document.querySelectorAll('#training path')].flatMap((p) => p.getAttribute('d').slice(1).split('L')"
        ".map((xy) => xy.split(' ').map(Number)))"
    )
    assert all(0 <= x <= 360 and 0 <= y <= 170 for x, y in places)


@needs_chromium
def test_an_address_opens_the_page_where_it_was(browser: Browser, file: Path) -> None:
    page = browser.open(file, hash="#tok=3&head=L1H0&lens=rank&dla=rival")
    assert page.value("[state.tok, state.locked, state.head, state.lens, state.dla]") == [
        3,
        True,
        "L1H0",
        "rank",
        "rival",
    ]
    page = browser.open(file, hash="#tok=999&head=<img>&lens=constructor")
    assert page.value("[state.tok, state.locked, state.lens]") == [len(TEXT) - 1, False, "p"]
    assert page.complaints() == []


@needs_chromium
def test_a_views_data_can_be_copied(page: Page, run: Path) -> None:
    page.value(
        "window.copied = [];"
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => copied.push(text)}})"
    )
    for view in ("text", "attention", "lens", "attribution", "next", "training", "grid0"):
        page.click(f"#{view} .copy")
    copied = [json.loads(text) for text in page.value("copied")]
    np.testing.assert_allclose(copied[0]["loss"]["nats"]["values"], Study(run).losses(TEXT)[0].numpy(), rtol=1e-5)
    assert [len(row) for row in copied[1]["weights"]] == list(range(1, len(TEXT) + 1))
    assert copied[4]["params"]["top_k"] == 5
    assert sum(p for _, p in copied[4]["stages"][-1]["p"]) == pytest.approx(1)
    assert copied[6]["values"] == [[1.0, -2.0], [0.5, 0.0]]


@needs_chromium
def test_light_and_dark_follow_the_system_and_narrow_screens_fit(browser: Browser, file: Path) -> None:
    light, dark = browser.open(file), browser.open(file, dark=True, size=(420, 900))
    ground = "getComputedStyle(document.body).backgroundColor"
    assert light.value(ground) != dark.value(ground)
    pixel = "[...document.querySelector('.tile canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    before = light.value(pixel)
    light.call("Page.bringToFront")  # a tab behind another one draws nothing
    light.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    light.wait("state.theme === true")
    assert light.value(pixel) == dark.value(pixel) != before
    assert dark.value("document.documentElement.scrollWidth") <= 420
    light.call("Emulation.setEmulatedMedia", media="print")
    assert light.value("getComputedStyle(document.querySelector('nav')).display") == "none"


# The verb.


def test_inspect_writes_a_page_or_prints_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["inspect", str(run), TEXT, "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["inspect", str(run), "--text", TEXT, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert Report(data).html() == out.read_text(encoding="utf-8")
    assert data["model"]["step"] == 30
    assert data["runs"]["series"]["internals/ablation/L1H0"] == [[30], [0.25]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a run and a text"),
        (["RUN"], "expected a run and a text"),
        (["RUN", "A", "--tokens", "0"], "--tokens 0: expected 1 or more"),
        (["RUN", "A", "-o", "page.pdf"], "page.pdf: expected a name that ends in .html or .json"),
        (["RUN", "é"], "is not in the vocabulary"),
        (["nowhere", "A"], "nowhere: no such folder"),
        (["RUN", "A", "--outptu", "x"], "did you mean --output"),
    ],
)
def test_inspect_says_in_a_line_what_is_wrong(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["inspect", *(str(run) if item == "RUN" else item for item in arguments)]) > 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
