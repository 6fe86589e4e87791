"""Sparse autoencoders and transcoders: sparsity, gradients, a planted dictionary, figures at both ends, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minigpt.checkpoint.tensors import save_tensors
from minigpt.errors import CheckpointError, ConfigError
from minigpt.internals.features import autoencoder_training
from minigpt.internals.features.autoencoder import Autoencoder, keep_greatest, keep_greatest_of_batch
from minigpt.internals.features.autoencoder_config import AutoencoderConfig
from minigpt.internals.features.autoencoder_training import Fires, JumpReLU, Learner
from minigpt.internals.study import Study
from minigpt.tokenizer.plain import CharTokenizer
from toys import PRESETS, random_ids, random_model, tiny_config

KINDS = ("topk", "batchtopk", "jumprelu")
TOKENIZER = CharTokenizer([chr(48 + i) for i in range(61)])
TEXT = random_ids(1, 500, seed=5)[0]


def study_of(preset: str) -> Study:
    return Study.of(random_model(tiny_config(preset)), TOKENIZER)


def identity(site: str, target: str, width: int) -> Autoencoder:
    """Features x and -x, of which the positive half fires: every vector is reconstructed exactly."""
    both = torch.cat((torch.eye(width), -torch.eye(width)))
    return Autoencoder(site, target, "topk", width, both.T.clone(), torch.zeros(2 * width), both, torch.zeros(width))


def test_topk_keeps_exactly_k_and_batchtopk_k_on_average() -> None:
    pre = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) + 3
    kept = keep_greatest(pre, 4)
    assert ((kept != 0).sum(1) == 4).all()
    assert torch.equal(kept.sort(1).values[:, -4:], pre.sort(1).values[:, -4:])
    together = keep_greatest_of_batch(pre, 4)
    assert int((together != 0).sum()) == 200
    assert len((together != 0).sum(1).unique()) > 1
    assert together[together > 0].min() > pre[together == 0].max()
    assert int((keep_greatest(pre - 9, 4) != 0).sum()) < 200  # a feature is never negative


def test_the_straight_through_gradients_are_those_of_the_paper() -> None:
    # z = 0.9, 1.02, 1.2 around a threshold of 1 with a kernel 0.1 wide: only 1.02 lies within half of it.
    pre = torch.tensor([[0.9], [1.02], [1.2]], requires_grad=True)
    threshold = torch.tensor([1.0], requires_grad=True)
    out = JumpReLU.apply(pre, threshold, 0.1)
    assert out.tolist() == [[0.0], [pytest.approx(1.02)], [pytest.approx(1.2)]]
    (out * torch.tensor([[2.0], [3.0], [5.0]])).sum().backward()
    assert pre.grad is not None and pre.grad.flatten().tolist() == [0.0, 3.0, 5.0]
    assert threshold.grad is not None and threshold.grad.item() == pytest.approx(-(1.0 / 0.1) * 3.0)
    pre.grad, threshold.grad = None, None
    fires = Fires.apply(pre, threshold, 0.1)
    assert fires.flatten().tolist() == [0.0, 1.0, 1.0]
    (fires * torch.tensor([[2.0], [3.0], [5.0]])).sum().backward()
    assert pre.grad is None and threshold.grad.item() == pytest.approx(-(1 / 0.1) * 3.0)


def test_the_estimate_of_the_thresholds_gradient_is_that_of_the_expected_count() -> None:
    # P(z > threshold) of a standard normal falls by its density there, 0.242 at 1.
    pre = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    threshold = torch.tensor([1.0], requires_grad=True)
    Fires.apply(pre, threshold, 0.1).mean().backward()
    assert threshold.grad is not None and threshold.grad.item() == pytest.approx(-0.24197, rel=0.05)


def planted(rows: int, dictionary: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sums of three directions of a dictionary, with weights from 1 to 2, around 0.5."""
    count = len(dictionary)
    on = torch.rand(rows, count, generator=generator).argsort(1) < 3
    return (on * (1 + torch.rand(rows, count, generator=generator))) @ dictionary + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_dictionary_is_found(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(40, 20, generator=generator), dim=1)
    config = AutoencoderConfig(kind=kind, k=3, d_sae=60, steps=300, batch=128, learning_rate=1e-2)  # type: ignore[arg-type]
    first = planted(2048, dictionary, generator)
    learner = Learner("a", "a", config, first, first)
    for _ in range(config.steps):
        x = planted(128, dictionary, generator)
        learner.step(x, x)
    made = learner.finish({})
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(60))
    best = (dictionary @ made.W_dec.T).max(1).values
    assert (best > 0.9).float().mean() > 0.9  # a random dictionary reaches 0.9 nowhere
    x = planted(2000, dictionary, generator)
    features = made.encode(x)
    count = (features > 0).sum(1).float()
    assert (count == 3).all() if kind == "topk" else 2.7 < count.mean() < 3.3
    missed = (made.decode(features) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert missed < 0.12


def test_folding_the_scales_changes_no_reconstruction() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = 30 * torch.randn(512, 8, generator=generator) + 5, torch.randn(512, 6, generator=generator) / 50
    learner = Learner("a", "b", AutoencoderConfig(kind="jumprelu", k=4, d_sae=16, steps=20), x, y)
    for _ in range(20):
        learner.step(x, y)
    made = learner.finish({})
    inside = learner.model.decode(learner.sparse(learner.model.before(x * learner.scales[0]))).detach()
    torch.testing.assert_close(made.decode(made.encode(x)), inside / learner.scales[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_perfect_autoencoder_loses_nothing_and_an_empty_one_everything(preset: str) -> None:
    study = study_of(preset)
    site = "blocks.0.hook_resid_post"
    figures, density = study.judge_autoencoder(identity(site, site, 32), text=TEXT)
    told = dict(zip(figures.axes[0].labels, figures.values, strict=True))
    assert told["explained variance"] == pytest.approx(1, abs=1e-6)
    assert told["loss recovered"] == pytest.approx(1, abs=1e-5)
    assert told["KL recovered"] == pytest.approx(1, abs=1e-5)
    assert told["features per token (L0)"] == pytest.approx(32)
    expected = sum(float(study.losses(part).sum()) for part in TEXT.split(24)) / (500 - 21)
    assert told["loss clean"] == pytest.approx(expected, rel=1e-5)
    assert float(density.values.sum()) == pytest.approx(32)
    empty = identity(site, site, 32)
    empty.threshold = torch.full((64,), 1e9)
    figures, _ = study.judge_autoencoder(empty, text=TEXT)
    told = dict(zip(figures.axes[0].labels, figures.values, strict=True))
    assert told["loss recovered"] == pytest.approx(0, abs=1e-6) and told["KL recovered"] == pytest.approx(0, abs=1e-6)
    assert told["dead features"] == 1 and told["features per token (L0)"] == 0


def test_as_an_edit_it_replaces_the_activation_or_only_what_is_changed() -> None:
    study, ids = study_of("llama"), random_ids(2, 9)
    site = "blocks.1.attn.hook_z"
    plain, exact = study.logits(ids), identity(site, site, 32)
    with study.hooks(exact.edits()):
        torch.testing.assert_close(study.logits(ids), plain, rtol=1e-4, atol=1e-5)

    def without_the_first(features: torch.Tensor) -> torch.Tensor:
        features[..., [0, 32]] = 0  # channel 0 of head 0, both its signs
        return features

    def by_hand(z: torch.Tensor, where: object) -> None:
        z[:, :, 0, 0] = 0

    with study.hooks(exact.edits(without_the_first)):
        edited = study.logits(ids)
    with study.hooks({site: by_hand}):
        torch.testing.assert_close(edited, study.logits(ids), rtol=1e-4, atol=1e-5)
    poor = identity(site, site, 32)
    poor.k = 2
    with study.hooks(poor.edits()):
        assert not torch.allclose(study.logits(ids), plain, atol=1e-3)
    with study.hooks(poor.edits(keep_error=True)):  # what it misses is put back, and nothing was changed
        torch.testing.assert_close(study.logits(ids), plain, rtol=1e-4, atol=1e-5)

    def only_what_was_changed(z: torch.Tensor, where: object) -> torch.Tensor:
        features = poor.features(z)
        return z + (poor.decode(without_the_first(features.clone())) - poor.decode(features)).view_as(z)

    with study.hooks(poor.edits(without_the_first, keep_error=True)):
        changed = study.logits(ids)
    with study.hooks({site: only_what_was_changed}):
        torch.testing.assert_close(changed, study.logits(ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)


def test_a_transcoder_reads_one_activation_and_replaces_another() -> None:
    study, ids = study_of("gpt2"), random_ids(2, 9)
    plain = study.logits(ids)
    copy = identity("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_in", 32)
    with study.hooks(copy.edits()), study.hooks({("mlp_in", 0): lambda x, site: x * 1}):
        torch.testing.assert_close(study.logits(ids), plain, rtol=1e-4, atol=1e-5)
    with study.hooks({("mlp_in", 0): 0.0}), study.hooks(copy.edits()):  # what stood there does not matter
        torch.testing.assert_close(study.logits(ids), plain, rtol=1e-4, atol=1e-5)
    backwards = identity("blocks.1.hook_resid_pre", "blocks.0.hook_mlp_in", 32)
    with study.hooks(backwards.edits()), pytest.raises(ConfigError, match="not computed before"):
        study.logits(ids)
    with pytest.raises(ConfigError, match="computed before"):
        study.train_autoencoder(("resid_post", 0), ("resid_pre", 0), text=TEXT)


def test_a_transcoder_learns_a_planted_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    reads = torch.nn.functional.normalize(torch.randn(6, 10, generator=generator), dim=1)
    writes = torch.nn.functional.normalize(torch.randn(6, 7, generator=generator), dim=1)

    def pairs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, 10, generator=generator)
        return x, (x @ reads.T - 0.8).relu() @ writes

    config = AutoencoderConfig(kind="topk", k=6, d_sae=24, steps=300, batch=128, learning_rate=2e-2)
    learner = Learner("a", "b", config, *pairs(2048))
    for _ in range(300):
        learner.step(*pairs(128))
    made = learner.finish({})
    x, y = pairs(2000)
    assert (made.decode(made.encode(x)) - y).square().sum() / (y - y.mean(0)).square().sum() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_model_learns_and_the_file_holds_all_of_it(kind: str, tmp_path: Path) -> None:
    study = study_of("modern")
    config = AutoencoderConfig(kind=kind, k=4, d_sae=64, steps=60, batch=96)  # type: ignore[arg-type]
    made = study.train_autoencoder(("resid_post", 0), config=config, text=TEXT)
    assert made.notes["steps"] == 60 and made.notes["missed"] < 0.9
    again = study.train_autoencoder(("resid_post", 0), config=config, text=TEXT)
    assert torch.equal(made.W_enc, again.W_enc)  # the seed decides
    back = Autoencoder.load(made.save(tmp_path / "a"))
    _, cache = study.run_with_cache(random_ids(2, 9), ("resid_post", 0))
    assert torch.equal(back.features(cache["resid_post", 0]), made.features(cache["resid_post", 0]))
    assert torch.equal(
        back.decode(back.features(cache["resid_post", 0])), made.decode(made.features(cache["resid_post", 0]))
    )
    assert (back.site, back.target, back.kind, back.k, back.notes) == (made.site, made.site, kind, 4, made.notes)
    config_file = json.loads((tmp_path / "a/cfg.json").read_text())
    assert config_file["architecture"] == ("topk" if kind == "topk" else "jumprelu")
    assert (config_file["d_in"], config_file["d_sae"], config_file["apply_b_dec_to_input"]) == (32, 64, True)
    assert config_file["metadata"]["hook_name"] == "blocks.0.hook_resid_post"


def test_stopping_keeps_what_is_learned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def step(self: Learner, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        if self.done == 5:
            raise KeyboardInterrupt
        return whole(self, x, y)

    whole = Learner.step
    monkeypatch.setattr(autoencoder_training.Learner, "step", step)
    config = AutoencoderConfig(kind="batchtopk", k=4, d_sae=64, steps=60, batch=96)
    made = study_of("gpt2").train_autoencoder(("mlp_out", 1), config=config, text=TEXT)
    assert made.notes["steps"] == 5 and made.threshold is not None and made.threshold[0] > 0
    assert "stopped at step 5 of 60" in capsys.readouterr().err


def test_features_show_their_contexts_and_what_they_say() -> None:
    study = study_of("gpt2")
    site = "blocks.1.hook_resid_post"
    made = identity(site, site, 32)
    found = study.feature_contexts(made, 3, text=TEXT)
    whole = torch.cat([study.run_with_cache(part, site)[1][site][0] for part in TEXT.split(24)])
    torch.testing.assert_close(torch.from_numpy(found.values[32 + 7]), (-whole[:, 7]).topk(3).values)
    assert found.axes[0].name == "feature" and found.show(39).count("\n") == 3
    said = study.feature_effect(made, 39).values
    one = torch.zeros(32)
    one[7] = -1
    norm = study.model.trunk.norm
    expected = ((one - one.mean()) * norm.weight) @ study.model.unembed.weight.T
    torch.testing.assert_close(torch.from_numpy(said).float(), expected.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="not part of the residual stream"):
        study.feature_effect(identity("blocks.1.attn.hook_z", "blocks.1.attn.hook_z", 32), 0)


def test_numbers_and_files_that_make_no_autoencoder_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"kind": "relu"}, "not one of topk"),
        ({"k": 0}, "k: 0 is not a whole number"),
        ({"k": 9, "d_sae": 8}, "more than the number of features"),
        ({"learning_rate": -1.0}, "not a positive number"),
    ):
        with pytest.raises(ConfigError, match=message):
            AutoencoderConfig(**settings)  # type: ignore[arg-type]
    site = "blocks.1.hook_resid_post"
    with (
        study_of("gpt2").hooks(identity(site, site, 31).edits()) as study,
        pytest.raises(ConfigError, match="expects width 31"),
    ):
        study.logits([1, 2])
    folder = identity(site, site, 32).save(tmp_path / "a")
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    good, told = json.loads(config.read_text()), config.read_text()
    for change, message in (
        ({"architecture": "gated"}, "architecture is 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"metadata": {}}, "activation .metadata.hook_name. missing"),
        ({"k": -1}, "k is -1"),
        ({"architecture": "jumprelu"}, "expected W_enc, b_enc, W_dec, b_dec, threshold"),
    ):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            Autoencoder.load(folder)
    config.write_text(told)
    tensors = {"W_enc": torch.zeros(3, 5), "b_enc": torch.zeros(4), "W_dec": torch.zeros(5, 3), "b_dec": torch.zeros(3)}
    save_tensors(weights, tensors)
    with pytest.raises(CheckpointError, match=r"b_enc has shape \(4,\), expected \(5,\)"):
        Autoencoder.load(folder)
    weights.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Autoencoder.load(folder)
    with pytest.raises(CheckpointError, match=r"contains no cfg\.json"):
        Autoencoder.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_reads_the_same_features_from_our_files(kind: str, tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError)
    config = AutoencoderConfig(kind=kind, k=4, d_sae=64, steps=20, batch=96)  # type: ignore[arg-type]
    made = study_of("gpt2").train_autoencoder(("resid_post", 0), config=config, text=TEXT)
    theirs, x = saelens.SAE.load_from_disk(made.save(tmp_path)), torch.randn(50, 32)
    torch.testing.assert_close(theirs.encode(x).detach(), made.encode(x))
    torch.testing.assert_close(theirs(x).detach(), made.decode(made.encode(x)))
