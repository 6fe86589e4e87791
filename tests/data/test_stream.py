import pickle

import numpy as np
import pytest

from minigpt.data.stream import TokenStream
from minigpt.errors import DataError


def stream_of(folder, tokens, counts, dtype="uint16", vocab_size=50_000) -> TokenStream:
    paths, begin = [], 0
    for number, count in enumerate(counts):
        paths.append(folder / f"train-{number:05d}.bin")
        np.asarray(tokens[begin : begin + count], dtype=f"<{np.dtype(dtype).str[1:]}").tofile(paths[-1])
        begin += count
    return TokenStream(paths, counts, dtype, vocab_size, "train")


TOKENS = np.random.default_rng(0).integers(0, 50_000, 200)


@pytest.mark.parametrize("counts", [[200], [1, 99, 100], [7, 1, 1, 1, 190], [50, 50, 50, 50]])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("length", [1, 2, 9, 120, 200])
def test_windows_are_those_of_the_joined_shards(tmp_path, counts, dtype, length):
    stream = stream_of(tmp_path, TOKENS, counts, dtype)
    starts = np.arange(200 - length + 1)[::-1]
    windows = stream.read(starts, length)
    assert windows.dtype == np.int64
    assert len(stream) == 200
    np.testing.assert_array_equal(windows, np.stack([TOKENS[s : s + length] for s in starts]))


def test_no_windows_are_read_as_none(tmp_path):
    assert stream_of(tmp_path, TOKENS, [200]).read(np.array([], dtype=int), 500).shape == (0, 500)


@pytest.mark.parametrize("start", [-1, 191, 10**12])
def test_a_window_beyond_the_stream_is_refused(tmp_path, start):
    with pytest.raises(IndexError, match="reach beyond the 200 tokens of train"):
        stream_of(tmp_path, TOKENS, [100, 100]).read(np.array([0, start]), 10)


@pytest.mark.parametrize("counts", [[200], [100, 100]])
def test_an_id_outside_the_vocabulary_is_named_where_it_lies(tmp_path, counts):
    tokens = TOKENS.copy()
    tokens[150] = 60_000
    stream = stream_of(tmp_path, tokens, counts)
    stream.read(np.array([0, 100]), 50)
    shard, offset = (0, 150) if len(counts) == 1 else (1, 50)
    with pytest.raises(DataError, match=rf"train-0000{shard}.bin contains id 60000 at token {offset}, .* 50000 ids"):
        stream.read(np.array([0, 140]), 20)


def test_a_stream_travels_to_another_process_as_paths(tmp_path):
    stream = stream_of(tmp_path, TOKENS, [100, 100])
    stream.read(np.array([90]), 20)
    content = pickle.dumps(stream)
    assert len(content) < 1000
    np.testing.assert_array_equal(pickle.loads(content).read(np.array([90]), 20)[0], TOKENS[90:110])


def test_a_shard_that_vanished_is_named(tmp_path):
    stream = stream_of(tmp_path, TOKENS, [200])
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000.bin cannot be read"):
        stream.read(np.array([0]), 10)
