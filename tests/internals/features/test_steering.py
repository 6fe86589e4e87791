"""Steering vectors: made from texts, kept in a file, added while the model runs and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigpt.checkpoint.saving import save_checkpoint
from minigpt.checkpoint.tensors import save_tensors
from minigpt.cli.main import main
from minigpt.errors import ConfigError, DataError
from minigpt.internals.features.steering import Steered, Steering
from minigpt.internals.study import Study
from minigpt.sampling.sampler import Sampler
from minigpt.tokenizer.plain import CharTokenizer
from toys import PRESETS, random_model, tiny_config

TOKENIZER = CharTokenizer([chr(48 + i) for i in range(61)])
GOOD, BAD = ["AAB", "ABAB", "BB"], ["CCD", "DD", "CDCD"]


def study_of(preset: str) -> Study:
    return Study.of(random_model(tiny_config(preset)), TOKENIZER)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_mean_vector_is_the_difference_of_the_means_of_the_last_tokens(preset: str) -> None:
    study = study_of(preset)
    made = study.steering_vector(GOOD, BAD, ("resid_post", 0))
    assert made.name == "blocks.0.hook_resid_post"

    def mean(texts: list[str]) -> torch.Tensor:
        return torch.stack([study.run_with_cache(t)[1]["resid_post", 0][0, -1] for t in texts]).mean(0)

    torch.testing.assert_close(made.vector, mean(GOOD) - mean(BAD), rtol=1e-5, atol=1e-5)
    whole = study.steering_vector(["AB"], ["CD"], ("z", 1), position=None)
    _, cache = study.run_with_cache(["AB", "CD"], ("z", 1))
    torch.testing.assert_close(whole.vector, cache["z", 1][0].mean(0) - cache["z", 1][1].mean(0), rtol=1e-5, atol=1e-5)


def test_the_principal_direction_is_the_one_the_pairs_share(monkeypatch: pytest.MonkeyPatch) -> None:
    # Differences 3 u + small noise across it: the direction is u, as long as the mean difference is along it.
    u = torch.zeros(32)
    u[5] = 1.0
    noise = 0.01 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    noise[:, 5] = 0
    rows = {"good": 3 * u + noise, "bad": torch.zeros(20, 32)}
    monkeypatch.setattr(
        "minigpt.internals.features.steering.gather", lambda study, texts, names, position: {names[0]: rows[texts]}
    )
    made = study_of("gpt2").steering_vector("good", "bad", ("resid_pre", 1), method="pca")  # type: ignore[arg-type]
    torch.testing.assert_close(made.vector, 3 * u, rtol=1e-2, atol=1e-2)
    assert made.notes["share"] > 0.99
    rows["good"][0] *= -0.5  # a pair against the grain turns the singular vector, not the direction
    made = study_of("gpt2").steering_vector("good", "bad", ("resid_pre", 1), method="pca")  # type: ignore[arg-type]
    torch.testing.assert_close(made.vector, 3 * u * 18.5 / 20, rtol=1e-2, atol=1e-2)
    turned = study_of("gpt2").steering_vector("bad", "good", ("resid_pre", 1), method="pca")  # type: ignore[arg-type]
    torch.testing.assert_close(turned.vector, -made.vector)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_steered_model_writes_what_a_study_with_the_edit_writes(preset: str, tmp_path: Path) -> None:
    study = study_of(preset)
    made = study.steering_vector(GOOD, BAD, ("resid_post", 0))
    loaded = Steering.load(made.save(tmp_path / "v.safetensors"))
    assert (loaded.name, loaded.scale, loaded.notes) == (made.name, made.scale, made.notes)
    assert torch.equal(loaded.vector, made.vector)
    [[written]] = Sampler(Steered(study, loaded.edits(3.0)), TOKENIZER).generate("AB", max_new_tokens=9, seed=1)

    def by_hand(x: torch.Tensor, site: object) -> torch.Tensor:
        return x + 3.0 * made.vector

    with study.hooks({("resid_post", 0): by_hand}):
        expected, _ = study.generate("AB", max_new_tokens=9, seed=1)
    assert written.ids == expected.ids
    torch.testing.assert_close(torch.tensor(written.log_probs), torch.tensor(expected.log_probs))
    plain, _ = study.generate("AB", max_new_tokens=9, seed=1)
    assert plain.log_probs != pytest.approx(written.log_probs, abs=1e-3)


def test_a_planted_direction_makes_the_sample_verb_write_its_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(tiny_config("modern"))
    run = save_checkpoint(tmp_path / "run", model, TOKENIZER)
    towards = Steering("blocks.1.hook_resid_post", model.unembed.weight[20].detach().clone(), scale=50.0)
    file = str(towards.save(tmp_path / "d.safetensors"))
    greedy = ["sample", str(run), "--prompt", "AB", "--max_new_tokens", "4", "--temperature", "0"]
    assert main([*greedy, "--steer", file]) == 0
    assert capsys.readouterr().out == "AB" + 4 * chr(48 + 20) + "\n"
    assert main([*greedy, "--steer", file, "--steer_scale", "0"]) == 0
    unmoved = capsys.readouterr().out
    assert main(greedy) == 0
    assert capsys.readouterr().out == unmoved != "AB" + 4 * chr(48 + 20) + "\n"


def test_a_file_or_a_flag_that_does_not_fit_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(save_checkpoint(tmp_path / "run", random_model(tiny_config("gpt2")), TOKENIZER))
    save_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(3)})
    save_tensors(
        tmp_path / "nan.safetensors",
        {"vector": torch.full((32,), torch.nan)},
        {"kind": "minigpt steering vector", "name": "blocks.0.hook_resid_post"},
    )
    (tmp_path / "torn.safetensors").write_bytes(b"abc")
    Steering("blocks.0.hook_resid_post", torch.zeros(31)).save(tmp_path / "narrow.safetensors")
    Steering("blocks.7.hook_resid_post", torch.zeros(32)).save(tmp_path / "deep.safetensors")
    for name, code, told in (
        ("missing", 5, "no such file"),
        ("other", 5, "not a steering vector"),
        ("nan", 5, "non-finite values"),
        ("torn", 5, "cannot be read"),
        ("narrow", 2, "has shape (31,), but blocks.0.hook_resid_post of this model has (32,)"),
        ("deep", 2, "no such activation"),
    ):
        assert main(["sample", run, "--prompt", "AB", "--steer", str(tmp_path / f"{name}.safetensors")]) == code
        captured = capsys.readouterr()
        assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert main(["sample", run, "--steer_scale", "2"]) == 2
    assert "is for --steer" in capsys.readouterr().err


def test_texts_and_places_that_make_no_vector_are_refused() -> None:
    study = study_of("llama")
    for arguments, error, message in (
        ((GOOD, BAD, "resid_post"), ConfigError, "matches 2 activations"),
        ((GOOD, BAD, ("pattern", 0)), ConfigError, "expected one whose axes start with batch, pos"),
        (([], BAD, ("resid_post", 0)), DataError, "at least one text"),
        (("AAB", BAD, ("resid_post", 0)), DataError, "at least one text"),
    ):
        with pytest.raises(error, match=message):
            study.steering_vector(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected pairs"):
        study.steering_vector(GOOD, BAD[:1], ("resid_post", 0), method="pca")
