from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from minigpt.sampling.draws.noise import MAX_SEED, STRETCH, Noise, Purpose, fresh_seed, philox, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox([np.array(c, dtype=np.uint64) for c in counter], [np.array(k, dtype=np.uint64) for k in key])
    assert tuple(map(int, words)) == expected


def one(seed: int, sample: int, position: int, purpose: int = 0, draw: int = 0) -> float:
    return float(
        uniforms(np.array(seed, dtype=np.uint64), np.array(sample), np.array(position), purpose, draw),
    )


def test_the_words_of_a_uniform_number_are_put_together_as_53_bits():
    high, low = 0x6627E8D5, 0xE169C58D  # the first two words of the all-zero counter and key
    assert one(0, 0, 0) == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_every_part_of_the_key_makes_other_numbers():
    variants = [(7, 3, 5, 1, 2), (8, 3, 5, 1, 2), (7, 4, 5, 1, 2), (7, 3, 6, 1, 2), (7, 3, 5, 2, 2), (7, 3, 5, 1, 3)]
    variants.append((7 + 2**32, 3, 5, 1, 2))  # the upper half of the seed counts too
    assert len({one(*variant) for variant in variants}) == len(variants)


def test_a_row_draws_the_same_numbers_alone_and_among_others():
    alone = Noise([5], [1])
    crowd = Noise([9, 5, MAX_SEED], [0, 1, 2])
    for position in (0, 1, STRETCH - 1, STRETCH, 3, 10 * STRETCH, 2):  # forward, across stretches and back
        mine = alone.uniform(np.array([position]), Purpose.CHOICE)
        among = crowd.uniform(np.array([position + 4, position, 2 * position]), Purpose.CHOICE)
        assert mine[0] == among[1] == one(5, 1, position)


def test_gathered_noise_goes_with_its_rows():
    noise = Noise([1, 2, 3], [0, 1, 0])
    positions = np.array([4, 5, 6])
    before = noise.uniform(positions, Purpose.CHOICE)
    after = noise.gather([2, 2, 0]).uniform(positions[[2, 2, 0]], Purpose.CHOICE)
    assert (after == before[[2, 2, 0]]).all()


def test_numbers_are_uniform_and_uncorrelated_along_positions_samples_and_seeds():
    count = 100_000
    line, zero = np.arange(count), np.zeros(count, dtype=np.uint64)
    for numbers in (
        uniforms(zero, zero, line, 0),
        uniforms(zero, line, zero, 0),
        uniforms(line.astype(np.uint64), zero, zero, 0),
    ):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        observed = np.histogram(numbers, bins=100, range=(0, 1))[0]
        statistic = ((observed - count / 100) ** 2 / (count / 100)).sum()
        assert statistic < 99 + 6 * np.sqrt(2 * 99)  # chi-square, 99 degrees of freedom, six standard deviations
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 6 / np.sqrt(count)


def test_a_fresh_seed_is_printable_and_takes_nothing_from_global_random_state():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) > 10
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
