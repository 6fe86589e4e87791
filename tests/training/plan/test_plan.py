"""What a plan says, against real modules: parameters, operations, kept tensors, moments; and its verdicts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.cli.main import main
from minigpt.data.prepare import prepare
from minigpt.errors import ConfigError
from minigpt.model.config import PRESETS
from minigpt.model.cost import activations_of, cost_of
from minigpt.model.explicit import explicit_forward
from minigpt.model.gpt import GPT
from minigpt.training.config import OptimizerConfig
from minigpt.training.plan import plan as plan_module
from minigpt.training.plan.hardware import ACCELERATORS
from minigpt.training.plan.plan import make_plan, measured_step, memory_of, show
from minigpt.training.recipe.loss import plain_loss
from minigpt.training.recipe.optimizer import make_optimizer, optimizer_bytes
from toys import random_ids, tiny_config
from training_runs import tiny_run

ROOT = Path(__file__).parents[3]
VARIANTS = [
    *((preset, {}) for preset in PRESETS),
    ("llama", {"n_kv_head": 1, "tie_embeddings": True, "bias": True}),
    ("gpt2", {"bias": False, "tie_embeddings": False}),
    ("modern", {"norm_weight": True, "tie_embeddings": True}),
]


@pytest.mark.parametrize(("preset", "changes"), VARIANTS)
def test_parameters_by_part_are_those_of_the_modules(preset: str, changes: dict) -> None:
    config = tiny_config(preset, **changes)
    with torch.device("meta"):
        model = GPT(config)
    parts = {"embeddings": 0, "blocks": 0, "unembedding": 0}
    matrices = 0
    for name, parameter in model.named_parameters():
        in_blocks = name.startswith(("trunk.blocks", "trunk.norm"))
        part = "unembedding" if name.startswith("unembed") else "blocks" if in_blocks else "embeddings"
        parts[part] += parameter.numel()
        matrices += parameter.numel() if "blocks" in name and parameter.dim() == 2 else 0
    cost = cost_of(config)
    assert parts == {
        "embeddings": cost.embedding_parameters,
        "blocks": cost.block_parameters,
        "unembedding": cost.unembedding_parameters,
    }
    assert (cost.parameters, cost.matrix_parameters) == (sum(parts.values()), matrices)


@pytest.mark.parametrize(("preset", "changes"), VARIANTS)
def test_a_training_step_has_the_flops_that_torch_counts(preset: str, changes: dict) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(preset, **changes)
    model = GPT(config)
    ids = random_ids(1, config.block_size)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(explicit_forward(model, ids).flatten(0, 1), ids.flatten()).backward()
    # The explicit attention computes the whole square of scores, of which a causal one needs (T + 1) / 2T.
    square = 4 * config.n_layer * config.n_head * config.head_dim * config.block_size
    causal = square * (config.block_size + 1) / (2 * config.block_size)
    counted = counter.get_total_flops() / config.block_size
    assert cost_of(config).training_flops == pytest.approx(counted - 3 * (square - causal))


def kept_bytes(model: GPT, ids: Tensor, half: bool) -> int:
    """Bytes of distinct tensors that autograd keeps for a backward pass, but for the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that its address is not given to another
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        plain_loss(model, ids, ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_activations_are_what_autograd_keeps(preset: str, half: bool) -> None:
    """Within 15 %, for each layer and for what is at the ends."""
    torch.manual_seed(0)
    found = {}
    for layers in (2, 4):
        config = tiny_config(preset, n_layer=layers, n_embd=64, vocab_size=400)
        ids = random_ids(8, config.block_size, 400)
        found[layers] = kept_bytes(GPT(config).train(), ids, half) / ids.numel()
    counted = activations_of(config, half, on_gpu=False)
    weights = 2 * cost_of(config).matrix_parameters / ids.numel() if half else 0  # autocast's copies, for 4 layers
    a_layer = (found[4] - found[2] - weights / 2) / 2
    assert counted.block == pytest.approx(a_layer, rel=0.15)
    assert counted.bytes(4, 1) + counted.logits == pytest.approx(found[4] - weights, rel=0.15)
    assert counted.bytes(4, 10, checkpointing=True) == 10 * (4 * 4 * 64 + counted.block + counted.ends)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_optimizer_remembers_as_many_bytes_as_counted(preset: str, name: str) -> None:
    config = tiny_config(preset)
    model = GPT(config)
    optimizer = make_optimizer(model, OptimizerConfig(name=name))  # type: ignore[arg-type]
    ids = random_ids(2, config.block_size)
    plain_loss(model, ids, ids).backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if t.dim()]  # but for the step counters
    assert optimizer_bytes(config, OptimizerConfig(name=name)) == sum(t.nbytes for t in tensors)


def test_fsdp_shares_what_ddp_copies(tmp_path: Path) -> None:
    changes = {"trainer__devices": 4, "optimizer__ema_decay": 0.9, "model__vocab_size": 257}
    ddp = memory_of(tiny_run(tmp_path, **changes), half=False, on_gpu=False)
    fsdp = memory_of(tiny_run(tmp_path, trainer__strategy="fsdp", **changes), half=False, on_gpu=False)
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(fsdp, part) * 4 == getattr(ddp, part) > 0
    assert (fsdp.activations, fsdp.logits) == (ddp.activations, ddp.logits)
    assert ddp.weights == ddp.gradients == ddp.average
    assert memory_of(tiny_run(tmp_path, model__vocab_size=257), half=False, on_gpu=False).average == 0


def test_a_plan_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, trainer__precision="32-true", trainer__max_steps=500)
    unprepared = make_plan(config, utilisation=0.5, measure=False)
    size = Path(config.data.source).stat().st_size
    assert unprepared["tokens"]["corpus"] == pytest.approx(0.9 * size, abs=1)
    assert not (tmp_path / "data").exists()
    corpus = prepare(config.data, config.tokenizer, show=False)
    monkeypatch.setattr(plan_module, "peak_flops", lambda device, precision: 1e10)
    monkeypatch.setattr(plan_module, "machine_memory", lambda: 10**5)
    figures = make_plan(config, utilisation=0.5, measure=False)
    cost = cost_of(tiny_run(tmp_path, model__vocab_size=257).model)
    flops = 500 * 128 * cost.training_flops
    assert figures["flops"]["run"] == flops
    assert figures["tokens"] == {
        "run": 64000,
        "compute_optimal": 20 * cost.parameters,
        "corpus": len(corpus.train),
        "epochs": 64000 / len(corpus.train),
    }
    seconds = {row["device"]: row["seconds"] for row in figures["devices"]}
    assert seconds["this CPU"] == pytest.approx(flops / 5e9)
    assert seconds["A100"] == pytest.approx(flops / (0.5 * 312e12))
    assert seconds["T4"] == pytest.approx(flops / (0.5 * 8.1e12))
    assert len(seconds) == 1 + len(ACCELERATORS)
    said = "\n".join(figures["verdicts"])
    assert "does not fit this machine's memory" in said
    line = f"{64000 / len(corpus.train):.3g} epochs over the corpus: expect overfitting"
    assert f"{line}; give --model.dropout 0.1 and --eval.patience 5" in said
    assert all(line in show(figures) for line in figures["verdicts"])


def test_verdicts_are_given_only_where_they_hold(tmp_path: Path) -> None:
    corpus = prepare(tiny_run(tmp_path).data, tiny_run(tmp_path).tokenizer, show=False)
    tame = {"trainer__precision": "32-true", "trainer__max_steps": 50, "model__dropout": 0.1}
    tame |= {"eval__patience": 3, "eval__every": 5}
    said = make_plan(tiny_run(tmp_path, **tame), measure=False)["verdicts"]
    assert [line.partition(" this machine")[0] for line in said if "memory" in line] == ["fits"]
    assert not [line for line in said if "overfitting" in line]
    said = make_plan(tiny_run(tmp_path, **{**tame, "trainer__max_steps": 500}), measure=False)["verdicts"]
    assert f"{64000 / len(corpus.train):.3g} epochs over the corpus: expect overfitting" in said


def test_a_measurement_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, model__vocab_size=257, trainer__precision="32-true", batch__micro_batch_size=2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert measured_step(config, torch.device("cpu")) > 0
    assert torch.equal(torch.rand(1), expected)
    figures = make_plan(config)
    assert figures["devices"][0]["how"] == "measured"
    with pytest.raises(ConfigError, match="--utilisation 0: expected a fraction"):
        make_plan(config, utilisation=0)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_has_a_plan(
    path: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["plan", "--config", str(path), "--trainer.precision", "32-true", "--measure", "false"]
    corpus = tmp_path / "text.txt"
    corpus.write_text("some words " * 100)
    given += ["--data.source", str(corpus)]
    assert main([*given, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"]["total"] > 0
    assert main(given) == 0
    assert f"{figures['parameters']['total']:,}" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.txt"]


def test_gpt2_small_is_as_published(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "preset": "gpt2"}
    given = [part for name, value in sizes.items() for part in (f"--model.{name}", str(value))]
    given += [
        "--tokenizer.kind",
        "gpt2",
        "--batch.tokens",
        "1024",
        "--measure",
        "false",
        "--data.folder",
        str(tmp_path),
    ]
    assert main(["plan", *given, "--trainer.precision", "32-true"]) == 0
    assert "124,439,808" in capsys.readouterr().out
