"""Muon and AdamW in one optimizer: equal to torch's own two, whatever is stacked."""

from __future__ import annotations

import pytest
import torch

from minigpt.model.gpt import GPT
from minigpt.training.config import OptimizerConfig, TrainConfig, TrainerConfig
from minigpt.training.recipe.muon import MuonAdamW, orthogonalize
from minigpt.training.recipe.optimizer import make_optimizer
from minigpt.training.run.module import TrainingModule
from toys import PRESETS, tiny_config

SHAPES = [(32, 32), (32, 32), (48, 16), (16, 48), (24, 40), (8, 64), (1, 16)]


def matrices(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def muon_group(parameters: list[torch.nn.Parameter], splits: list[tuple[int, ...]] | None = None) -> dict:
    splits = splits or [(parameter.shape[0],) for parameter in parameters]
    return {"params": parameters, "splits": splits, "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "steps": 5}


def torch_muon(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=5, adjust_lr_fn="original")


def give_gradients(*sides: list[torch.nn.Parameter], seed: int) -> None:
    """The same random gradients to the parameters of every side."""
    for side in sides:
        generator = torch.Generator().manual_seed(seed)
        for parameter in side:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon computes Newton-Schulz in bfloat16, always; with this its very code computes in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_one_matrix_equals_torchs_muon_to_the_bit_in_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = matrices([shape]), matrices([shape])
    mine, reference = MuonAdamW([muon_group(ours)], torch.bfloat16), torch_muon(theirs)
    for step in range(6):
        give_gradients(ours, theirs, seed=step)
        mine.step()
        reference.step()
        assert torch.equal(ours[0], theirs[0])


def test_many_matrices_equal_torchs_muon_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32(monkeypatch)
    ours, theirs = matrices(SHAPES), matrices(SHAPES)
    mine, reference = MuonAdamW([muon_group(ours)]), torch_muon(theirs)
    for step in range(6):
        give_gradients(ours, theirs, seed=step)
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state[a]["momentum"], reference.state[b]["momentum_buffer"])


def test_matrices_in_a_stack_are_updated_as_one_by_one() -> None:
    stacked, alone = matrices(SHAPES, torch.float64), matrices(SHAPES, torch.float64)
    together = MuonAdamW([muon_group(stacked)], torch.float64)
    apart = [MuonAdamW([muon_group([parameter])], torch.float64) for parameter in alone]
    for step in range(4):
        give_gradients(stacked, alone, seed=step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    for a, b in zip(stacked, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_matrices_in_one_parameter_are_updated_as_parameters_of_their_own() -> None:
    rows = (32, 16, 16)  # queries, and fewer keys and values
    [joint] = matrices([(64, 32)], torch.float64)
    split = [torch.nn.Parameter(part.clone()) for part in joint.detach().split(rows)]
    together = MuonAdamW([muon_group([joint], [rows])], torch.float64)
    apart = MuonAdamW([muon_group(split)], torch.float64)
    for step in range(4):
        give_gradients([joint], seed=step)
        for part, gradient in zip(split, joint.grad.split(rows), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(joint, torch.cat(split), rtol=1e-12, atol=1e-12)
    whole = MuonAdamW([muon_group([parameter := matrices([(64, 32)], torch.float64)[0]])], torch.float64)
    give_gradients([parameter], seed=0)
    whole.step()
    assert (parameter - joint).abs().max() > 1e-3  # the split matters


def test_adamw_groups_equal_torchs_adamw_to_the_bit() -> None:
    shapes: list[tuple[int, ...]] = [(7, 5), (5,), (3, 4), ()]
    ours, theirs = matrices(shapes), matrices(shapes)
    values = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.2}
    mine, reference = MuonAdamW([{"params": ours, **values}]), torch.optim.AdamW(theirs, fused=True, **values)
    for step in range(6):
        give_gradients(ours, theirs, seed=step)
        for group in (*mine.param_groups, *reference.param_groups):
            group["lr"] = 3e-3 / (step + 1)
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_parameter_without_a_gradient_is_passed_over() -> None:
    ours = matrices([(4, 4), (4, 4), (3,)])
    before = [parameter.detach().clone() for parameter in ours]
    optimizer = MuonAdamW(
        [muon_group(ours[:2]), {"params": ours[2:], "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.1}]
    )
    optimizer.step()
    assert not optimizer.state
    ours[1].grad = torch.ones(4, 4)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(ours, before, strict=True)] == [True, False, True]


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    stack = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None, None]
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    result = orthogonalize(stack, 12, torch.float32)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    # Its factors are those of the input: in the input's own bases the result is the diagonal of its singular values.
    diagonal = left.mT @ result @ right.mT
    off = diagonal - torch.diag_embed(torch.diagonal(diagonal, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_is_taken_once_and_matrices_in_blocks_by_muon(preset: str) -> None:
    model = GPT(tiny_config(preset))
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"))
    taken = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(model.parameters()))
    by_muon = {parameter for group in optimizer.param_groups if "splits" in group for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if parameter in by_muon}
    assert names >= {f"trunk.blocks.{n}.{part}.weight" for n in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.up")}
    assert not [name for name in names if not name.startswith("trunk.blocks.")]
    for group in optimizer.param_groups:
        assert all(sum(rows) == len(p) for rows, p in zip(group.get("splits", []), group["params"], strict=False))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_newton_schulz_is_computed_as_the_model_is(precision: str, dtype: torch.dtype) -> None:
    config = TrainConfig(optimizer=OptimizerConfig(name="muon"), trainer=TrainerConfig(precision=precision))  # type: ignore[arg-type]
    optimizer = TrainingModule(GPT(tiny_config("modern")), config).configure_optimizers()
    assert isinstance(optimizer, MuonAdamW)
    assert optimizer.dtype == dtype
