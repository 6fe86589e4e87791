import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.batches import IGNORED, Batches, permute, validation_windows
from minigpt.data.stream import TokenStream
from minigpt.errors import ConfigError, DataError


def counting_stream(folder, length: int) -> TokenStream:
    """A stream whose token number i is i, so that a window shows where it was cut."""
    path = folder / f"{length}.bin"
    np.arange(length, dtype="<u4").tofile(path)
    return TokenStream([path] if length else [], [length] if length else [], "uint32", 10**6, "train")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    places = permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))
    assert places.dtype == np.int64
    np.testing.assert_array_equal(np.sort(places), np.arange(size))


@pytest.mark.parametrize("size", [2, 5, 9, 64])
def test_permute_sends_every_element_everywhere_alike(size):
    # Over many keys each element is in each place with probability 1/size. Rows and columns of the table of counts have
    # fixed sums, so Pearson's statistic has (size-1)^2 degrees of freedom; five standard deviations are allowed.
    keys = np.random.default_rng(1).integers(0, 2**64, 20_000, dtype=np.uint64)
    counts = np.zeros((size, size))
    for x in range(size):
        counts[x] = np.bincount(permute(np.full(len(keys), x), size, keys), minlength=size)
    expected = len(keys) / size
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), (size - 1) ** 2
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_permute_is_the_same_whatever_it_is_asked_with():
    keys = np.array([7, 8, 7, 9], dtype=np.uint64)
    together = permute(np.array([3, 3, 900, 5]), 1000, keys)
    alone = [permute(np.array([x]), 1000, keys[i : i + 1])[0] for i, x in enumerate([3, 3, 900, 5])]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("length", "block", "batch"), [(1000, 8, 4), (1003, 8, 7), (129, 64, 3), (100, 64, 2), (9, 8, 2)]
)
def test_an_epoch_visits_every_window_once_at_its_own_offset(tmp_path, length, block, batch):
    batches = Batches(counting_stream(tmp_path, length), block, batch, seed=3)
    n = batches.windows
    starts = np.concatenate([batches.starts(step) for step in range(-(-5 * n // batch))])
    offsets = set()
    for epoch in range(5):
        windows = np.sort(starts[epoch * n : (epoch + 1) * n])
        offset = windows[0]
        offsets.add(offset)
        assert 0 <= offset < block
        np.testing.assert_array_equal(windows, offset + block * np.arange(n))
        assert windows[-1] + block < length  # the last target exists
    if n > 1:
        assert len(offsets) > 1
    assert length - (n * block + 1) < 2 * block  # no more is left out than the offset needs


def test_epochs_differ_in_order_and_so_do_seeds(tmp_path):
    stream = counting_stream(tmp_path, 64 * 101)
    first, second, other = (
        Batches(stream, 64, 100, seed).starts(step) // 64 for seed, step in [(1, 0), (1, 1), (2, 0)]
    )
    for a, b in [(first, second), (first, other), (first, np.arange(100))]:
        assert (a == b).mean() < 0.1


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_a_batch_follows_from_its_number_alone(tmp_path, order):
    stream = counting_stream(tmp_path, 5000)
    in_order = Batches(stream, 16, 6, 5, order)
    expected = {step: in_order.starts(step).copy() for step in range(1000)}
    jumping = Batches(stream, 16, 6, 5, order)
    for step in (999, 0, 683, 682, 684, 1, 500, 999):
        np.testing.assert_array_equal(jumping.starts(step), expected[step])
    assert jumping.starts(10**12).max() + 16 < 5000


def test_large_batches_hold_the_samples_of_small_ones_in_order(tmp_path):
    stream = counting_stream(tmp_path, 5000)
    small, large = Batches(stream, 16, 5, 5), Batches(stream, 16, 5000, 5)
    joined = np.concatenate([small.starts(step) for step in range(1000, 2000)])
    np.testing.assert_array_equal(joined, large.starts(1))


def test_slices_of_ranks_and_micro_batches_make_up_the_batch(tmp_path):
    batches = Batches(counting_stream(tmp_path, 5000), 16, 12, 5)
    ids, targets = batches.read(7)
    parts = [batches.read(7, slice(begin, begin + 3)) for begin in range(0, 12, 3)]
    assert torch.equal(torch.cat([part[0] for part in parts]), ids)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_targets_are_the_next_tokens(tmp_path):
    ids, targets = Batches(counting_stream(tmp_path, 5000), 16, 12, 5).read(3)
    assert ids.shape == targets.shape == (12, 16)
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids[:, 1:], ids[:, :-1] + 1)


def test_random_windows_begin_anywhere_alike(tmp_path):
    batches = Batches(counting_stream(tmp_path, 24), 8, 16_000, 1, "random")
    counts = np.bincount(batches.starts(0), minlength=16)
    assert len(counts) == 16
    assert ((counts - 1000) ** 2 / 1000).sum() < 15 + 5 * np.sqrt(30)
    assert (batches.starts(0) != batches.starts(1)).any()


def test_reading_batches_leaves_global_random_state_alone(tmp_path):
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    for order in ("shuffled", "random"):
        Batches(counting_stream(tmp_path, 100), 8, 4, 1, order).read(0)
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_epochs_are_counted_in_windows(tmp_path):
    batches = Batches(counting_stream(tmp_path, 88), 8, 4, 1)
    assert batches.windows == 10
    assert [batches.epoch(step) for step in (0, 5, 10)] == [0.0, 2.0, 4.0]


def test_a_text_shorter_than_a_row_shows_the_arithmetic(tmp_path):
    with pytest.raises(DataError, match=r"train has 8 tokens, .* 8 \+ 1 = 9; .* block_size of at most 7"):
        Batches(counting_stream(tmp_path, 8), 8, 4, 1)
    Batches(counting_stream(tmp_path, 9), 8, 4, 1).read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "sorted"}, "data.order is 'sorted'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_unusable_sizes_and_orders_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        Batches(counting_stream(tmp_path, 100), **{"block_size": 8, "batch_size": 2, "seed": 1, **change})


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 18, 100])
def test_validation_makes_every_token_but_the_first_a_target_once(tmp_path, length):
    windows = validation_windows(counting_stream(tmp_path, length), 8)
    ids, targets = windows.read()
    assert len(windows) == len(ids) == -(-(length - 1) // 8)
    real = targets != IGNORED
    assert targets[real].tolist() == list(range(1, length))
    assert torch.equal(targets[real], ids[real] + 1)
    assert (ids[~real] == 0).all()
    assert windows.tokens == length - 1
    in_slices = [windows.read(slice(begin, begin + 3)) for begin in range(0, len(windows), 3)]
    assert torch.equal(torch.cat([part[1] for part in in_slices]), targets)


def test_limited_validation_is_spread_over_the_stream(tmp_path):
    stream = counting_stream(tmp_path, 1000)
    windows = validation_windows(stream, 10, limit_tokens=59)
    assert windows.read()[0][:, 0].tolist() == [0, 200, 400, 600, 800]
    assert windows.tokens == 50
    assert len(validation_windows(stream, 10, limit_tokens=10**9)) == 100
    assert len(validation_windows(stream, 10, limit_tokens=1)) == 1


@pytest.mark.parametrize("length", [0, 1])
def test_validation_of_nothing_says_what_to_do(tmp_path, length):
    with pytest.raises(DataError, match=r"--data.val_fraction"):
        validation_windows(counting_stream(tmp_path, length), 8)
