from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.errors import ConfigError
from minigpt.sampling.draws.noise import Noise
from minigpt.sampling.loop.criteria import MaxTime, Repeats, StopSequences
from minigpt.sampling.processors.processors import Context, Temperature
from table_model import FixedLM, ScriptLM, TableLM, run

INF = math.inf
GREEDY = {"processors": [Temperature(0.0)]}


def context_of(*rows: tuple[list[int], list[int]], spare: int = 0) -> Context:
    """A context of (prompt, written) rows, right-padded with a token that no row has."""
    tokens = [prompt + written for prompt, written in rows]
    longest = max(map(len, tokens)) + spare
    lengths = torch.tensor([len(row) for row in tokens])
    return Context(
        ids=torch.tensor([row + [77] * (longest - len(row)) for row in tokens]),
        prompt_lengths=torch.tensor([len(prompt) for prompt, _ in rows]),
        lengths=lengths,
        positions=lengths.numpy(),
        rows=tuple(range(len(rows))),
        end_ids=(),
        noise=Noise([0] * len(rows), [0] * len(rows)),
    )


def repeats(tokens: list[int], times: int, longest: int, shortest: int) -> bool:
    """The definition: some piece, written out `times` times, is what the tokens end with."""
    return any(
        len(tokens) >= times * size and tokens[len(tokens) - times * size :] == tokens[len(tokens) - size :] * times
        for size in range(shortest, longest + 1)
    )


written_rows = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=14)
    ),
    min_size=1,
    max_size=4,
)


def test_a_stop_sequence_is_found_where_the_written_tokens_end_with_it():
    ends = StopSequences([[5, 5, 6], [2]])
    context = context_of(([1], [5, 5, 5, 6]), ([1], [5, 5, 6, 1]), ([1, 1, 1], [2]), ([9], [5, 6]), spare=3)
    assert ends(context) == ["stop", None, "stop", None]


def test_a_stop_sequence_that_begins_in_the_prompt_is_not_found():
    ends = StopSequences([[5, 5, 6]])
    assert ends(context_of(([5], [5, 6]), ([5, 5], [6]), ([5, 5, 6], [1]), ([5], [5, 5, 6]))) == [None] * 3 + ["stop"]


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(written_rows, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=3))
def test_stop_sequences_by_brute_force(rows, sequences):
    def ended(written: list[int]) -> bool:
        return any(written[i:] == sequence for i in range(len(written)) for sequence in sequences)

    assert StopSequences(sequences)(context_of(*rows)) == ["stop" if ended(written) else None for _, written in rows]


def test_a_row_ends_at_its_first_stop_sequence_and_keeps_it():
    script = [1, 5, 5, 5, 6, 7, 8]
    for sequences, length in (([[5, 5, 6]], 4), ([[5, 6], [7]], 4), ([[8, 8, 8]], 8), ([[1, 5]], 10), ([[5]], 1)):
        tokens, reason = run(ScriptLM(script), [[1]], 10, criteria=[StopSequences(sequences)], **GREEDY)[0, 0]
        assert tokens == (script[1:] + [8] * 5)[:length]
        assert reason == ("stop" if length < 10 else "length")


def test_rows_stop_each_for_themselves():
    model = TableLM(order=None, max_context=9)
    prompts = [[1, 2], [3] * 12, [4, 4, 4], [5]]
    sequences = [[1, 2], [4, 4], [3, 0, 1]]
    free = run(model, prompts, 30, samples=3)
    stopped = run(model, prompts, 30, samples=3, criteria=[StopSequences(sequences)])
    for key, (tokens, _) in free.items():
        ends = [
            place
            for place in range(1, 31)
            if any(tokens[max(0, place - len(sequence)) : place] == sequence for sequence in sequences)
        ]
        assert stopped[key] == ((tokens[: ends[0]], "stop") if ends else (tokens, "length"))
    assert len({len(tokens) for tokens, _ in stopped.values()}) > 3


def test_sequences_may_be_arrays_and_tensors():
    for given_sequences in ([(1, 2), [3]], [np.array([1, 2]), torch.tensor([3])], (torch.tensor([1, 2]), (3,))):
        assert StopSequences(given_sequences) == StopSequences([[1, 2], [3]])


class Clock:
    """Ticks when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_ends_every_row_once_it_is_over():
    clock = Clock()
    ends = MaxTime(5, clock=clock)
    context = context_of(([1], [2]), ([1, 3], [2]))
    answers = []
    for clock.now in (100.0, 104.9, 105.0, 200.0):
        answers.append(ends(context))
    assert answers == [[None, None], [None, None], ["time", "time"], ["time", "time"]]
    assert MaxTime(5, clock=clock)(context) == [None, None], "a fresh one counts anew"


def test_a_call_ends_with_the_token_after_its_time():
    clock = Clock()

    class Slow(TableLM):
        def next_logits(self, *given):
            clock.now += 1.0
            return super().next_logits(*given)

    rows = run(Slow(), [[1], [2, 3]], 12, criteria=[MaxTime(3.5, clock)])
    assert [(len(tokens), reason) for tokens, reason in rows.values()] == [(4, "time")] * 2


def test_the_clock_of_the_machine_goes_on():
    assert MaxTime(1e9)(context_of(([1], [2]))) == [None]
    assert MaxTime(1e-9)(context_of(([1], [2]))) == ["time"]


@pytest.mark.parametrize(
    ("written", "times", "longest", "shortest", "ended"),
    [
        ([7, 1, 2, 1, 2, 1, 2], 3, 2, 1, True),
        ([7, 1, 2, 1, 2, 1, 2], 4, 3, 1, False),
        ([1, 2, 1, 2, 1, 2, 1], 3, 2, 1, True),  # 2 1 2 1 2 1
        ([1, 2, 1, 2, 1, 2, 3], 3, 2, 1, False),
        ([5, 5, 5], 3, 9, 1, True),
        ([5, 5, 5], 3, 9, 2, False),
        ([5] * 6, 3, 9, 2, True),
        ([1, 2, 3, 1, 2, 3], 2, 3, 1, True),
        ([1, 2, 3, 1, 2, 3], 2, 2, 1, False),
        ([1, 2, 2, 1, 2, 2], 2, 3, 3, True),
        ([4], 2, 64, 1, False),
    ],
)
def test_repetition_by_hand(written, times, longest, shortest, ended):
    assert Repeats(times, longest, shortest)(context_of(([9], written))) == ["repetition" if ended else None]


def test_a_repetition_of_the_prompt_is_none():
    assert Repeats(2)(context_of(([1, 2], [1, 2]), ([5], [5]), ([5], [5, 5]))) == [None, None, "repetition"]


@pytest.mark.parametrize(("times", "longest", "shortest"), [(2, 3, 1), (2, 5, 2), (3, 4, 1), (4, 2, 1), (3, 64, 2)])
def test_repetition_by_brute_force_over_all_short_texts(times, longest, shortest):
    ends = Repeats(times, longest, shortest)
    texts = [list(text) for length in (1, 3, 6, 9) for text in itertools.product((0, 1), repeat=length)]
    expected = ["repetition" if repeats(text, times, longest, shortest) else None for text in texts]
    assert ends(context_of(*(([0] * (1 + i % 3), text) for i, text in enumerate(texts)))) == expected
    assert None in expected and ("repetition" in expected)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(written_rows, st.integers(2, 4), st.integers(1, 4), st.integers(0, 3))
def test_repetition_by_brute_force_in_ragged_batches(rows, times, shortest, more):
    ends = Repeats(times, shortest + more, shortest)
    expected = [repeats(written, times, shortest + more, shortest) for _, written in rows]
    assert ends(context_of(*rows, spare=2)) == ["repetition" if ended else None for ended in expected]


def test_a_looping_row_ends_when_its_piece_came_often_enough():
    script = [9, 1, 2, 3, *[4, 5, 6] * 20]
    for times, length in ((2, 3 + 2 * 3), (3, 3 + 3 * 3), (5, 3 + 5 * 3)):
        tokens, reason = run(ScriptLM(script), [[9]], 40, criteria=[Repeats(times)], **GREEDY)[0, 0]
        assert (tokens, reason) == (script[1 : 1 + length], "repetition")
    assert run(ScriptLM(script), [[9]], 40, criteria=[Repeats(2, longest=2)], **GREEDY)[0, 0][1] == "length"
    assert run(FixedLM([0.0, 9.0]), [[1, 1, 1]], 40, criteria=[Repeats(4)], **GREEDY)[0, 0] == ([1] * 4, "repetition")


def test_rows_repeat_each_for_themselves():
    model = TableLM(vocab_size=3, order=2)
    prompts = [[1, 2], [0] * 7, [2, 2, 2], [1]]
    free = run(model, prompts, 40, samples=3)
    ended = run(model, prompts, 40, samples=3, criteria=[Repeats(3, 4)])
    for key, (tokens, _) in free.items():
        ends = [place for place in range(1, 41) if repeats(tokens[:place], 3, 4, 1)]
        assert ended[key] == ((tokens[: ends[0]], "repetition") if ends else (tokens, "length"))
    assert len({len(tokens) for tokens, _ in ended.values()}) > 3


def test_the_first_criterion_with_a_reason_names_it():
    stop, repetition = StopSequences([[4, 4]]), Repeats(2)
    for criteria, reason in (([stop, repetition], "stop"), ([repetition, stop], "repetition")):
        assert run(ScriptLM([9, 1, 4]), [[9]], 9, criteria=criteria, **GREEDY)[0, 0] == ([1, 4, 4], reason)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StopSequences([]), r"StopSequences's sequences is \(\); expected a list of lists"),
        (lambda: StopSequences([[1], []]), r"sequences is \(\(1,\), \(\)\)"),
        (lambda: StopSequences([5, 6]), r"sequences is \(5, 6\); expected a list of lists .*\[\[5, 6\]\]"),
        (lambda: StopSequences([[1, -1]]), "sequences is"),
        (lambda: StopSequences("END"), "sequences is 'END'"),
        (lambda: StopSequences(["END"]), "sequences is"),
        (lambda: MaxTime(0), "MaxTime's seconds is 0; expected a number above 0"),
        (lambda: MaxTime(INF), "seconds is inf"),
        (lambda: MaxTime(1, clock=3.0), r"clock is 3\.0; expected a function"),
        (lambda: Repeats(1), "Repeats's times is 1; expected a whole number, 2 or more"),
        (lambda: Repeats(2.5), r"times is 2\.5"),
        (lambda: Repeats(2, longest=0), "longest is 0; expected a whole number, 1 or more"),
        (lambda: Repeats(2, shortest=0), "shortest is 0"),
        (lambda: Repeats(2, longest=3, shortest=4), "shortest is 4; expected at most its longest, 3"),
    ],
)
def test_a_criterion_that_cannot_be_is_an_error(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
