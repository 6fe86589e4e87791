"""Norms, positions and activations in pairs, those of plug-ins too: a model has one meaning everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt.checkpoint.saving import save_checkpoint, state_of
from minigpt.checkpoint.weights import to_huggingface
from minigpt.errors import CheckpointError, ConfigError
from minigpt.internals.access.names import activations
from minigpt.internals.study import Study
from minigpt.model.attention import Attention
from minigpt.model.config import ACTIVATIONS, NORMS, POSITIONS, GPTConfig
from minigpt.model.cost import activations_of, cost_of
from minigpt.model.explicit import explicit_forward
from minigpt.model.fast import fast
from minigpt.model.gpt import GPT
from minigpt.model.layers import MLP
from minigpt.sampling.run import load
from minigpt.tokenizer.plain import ByteTokenizer
from minigpt.training.recipe.loss import plain_loss
from plugged import forgetting, plugged
from toys import random_ids, random_model, tiny_config, transformers_twin

NORM_NAMES = [*NORMS, "dyt"]
POSITION_NAMES = [*POSITIONS, "linear_bias"]
ACTIVATION_NAMES = [*ACTIVATIONS, "leaky_relu2"]
# Every pair of two choices is in one of these: all positions with all activations, and the norms in turn.
PAIRS = [
    (NORM_NAMES[(p + a) % len(NORM_NAMES)], position, activation)
    for p, position in enumerate(POSITION_NAMES)
    for a, activation in enumerate(ACTIVATION_NAMES)
]


@pytest.fixture(scope="module", autouse=True)
def _plugged() -> Iterator[None]:
    with plugged("dyt", "linear_bias", "leaky_relu2"):
        yield


def of_parts(norm: str, position: str, activation: str, **changes: object) -> GPTConfig:
    """A toy config with these parts; layernorm has biases, as in GPT-2."""
    preset = "gpt2" if norm == "layernorm" else "modern"
    return tiny_config(preset, norm=norm, position=position, activation=activation, **changes)


def test_the_pairs_are_all_there() -> None:
    assert {(n, p) for n, p, _ in PAIRS} == {(n, p) for n in NORM_NAMES for p in POSITION_NAMES}
    assert {(n, a) for n, _, a in PAIRS} == {(n, a) for n in NORM_NAMES for a in ACTIVATION_NAMES}


@pytest.mark.parametrize("parts", PAIRS, ids="-".join)
def test_a_model_computes_the_same_in_every_way(parts: tuple[str, str, str], tmp_path: Path) -> None:
    model, ids = random_model(of_parts(*parts)), random_ids(2, 20)
    fired: list[str] = []

    def tap(name: str, activation: Tensor) -> Tensor:
        fired.append(name)
        return activation

    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(explicit_forward(model, ids, tap=tap), expected)
        listed = {name: each for name, each in activations(model.config).items() if not each.on_request}
        assert set(fired) == set(listed)

        cache = model.new_cache(2, 20)  # in steps
        steps = [model.all_logits(part, cache) for part in ids.split([7, 1, 12], dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), expected)

        quick = fast(model)  # rows of unequal length, one token after the other
        cache = quick.new_cache(2, 20)
        counts = torch.tensor([5, 9])
        found = [quick.next_logits(ids[:, :9], cache, counts)]
        for step in range(3):
            found.append(quick.next_logits(torch.stack([ids[0, 5 + step], ids[1, 9 + step]])[:, None], cache))
        for row, count in enumerate(counts.tolist()):
            for step, logits in enumerate(found):
                torch.testing.assert_close(logits[row], expected[row, count - 1 + step], rtol=1e-4, atol=1e-4)

    save_checkpoint(tmp_path / "step-00000001", model, ByteTokenizer())
    torch.testing.assert_close(load(tmp_path / "step-00000001").model(ids), expected)
    if to_huggingface(model.config, state_of(model)) is not None:
        torch.testing.assert_close(transformers_twin(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", PAIRS, ids="-".join)
def test_what_is_counted_is_what_is_there(parts: tuple[str, str, str]) -> None:
    config = of_parts(*parts, n_embd=64, vocab_size=400, bigram_rows=0, trigram_rows=0)
    model = GPT(config).train()
    assert cost_of(config).parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = random_ids(8, config.block_size, 400)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plain_loss(model, ids, ids)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / ids.numel()
    counted = activations_of(config, on_gpu=False)
    assert counted.bytes(config.n_layer, 1) + counted.logits == pytest.approx(found, rel=0.2)


@pytest.mark.parametrize("parts", PAIRS, ids="-".join)
def test_attribution_sums_to_the_logit_or_is_refused(parts: tuple[str, str, str]) -> None:
    study = Study.of(random_model(of_parts(*parts, vocab_size=257)), ByteTokenizer())
    if getattr(NORMS[parts[0]], "divides", False):
        notes = study.attribute_logit("the cat sat", "m").notes
        assert abs(notes["remainder"]) < 1e-4 * max(1, abs(notes["logit"]))
        study.copying_from_weights()
    else:
        for view in (lambda: study.attribute_logit("the cat", "m"), lambda: study.neuron_effect(0, 1)):
            with pytest.raises(ConfigError, match="does not exist for norm 'dyt'"):
                view()
        with pytest.raises(ConfigError, match="does not exist for norm 'dyt'"):
            study.ov_circuit(0, 0)
        page = study.report("the cat sat").data
        assert page["dla"] is None and "logit attribution" in page["missing"] and page["lens"]["kinds"]
        assert set(study.heads().scores) == {"previous", "duplicate", "induction", "current", "first", "offset"}


@pytest.mark.parametrize("parts", PAIRS, ids="-".join)
def test_a_model_of_any_parts_learns(parts: tuple[str, str, str]) -> None:
    torch.manual_seed(0)
    model, ids = GPT(of_parts(*parts)).train(), random_ids(4, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(8):
        loss = plain_loss(model, ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < found[0] - 0.05


@pytest.mark.parametrize(
    ("field", "names"),
    [("norm", NORM_NAMES), ("position", POSITION_NAMES), ("activation", ACTIVATION_NAMES)],
)
def test_no_choice_is_silently_another(field: str, names: list[str]) -> None:
    ids, computed = random_ids(1, 20), {}
    for name in names:
        model = random_model(tiny_config("modern", **{field: name}))
        computed[name] = model(ids)
    for name, logits in computed.items():
        assert all(not torch.allclose(logits, other) for n, other in computed.items() if n != name)


def test_start_values_and_settings_of_a_part_are_its_own() -> None:
    model = GPT(tiny_config("modern", norm="dyt", position="linear_bias", settings={"norm.alpha": 0.25}))
    assert model.trunk.norm.alpha.item() == 0.25  # type: ignore[operator, union-attr]
    assert model.trunk.blocks[0].attn.position.slopes.tolist() == pytest.approx([0.1] * 4)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "dty"}, "model.norm: 'dty' is not one of layernorm, rmsnorm, dyt; did you mean 'dyt'?"),
        ({"norm": "dyt", "settings": {"norm.alhpa": 1.0}}, "model.norm.alhpa: no such setting; did you mean alpha?"),
        ({"norm": "dyt", "settings": {"norm.alpha": "x"}}, "model.norm.alpha: 'x' is not a number"),
        ({"norm": "rmsnorm", "settings": {"norm.alpha": 1.0}}, "norm 'rmsnorm' has no settings"),
        ({"settings": {"alpha": 1.0}}, "model.settings: 'alpha' is not of the form norm.NAME"),
    ],
)
def test_a_mistake_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config("modern", **changes)
    assert message in str(caught.value)


class Leaky(MLP):
    """A subclass that nobody registered."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.leaky_relu(self.up(x)))


class Same(Attention):
    """A subclass that computes what its parent does."""


def test_a_subclass_is_studied_only_where_the_explicit_pass_agrees() -> None:
    model, ids = random_model(tiny_config("modern")), random_ids(1, 12)
    model.trunk.blocks[0].attn.__class__ = Same
    torch.testing.assert_close(Study.of(model).logits(ids), model(ids))
    model.trunk.blocks[1].mlp.__class__ = Leaky
    with pytest.raises(ConfigError, match=r"modules of other classes \(trunk\.blocks\.0\.attn: .*Same, .*mlp: .*Leaky"):
        Study.of(model)


def test_a_fast_copy_of_a_subclass_is_the_subclass() -> None:
    class Half(GPT):
        def next_logits(self, *arguments: object) -> Tensor:
            return super().next_logits(*arguments) / 2  # type: ignore[arg-type]

    model = random_model(tiny_config("modern"))
    ids = random_ids(1, 12)
    expected = model.next_logits(ids, model.new_cache(1, 12)) / 2
    model.__class__ = Half
    torch.testing.assert_close(fast(model).next_logits(ids, model.new_cache(1, 12)), expected)


def test_a_buffer_that_would_be_lost_is_refused() -> None:
    class Counting(torch.nn.Module):
        def __init__(self, width: int, config: GPTConfig) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x

    with forgetting():
        NORMS.add("counting", Counting, "", __name__, {})
        with pytest.raises(ConfigError, match="buffer seen would not be saved; register it with persistent=False"):
            GPT(tiny_config("modern", norm="counting"))


def test_buffers_of_a_part_are_made_again_on_loading(tmp_path: Path) -> None:
    class Waves(torch.nn.Module):
        """Fixed position embeddings, in a buffer that is not saved."""

        def __init__(self, config: GPTConfig) -> None:
            super().__init__()
            table = torch.arange(config.block_size)[:, None] * torch.linspace(0.1, 1, config.n_embd)
            self.register_buffer("table", table.sin(), persistent=False)

        def embed(self, positions: Tensor) -> Tensor:
            return self.table[positions]  # type: ignore[index, return-value]

    with forgetting():
        POSITIONS.add("waves", Waves, "", __name__, {})
        model, ids = random_model(tiny_config("modern", position="waves")), random_ids(1, 12)
        save_checkpoint(tmp_path / "step-00000001", model, ByteTokenizer())
        torch.testing.assert_close(load(tmp_path / "step-00000001").model(ids), model(ids))


def test_positions_may_act_in_some_layers_only() -> None:
    """Rope in every second layer (NoPE in the others): other activations, other logits, all paths alike."""
    from minigpt.model.positions import Rotary

    class Sometimes(Rotary):
        @staticmethod
        def layers(layer: int) -> bool:
            return layer % 2 == 1

    with forgetting():
        POSITIONS.add("sometimes", Sometimes, "", __name__, {})
        config = tiny_config("modern", n_layer=4, position="sometimes")
        model, ids = random_model(config), random_ids(2, 20)
        torch.testing.assert_close(explicit_forward(model, ids), model(ids))
        names = activations(config)
        assert [f"blocks.{layer}.attn.hook_rot_q" in names for layer in range(4)] == [False, True, False, True]
        assert cost_of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_stored_logits_find_an_edited_model(tmp_path: Path) -> None:
    model = random_model(tiny_config("modern"))
    folder = save_checkpoint(tmp_path / "step-00000001", model, ByteTokenizer())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        load(folder, dtype=dtype)
    (folder / "manifest.json").unlink()  # else the altered file is found first
    stored = json.loads((folder / "config.json").read_text())
    stored["minigpt"]["rope_theta"] *= 1.5
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="this is not the model that was saved: its logits differ by up to"):
        load(folder)
    (folder / "logits.json").unlink()  # as in a checkpoint of an older version
    load(folder)
