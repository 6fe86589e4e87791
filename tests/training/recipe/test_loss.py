"""The loss in chunks is the plain loss, to the last digits that the number format has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minigpt.data.batches import IGNORED
from minigpt.model.gpt import GPT
from minigpt.training.recipe import loss
from minigpt.training.recipe.loss import chunked_loss, next_token_loss, plain_loss
from toys import random_ids, random_model, tiny_config

Loss = Callable[[GPT, Tensor, Tensor], Tensor]


def loss_and_gradients(model: GPT, compute: Loss, targets: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    ids = random_ids(3, 24, seed=1)
    value = compute(model, ids, random_ids(3, 24, seed=2) if targets is None else targets)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"loss": value.detach(), **gradients}


def in_chunks_of(rows: int) -> Loss:
    return lambda model, ids, targets: chunked_loss(model, ids, targets, rows)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor, in the root mean square."""
    for name, expected in other.items():
        assert float((one[name] - expected).norm()) <= tolerance * float(expected.norm()), name


@pytest.mark.parametrize("rows", [7, 24, 72, 100])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(
    rows: int, tied: bool, softcap: float, dtype: torch.dtype, tolerance: float
) -> None:
    model = random_model(tiny_config("modern", tie_embeddings=tied, logit_softcap=softcap)).to(dtype)
    plain = loss_and_gradients(model, plain_loss)
    assert_close(loss_and_gradients(model, in_chunks_of(rows)), plain, tolerance)


def test_ignored_targets_count_nothing_in_either() -> None:
    model = random_model(tiny_config("modern", logit_softcap=3.0)).double()
    targets = random_ids(3, 24, seed=2)
    targets[0, :9] = targets[2, 3:] = IGNORED  # one chunk of 7 has no other
    plain = loss_and_gradients(model, plain_loss, targets)
    assert_close(loss_and_gradients(model, in_chunks_of(7), targets), plain, 1e-12)
    counted = targets.flatten() != IGNORED
    log_p = model(random_ids(3, 24, seed=1)).log_softmax(-1).flatten(0, 1)[counted]
    by_hand = -log_p[torch.arange(len(log_p)), targets.flatten()[counted]].mean()
    torch.testing.assert_close(plain["loss"], by_hand, rtol=1e-12, atol=0)


def test_a_factor_on_the_loss_scales_the_gradients() -> None:
    model = random_model(tiny_config("gpt2")).double()
    whole = loss_and_gradients(model, in_chunks_of(10))
    third = loss_and_gradients(model, lambda *given: chunked_loss(*given, 10) / 3)
    assert_close(third, {name: tensor / 3 for name, tensor in whole.items()}, 1e-14)


def test_under_bfloat16_autocast_the_chunked_loss_errs_no_more_than_the_plain_one() -> None:
    model = random_model(tiny_config("modern", logit_softcap=3.0), scale=0.1)
    exact = loss_and_gradients(model, plain_loss)
    size = sum(float(tensor.square().sum()) for tensor in exact.values())
    errors = []
    for compute in (plain_loss, in_chunks_of(10)):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss_and_gradients(model, compute)
        assert rounded["loss"].dtype == torch.float32
        errors.append(sum(float((rounded[name] - exact[name]).square().sum()) for name in exact) / size)
    assert 1e-8 < errors[1] < 1.2 * errors[0] < 1e-3


def test_only_logits_beyond_what_is_worked_on_at_once_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config("modern"))
    chunks: list[int] = []
    monkeypatch.setattr(loss, "chunked_loss", lambda m, ids, targets, rows: chunks.append(rows))
    ids = random_ids(3, 24)
    monkeypatch.setattr(loss, "CPU_LOGITS", 3 * 24 * 61)
    assert isinstance(next_token_loss(model, ids, ids), Tensor)
    monkeypatch.setattr(loss, "CPU_LOGITS", 3 * 24 * 61 - 1)
    next_token_loss(model, ids, ids)
    assert chunks == [71]


def test_the_logits_of_all_tokens_never_exist_together() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, Tensor))
            return out

    model = random_model(tiny_config("gpt2", vocab_size=3000))
    largest = {}
    for name, compute in (("plain", plain_loss), ("chunked", in_chunks_of(9))):
        sizes.clear()
        with Sizes():
            loss_and_gradients(model, compute)
        largest[name] = max(sizes)
    assert largest == {"plain": 72 * 3000, "chunked": 3000 * 32}  # then the matrix itself is what is largest


def test_the_chunked_loss_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CPU_LOGITS", 20 * 61)
    model = random_model(tiny_config("modern", n_layer=1, logit_softcap=3.0))
    traced = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_close(loss_and_gradients(model, traced), loss_and_gradients(model, plain_loss), 1e-6)
