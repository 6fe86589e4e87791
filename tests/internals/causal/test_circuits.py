"""Connections cut and kept: both ends, the linear estimate, and circuits that were planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.causal.circuits import Connection, Wiring
from minigpt.internals.causal.effect import as_metric, logit_difference
from minigpt.internals.study import Study
from toys import PRESETS, random_ids, random_model, tiny_config


def wiring_of(preset: str) -> tuple[Study, Wiring, torch.Tensor, torch.Tensor]:
    study, clean, corrupted = Study.of(random_model(tiny_config(preset))), random_ids(2, 7), random_ids(2, 7, seed=1)
    metric = logit_difference(3, 8)
    return study, Wiring(study, clean, corrupted, metric.bind(study, clean)), clean, corrupted


def difference(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 8]).mean()


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_cut_is_the_clean_text_and_everything_cut_the_corrupted_one(preset: str) -> None:
    study, wiring, clean, corrupted = wiring_of(preset)
    assert wiring.run(()) == pytest.approx(float(difference(study.logits(clean))), rel=1e-4, abs=1e-4)
    assert wiring.run(wiring.all()) == pytest.approx(float(difference(study.logits(corrupted))), rel=1e-3, abs=1e-3)
    groups = study.config.n_kv_head
    assert groups is not None
    per_layer = [(4 + 2 * groups) * (1 + 5 * layer) + (1 + 5 * layer + 4) for layer in range(2)]
    assert len(wiring.all()) == len(set(wiring.all())) == sum(per_layer) + 11


@pytest.mark.parametrize("preset", PRESETS)
def test_heads_of_which_all_that_they_read_is_cut_write_as_on_the_corrupted_text(preset: str) -> None:
    study, wiring, clean, corrupted = wiring_of(preset)
    two = {"L1H2", "L1H3"}  # of grouped heads, those that share keys and values
    mine = {receiver for receiver, parts in wiring.parts.items() if two & set(parts)}
    assert len(mine) == (6 if preset == "gpt2" else 4)
    _, other = study.run_with_cache(corrupted, ("result", 1))

    def swapped(result: torch.Tensor, site: object) -> None:
        result[:, :, 2:4] = other["result", 1][:, :, 2:4]

    with study.hooks({("result", 1): swapped}):
        expected = float(difference(study.logits(clean)))
    assert wiring.run([c for c in wiring.all() if c.receiver in mine]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_estimate_is_the_slope_of_cutting_a_little(preset: str) -> None:
    study = Study.of(random_model(tiny_config(preset)).double())
    clean, corrupted = random_ids(2, 7), random_ids(2, 7, seed=1)
    wiring = Wiring(study, clean, corrupted, as_metric(difference).bind(study, clean))
    estimates = wiring.estimates()
    assert set(estimates) == set(wiring.all())
    whole, some = wiring.run(()), wiring.all()[:: len(wiring.all()) // 12]
    for connection in some:
        slope = (wiring.run({connection: 1e-6}) - whole) / 1e-6
        assert slope == pytest.approx(estimates[connection], rel=1e-3, abs=1e-5), connection


def planted(preset: str) -> Study:
    """Attention everywhere alike; only L0H1 and L1H2 write anything. Channels: 0-7 the token, 8-15 what L0H1 says of
    it, 16-23 what L1H2 makes of that; only the last are read by the unembedding.
    """
    model = random_model(
        tiny_config(preset, bigram_rows=0, trigram_rows=0, logit_softcap=0.0, tie_embeddings=False, n_kv_head=4)
    )
    trunk = model.trunk
    with torch.no_grad():
        trunk.embed.weight[:, 8:] = 0
        if trunk.position is not None:
            trunk.position.weight.zero_()
        for block in trunk.blocks:
            for parameter in (*block.attn.parameters(), *block.mlp.parameters()):  # type: ignore[union-attr]
                parameter.zero_()
        for norm in (trunk.norm, *(n for block in trunk.blocks for n in (block.norm1, block.norm2))):  # type: ignore[union-attr]
            for name, parameter in norm.named_parameters():
                parameter.fill_(1.0 if name == "weight" else 0.0)
        eye = torch.eye(8)
        for layer, head, reads in ((0, 1, 0), (1, 2, 8)):
            attn = trunk.blocks[layer].attn
            attn.qkv.weight[(2 * 4 + head) * 8 : (2 * 4 + head + 1) * 8, reads : reads + 8] = eye  # type: ignore[union-attr, index, operator]
            attn.proj.weight[reads + 8 : reads + 16, head * 8 : head * 8 + 8] = 3 * eye  # type: ignore[union-attr, index, operator]
        model.unembed.weight[:, :16] = 0
        model.unembed.weight[:, 24:] = 0
    return Study.of(model)


CHAIN = {Connection("input", "L0H1.v"), Connection("L0H1", "L1H2.v"), Connection("L1H2", "output")}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_planted_chain_is_the_circuit_that_is_found(preset: str, tmp_path: Path) -> None:
    study = planted(preset)
    clean, corrupted = random_ids(1, 6), random_ids(1, 6)
    corrupted[0, 1] = (clean[0, 1] + 17) % 61  # another token, not at the end
    found = study.find_circuit(clean, corrupted, logit_difference(3, 8), faithfulness=0.9, worth=0.1)
    assert set(found.connections) == CHAIN
    assert found.faithfulness >= 0.9 and abs(found.completeness) < 0.1 and found.minimality > 0.9
    assert found.clean == pytest.approx(float(difference(study.logits(clean))), rel=1e-4)
    stored = json.loads(found.save(tmp_path / "circuit.json").read_text())
    assert {(edge["from"], edge["to"]) for edge in stored["edges"]} == CHAIN
    assert stored["nodes"] == ["L0H1", "L0H1.v", "L1H2", "L1H2.v", "input", "output"]
    assert "3 of " in str(found) and "L0H1     -> L1H2.v" in str(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_circuit_of_any_model_is_as_faithful_as_was_asked(preset: str) -> None:
    study = Study.of(random_model(tiny_config(preset)))
    found = study.find_circuit(random_ids(1, 5), random_ids(1, 5, seed=1), difference, faithfulness=0.8, worth=0.02)
    assert abs(1 - found.faithfulness) <= 0.2 and len(found.connections) < found.total
    wiring = Wiring(
        study, random_ids(1, 5), random_ids(1, 5, seed=1), as_metric(difference).bind(study, random_ids(1, 5))
    )
    left = wiring.run(set(wiring.all()) - set(found.connections))
    assert (left - found.corrupted) / (found.clean - found.corrupted) == pytest.approx(found.faithfulness, abs=1e-4)


def test_texts_and_shares_without_a_circuit_are_refused() -> None:
    study, ids = Study.of(random_model(tiny_config("gpt2"))), random_ids(1, 5)
    for arguments, options, error, message in (
        ((ids, random_ids(1, 4), difference), {}, DataError, "expected equal shapes"),
        ((ids, ids, difference), {}, DataError, "on both texts"),
        ((ids, ids + 1, difference), {"faithfulness": 0.0}, ConfigError, "expected numbers from 0 to 1"),
        ((ids, ids, "loss"), {}, ConfigError, "metric"),
    ):
        with pytest.raises(error, match=message):
            study.find_circuit(*arguments, **options)  # type: ignore[arg-type]
    with study.hooks({"embed": 0.0}), pytest.raises(ConfigError, match="inside"):
        study.find_circuit(ids, ids, difference)
