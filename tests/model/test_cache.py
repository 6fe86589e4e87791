"""The key/value cache: whatever is done with it, logits are those of recomputing everything."""

from __future__ import annotations

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.model.explicit import explicit_trunk
from toys import PRESETS, random_ids, random_model, tiny_config


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype == torch.float64  # so that a difference is an error, not rounding
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 7, 10], [23, 1], [1, 23]])
@torch.no_grad()
def test_cached_logits_equal_recomputed_logits(preset: str, chunks: list[int]) -> None:
    model, ids = random_model(tiny_config(preset)).double(), random_ids(3, 24)
    cache = model.new_cache(3, 24)
    parts = [model.all_logits(piece, cache) for piece in ids.split(chunks, dim=1)]
    close(torch.cat(parts, 1), model(ids))
    assert cache.longest == 24


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_rows_of_unequal_length_give_what_they_give_alone(preset: str) -> None:
    model, ids = random_model(tiny_config(preset)).double(), random_ids(4, 24)
    counts = torch.tensor([9, 1, 12, 5])
    cache = model.new_cache(4, 24)
    padded = torch.where(torch.arange(12) < counts[:, None], ids[:, :12], 60)  # padding is some real token
    full = model(ids)
    rows = torch.arange(4)
    close(model.next_logits(padded, cache, counts), full[rows, counts - 1])
    for _ in range(3):  # one token at a time
        close(model.next_logits(ids[rows, cache.lengths][:, None], cache), full[rows, cache.lengths - 1])
    chunk = torch.stack([ids[row, length : length + 4] for row, length in enumerate(cache.lengths)])
    before = cache.lengths.clone()
    logits = model.all_logits(chunk, cache)  # several at a time
    for row in range(4):
        close(logits[row], full[row, before[row] : before[row] + 4])
    more = torch.tensor([1, 2, 2, 1])  # unequal again, in the middle
    chunk = torch.stack([ids[row, length : length + 2] for row, length in enumerate(cache.lengths)])
    close(model.next_logits(chunk, cache, more), full[rows, cache.lengths - 1])
    assert cache.lengths.tolist() == [17, 10, 21, 13]


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_truncated_tokens_are_forgotten(preset: str) -> None:
    model, ids = random_model(tiny_config(preset)).double(), random_ids(2, 16)
    cache = model.new_cache(2, 24)
    model.all_logits(random_ids(2, 20, seed=1), cache)
    cache.truncate(torch.tensor([0, 0]))
    model.all_logits(ids[:, :10], cache)
    cache.truncate(torch.tensor([4, 7]))
    ragged = torch.stack([ids[0, 4:8], ids[1, 7:11]])
    logits = model.all_logits(ragged, cache)
    full = model(ids)
    close(logits[0], full[0, 4:8])
    close(logits[1], full[1, 7:11])


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_gathered_rows_go_on_as_the_rows_they_came_from(preset: str) -> None:
    model, ids = random_model(tiny_config(preset)).double(), random_ids(3, 24)
    cache = model.new_cache(3, 24)
    model.next_logits(ids[:, :8], cache, torch.tensor([8, 6, 3]))
    full = model(ids)
    for picked in ([2, 0, 1], [0, 0, 2, 1, 2], [1]):  # reorder, repeat, select; each after the one before
        copied = model.new_cache(3, 24)
        model.next_logits(ids[:, :8], copied, torch.tensor([8, 6, 3]))
        copied.gather(torch.tensor(picked))
        lengths = copied.lengths.clone()
        logits = model.next_logits(
            torch.stack([ids[row, n : n + 1] for row, n in zip(picked, lengths, strict=True)]), copied
        )
        for place, row in enumerate(picked):
            close(logits[place], full[row, lengths[place]])


@torch.no_grad()
def test_gather_from_a_slot_on_copies_only_what_differs() -> None:
    model = random_model(tiny_config("llama")).double()
    ids = random_ids(1, 20).repeat(3, 1)
    ids[:, 12:] = random_ids(3, 8, seed=1)  # three rows with a common past of 12 tokens
    cache = model.new_cache(3, 24)
    model.all_logits(ids[:, :18], cache)
    cache.gather(torch.tensor([1, 1, 0]), start=12)
    reordered = ids[[1, 1, 0]]
    close(model.all_logits(reordered[:, 18:], cache), model(reordered)[:, 18:])


@torch.no_grad()
def test_a_cache_grows_without_forgetting() -> None:
    model, ids = random_model(tiny_config("gpt2")).double(), random_ids(2, 12)
    cache = model.new_cache(2, 5)
    model.all_logits(ids[:, :5], cache)
    with pytest.raises(ConfigError, match=r"exceed its capacity \(5\)"):
        model.all_logits(ids[:, 5:], cache)
    cache.grow(12)
    assert cache.capacity == 12
    close(model.all_logits(ids[:, 5:], cache), model(ids)[:, 5:])


@torch.no_grad()
def test_an_exception_inside_a_step_leaves_the_lengths() -> None:
    model, ids = random_model(tiny_config("modern")).double(), random_ids(2, 10)
    cache = model.new_cache(2, 24)
    model.all_logits(ids[:, :4], cache)
    handle = model.trunk.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.all_logits(ids[:, 4:6], cache)
    handle.remove()
    assert (cache.longest, cache.lengths.tolist()) == (4, [4, 4])
    close(model.all_logits(ids[:, 4:], cache), model(ids)[:, 4:])


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_the_explicit_trunk_shares_the_cache(preset: str) -> None:
    model, ids = random_model(tiny_config(preset)).double(), random_ids(3, 20)
    cache = model.new_cache(3, 24)
    model.next_logits(ids[:, :8], cache, torch.tensor([8, 2, 5]))
    chunk = torch.stack([ids[row, n : n + 3] for row, n in enumerate(cache.lengths.tolist())])
    logits = model.unembed(explicit_trunk(model.trunk, chunk, cache))
    full = model(ids)
    for row, begin in enumerate((8, 2, 5)):
        close(logits[row], full[row, begin : begin + 3])


def test_bad_lengths_are_refused() -> None:
    cache = random_model(tiny_config("gpt2")).new_cache(2, 8)
    with pytest.raises(ConfigError, match=r"rows of \[0, 0\] tokens cannot be truncated to \[1, 0\]"):
        cache.truncate(torch.tensor([1, 0]))
    cache.lengths, cache.longest = torch.tensor([8, 3]), 8
    with pytest.raises(ConfigError, match=r"cannot be truncated to \[8, 6\]"):
        cache.truncate(torch.tensor([8, 6]))
    with pytest.raises(ConfigError, match="cannot be truncated"):
        cache.truncate(torch.tensor([8]))
    with pytest.raises(ConfigError, match="needs 2 row indices"):
        cache.gather(torch.tensor([0]), start=1)


def test_rows_that_leave_give_their_memory_back() -> None:
    cache = random_model(tiny_config("gpt2")).new_cache(16, 8)

    def held() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in (*cache.keys, *cache.values))

    whole = held()
    for count in range(15, 0, -1):
        cache.gather(torch.arange(count))
        assert held() <= whole * 2 * count / 16
