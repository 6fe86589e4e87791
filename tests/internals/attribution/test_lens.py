"""Lenses: what they read at the end is the model's output, and what they learn is what there is to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.internals.access.result import Axis
from minigpt.internals.attribution import tuned
from minigpt.internals.attribution.decomposition import Point, points
from minigpt.internals.attribution.jacobian import fit_jacobian_lens
from minigpt.internals.attribution.lens import Lens, lens_logits, logit_lens
from minigpt.internals.attribution.translators import Translators, fingerprint, jacobian_lens, lens_quality, tuned_lens
from minigpt.internals.attribution.tuned import train_tuned_lens
from minigpt.internals.study import Study
from minigpt.model.cache import causal_step
from minigpt.sampling.run import Run
from minigpt.terminal import hushed
from minigpt.tokenizer.plain import CharTokenizer
from toys import PRESETS, random_ids, random_model, tiny_config

IDS = random_ids(1, 9)
TEXT = random_ids(1, 400, seed=5)[0].tolist()


def study_of(preset: str, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes)))


def in_a_run(tmp_path: Path, seed: int = 0) -> Study:
    """As one that was loaded from a run's folder."""
    folder = tmp_path / "run/checkpoints/step-00000001"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CharTokenizer([chr(48 + i) for i in range(61)])
    return Study(Run(random_model(tiny_config("gpt2"), seed), tokenizer, {}, {}, folder))


# The logit lens.


@pytest.mark.parametrize("preset", PRESETS)
def test_the_last_row_is_the_models_output_to_the_bit(preset: str) -> None:
    study = study_of(preset)
    *_, (point, logits) = lens_logits(study, IDS, points(study.config))
    assert point.label == "1 post"
    assert torch.equal(logits, study.logits(IDS))
    assert (logit_lens(study, IDS, stat="kl").values[-1] == 0).all()

    def by_position(scale: torch.Tensor, site: Any) -> torch.Tensor:
        return scale + site.positions[:, None]

    with study.hooks({"ln_final.hook_scale": by_position}):
        *_, (_, logits) = lens_logits(study, IDS, points(study.config))
        assert torch.equal(logits, study.logits(IDS))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_has_the_norm_of_its_own_stream_and_the_cap(preset: str) -> None:
    study = study_of(preset)
    table = logit_lens(study, IDS, "resid_mid", "entropy")
    assert table.axes[0].labels == ["0 mid", "1 mid"]
    _, cache = study.run_with_cache(IDS)
    with torch.no_grad():
        # The model's own modules, on the stream there: its mean and variance, not the last stream's.
        log_p = study.model.unembed(study.model.trunk.norm(cache["resid_mid", 0])).log_softmax(-1)[0]
    expected = torch.distributions.Categorical(logits=log_p).entropy()
    np.testing.assert_allclose(table.values[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_an_empty_block_leaves_what_is_read() -> None:
    study = study_of("llama")
    with study.hooks({("attn_out", 1): 0.0, ("mlp_out", 1): 0.0}):
        table = logit_lens(study, IDS, "resid_post", "probability")
    assert np.array_equal(table.values[0, :-1], table.values[1, :-1])


def test_the_statistics_are_those_of_the_hand_worked_case() -> None:
    study = study_of("modern", vocab_size=4, logit_softcap=0.0, bigram_rows=0, trigram_rows=0)
    with torch.no_grad():
        study.model.unembed.weight.zero_()
        for block in study.model.trunk.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
        study.model.trunk.embed.weight.fill_(1.0)  # normed: 1 everywhere, to 5e-6
        study.model.unembed.weight[:, 0] = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    found = {
        stat: logit_lens(study, [0, 1, 2, 0], "resid_post", stat).values[-1]
        for stat in ("top", "probability", "rank", "loss", "entropy", "kl")
    }
    expected = {
        "top": [0.5] * 4,
        "probability": [0.25, 0.125, 0.5, np.nan],  # of 1, 2 and 0, which come next
        "rank": [2, 3, 1, np.nan],
        "loss": [2 * np.log(2), 3 * np.log(2), np.log(2), np.nan],
        "entropy": [1.75 * np.log(2)] * 4,
        "kl": [0.0] * 4,
    }
    for stat, values in expected.items():
        np.testing.assert_allclose(found[stat], values, rtol=1e-4, atol=1e-6, err_msg=stat)
    answered = logit_lens(study, [0, 1], "resid_post", "probability", answer=2)
    np.testing.assert_allclose(answered.values, 0.125, rtol=1e-4)
    kl = logit_lens(study, [0, 1], "resid_post", "kl", reader=lambda point, stream: -stream)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    q = 1 / p / (1 / p).sum()  # what minus the stream reads as
    np.testing.assert_allclose(kl.values, (p * np.log(p / q)).sum(), rtol=1e-4)


def test_a_table_prints_the_likeliest_tokens_and_carries_more(tmp_path: Path) -> None:
    study = in_a_run(tmp_path)
    table = logit_lens(study, "ABCDE", candidates=3)
    with torch.no_grad():
        best = study.logits("ABCDE")[0].softmax(-1).topk(3)
    assert [[token for token, _ in cell] for cell in table.candidates[-1]] == [
        [study.token(id) for id in row] for row in best.indices.tolist()
    ]
    assert table["1 post", "2 C"] == pytest.approx(float(best.values[2, 0]))
    lines = str(table).splitlines()
    assert lines[1].split() == ["A", "B", "C", "D", "E"]
    assert len(lines) == 2 + 5
    for shown, cell in zip(lines[-1].split()[2:], table.candidates[-1], strict=True):
        assert shown.rstrip("░▒▓█") == cell[0][0]
    told = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert told["candidates"][4][2][0] == {"token": table.candidates[4][2][0][0], "probability": table["1 post", "2 C"]}
    assert 'title="' in table._repr_html_()


def test_tokens_that_are_markup_are_shown_as_text() -> None:
    axes = (Axis("stream", ["0 post"]), Axis("token", ["0 <i>"]))
    page = Lens("a lens", np.ones((1, 1)), axes, candidates=[[[('<b title="', 1.0)]]])._repr_html_()
    assert "<b" not in page and "<i" not in page
    assert page.count("&lt;b title=&quot;") == 2 and "&lt;i&gt;" in page


def test_a_long_text_is_printed_in_blocks() -> None:
    lines = str(logit_lens(study_of("gpt2"), random_ids(1, 24), stat="rank")).splitlines()
    assert max(map(len, lines)) <= 100
    heads = " ".join(line for line in lines if line.startswith("   ")).split()
    assert heads == [str(id) for id in random_ids(1, 24)[0].tolist()]


# Lenses that translate.


@pytest.mark.parametrize("preset", PRESETS)
def test_translators_that_change_nothing_are_the_logit_lens(preset: str) -> None:
    study = study_of(preset)
    identity = {point.name: torch.eye(32) for point in points(study.config)[:-1]}
    lens = Translators("tuned", identity, {}, fingerprint(study.model))
    every = [("resid_pre", "resid_mid", "resid_post"), "resid_pre", "resid_mid"]
    for at in every:
        plain, read = logit_lens(study, IDS, at), tuned_lens(study, IDS, at, lens=lens)
        np.testing.assert_allclose(read.values, plain.values, rtol=1e-5)
    doubled = Translators("tuned", {name: 2 * eye for name, eye in identity.items()}, {}, "")
    assert torch.equal(doubled(Point(1, "resid_pre"), torch.ones(1, 1, 32)), torch.full((1, 1, 32), 2.0))
    assert torch.equal(doubled(Point(1, "resid_post"), torch.ones(1, 1, 32)), torch.ones(1, 1, 32))


def test_a_tuned_lens_learns_what_later_blocks_add_where_that_is_the_same_for_all_tokens() -> None:
    study = study_of("gpt2")
    with torch.no_grad():
        for block in study.model.trunk.blocks:  # each block adds its two biases and nothing else
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
    with hushed():
        lens = train_tuned_lens(study, TEXT, steps=80, tokens=48, learning_rate=0.04, save=False)
    quality = lens_quality(study, lens, text=random_ids(1, 200, seed=6)[0].tolist())
    for place in ("0 pre", "0 mid", "0 post", "1 mid"):
        assert quality[place, "logit kl"] > 0.05
        assert quality[place, "tuned kl"] < 0.05 * quality[place, "logit kl"]
    assert quality["1 post", "tuned kl"] == quality["1 post", "logit kl"] == 0
    *_, (_, logits) = lens_logits(study, IDS, points(study.config), lens)
    assert torch.equal(logits, study.logits(IDS))


@pytest.mark.parametrize("preset", PRESETS)
def test_training_a_lens_lowers_its_kl_on_other_text_and_leaves_the_model_alone(preset: str) -> None:
    study = study_of(preset)
    before = fingerprint(study.model)
    with hushed():
        lens = train_tuned_lens(study, TEXT, steps=25, tokens=96, learning_rate=0.01, save=False)
    assert fingerprint(study.model) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in study.model.parameters())
    quality = lens_quality(study, lens, text=random_ids(1, 200, seed=7)[0].tolist())
    assert (quality.values[:-1, 2] < quality.values[:-1, 0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tuned_lens_learns_in_any_precision_and_starts_as_the_logit_lens(dtype: torch.dtype) -> None:
    study = Study.of(random_model(tiny_config("gpt2")).to(dtype))
    with hushed():
        lens = train_tuned_lens(study, TEXT, steps=2, tokens=48, learning_rate=1e-30, save=False)
    assert np.array_equal(tuned_lens(study, IDS, lens=lens).values, logit_lens(study, IDS).values)
    with hushed():
        lens = train_tuned_lens(study, TEXT, steps=25, tokens=96, learning_rate=0.01, save=False)
    quality = lens_quality(study, lens, text=random_ids(1, 200, seed=7)[0].tolist())
    assert (quality.values[:-1, 2] < quality.values[:-1, 0]).all()


def test_two_lenses_of_a_kind_are_both_measured() -> None:
    study = study_of("gpt2")
    with hushed():
        short, long = (train_tuned_lens(study, TEXT, steps=n, tokens=48, save=False) for n in (1, 20))
    quality = lens_quality(study, short, long, text=TEXT[:48])
    kinds = ("logit", "tuned", "tuned 2")
    assert quality.axes[1].labels == [f"{kind} {measure}" for kind in kinds for measure in ("kl", "loss")]
    assert quality["0 pre", "tuned 2 kl"] == lens_quality(study, long, text=TEXT[:48])["0 pre", "tuned kl"]


def test_the_quality_of_the_last_place_is_the_models_own_loss() -> None:
    study = study_of("llama")
    ids = random_ids(1, 24, seed=8)
    quality = lens_quality(study, text=ids[0].tolist())
    assert quality["1 post", "logit loss"] == pytest.approx(study.loss(ids), rel=1e-5)
    table = logit_lens(study, ids, stat="loss").values
    np.testing.assert_allclose(quality.values[:, 1], table[:, :-1].mean(1), rtol=1e-4)
    assert quality.notes["tokens"] == 23


def test_stopping_the_training_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = in_a_run(tmp_path)
    plain, calls = tuned._learn, []

    def interrupted(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(tuned, "_learn", interrupted)
    with hushed():
        lens = train_tuned_lens(study, TEXT, steps=50, tokens=48)
    assert lens.notes["steps"] == 3
    saved = Translators.load(tmp_path / "run/tuned_lens.safetensors", study)
    assert all(torch.equal(saved.matrices[name], matrix) for name, matrix in lens.matrices.items())
    assert not torch.equal(saved.matrices["blocks.0.hook_resid_mid"], torch.eye(32))
    monkeypatch.setattr(tuned, "_learn", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), hushed():
        train_tuned_lens(study, TEXT, steps=50, tokens=48)


def test_a_saved_lens_reads_as_it_did_and_only_for_its_own_model(tmp_path: Path) -> None:
    study = in_a_run(tmp_path)
    with hushed():
        lens = train_tuned_lens(study, TEXT, steps=2, tokens=48)
        fit_jacobian_lens(study, TEXT, tokens=48)
    assert np.array_equal(tuned_lens(study, "ABC").values, tuned_lens(study, "ABC", lens=lens).values)
    assert jacobian_lens(study, "ABC").title == "jacobian lens"
    assert sorted(path.name for path in (tmp_path / "run").glob("*")) == [
        "checkpoints",
        "jacobian_lens.safetensors",
        "tuned_lens.safetensors",
    ]
    with pytest.raises(CheckpointError, match="weights other than"):
        tuned_lens(in_a_run(tmp_path, seed=1), "ABC")
    (tmp_path / "run/tuned_lens.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tuned_lens(study, "ABC")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_jacobian_is_that_of_the_plain_blocks(preset: str) -> None:
    study = study_of(preset)
    study.model.double()
    text = random_ids(1, 5, seed=3)
    with hushed():
        lens = fit_jacobian_lens(study, text[0].tolist(), tokens=5, save=False, centred=False)
    _, cache = study.run_with_cache(text)
    step = causal_step(5, text.device)

    def rest(x: torch.Tensor) -> torch.Tensor:  # (T, C) after block 0 -> (T, C) at the end, nothing written out
        return study.model.trunk.blocks[1](x[None], step)[0]

    whole = torch.autograd.functional.jacobian(rest, cache["resid_post", 0][0])  # (T', C, T, C)
    expected = whole.sum(0).mean(1)  # over later tokens; over the tokens that are changed
    torch.testing.assert_close(lens.matrices["blocks.0.hook_resid_post"], expected, rtol=1e-6, atol=1e-8)
    assert not lens.biases and list(lens.matrices) == [point.name for point in points(study.config)[:-1]]
    assert all(parameter.grad is None for parameter in study.model.parameters())


def test_a_centred_jacobian_lens_is_exact_where_the_rest_is_affine() -> None:
    study = study_of("gpt2")
    with torch.no_grad():
        for block in study.model.trunk.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
    with hushed():
        lens = fit_jacobian_lens(study, TEXT, tokens=96, save=False)
    np.testing.assert_allclose(jacobian_lens(study, IDS, stat="kl", lens=lens).values, 0, atol=1e-5)
    torch.testing.assert_close(lens.matrices["blocks.0.hook_resid_pre"], torch.eye(32))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_centred_jacobian_lens_reads_the_mean_stream_as_the_mean_of_the_last(preset: str) -> None:
    study = study_of(preset)
    text = random_ids(1, 24)  # one window, so that the means are over it
    with hushed():
        lens = fit_jacobian_lens(study, text[0].tolist(), tokens=24, save=False)
    _, cache = study.run_with_cache(text)
    for layer, kind in ((0, "resid_pre"), (0, "resid_post"), (1, "resid_mid")):
        read = lens(Point(layer, kind), cache[kind, layer].mean((0, 1))[None, None])[0, 0]
        torch.testing.assert_close(read, cache["resid_post", -1].mean((0, 1)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda study: logit_lens(study, IDS, stat="best"), ConfigError, "not one of top, probability"),
        (lambda study: logit_lens(study, IDS, "attn_out"), ConfigError, "expected some of resid_pre"),
        (lambda study: logit_lens(study, random_ids(2, 3)), DataError, "2 texts"),
        (lambda study: logit_lens(study, IDS, answer=70), DataError, "0 .. 60"),
        (lambda study: tuned_lens(study, IDS), ConfigError, "has no run folder"),
        (lambda study: train_tuned_lens(study, TEXT), ConfigError, "has no run folder"),
        (lambda study: train_tuned_lens(study, TEXT, steps=0, save=False), ConfigError, "steps: 0"),
        (lambda study: train_tuned_lens(study, save=False), ConfigError, "has no corpus"),
        (lambda study: fit_jacobian_lens(study, TEXT, tokens=0, save=False), ConfigError, "tokens: 0"),
    ],
)
def test_what_cannot_be_read_is_refused(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(study_of("llama"))


def test_a_run_without_a_lens_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no such file; fit the lens with minigpt lens .*run --kind jacobian --train"
    ):
        jacobian_lens(in_a_run(tmp_path), "ABC")
