from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.errors import ConfigError
from minigpt.sampling.draws.decodable import Cache, Decodable
from minigpt.sampling.draws.noise import uniforms
from minigpt.sampling.loop.batch import window_start
from minigpt.sampling.loop.loop import stream_rows
from minigpt.sampling.processors.processors import Temperature
from minigpt.sampling.processors.truncation import TopK, TopP
from table_model import FixedLM, TableLM, run
from toys import PRESETS, random_ids, random_model, tiny_config

INF = math.inf


def plain_start(n: int, context: int) -> int:
    """The start of the window, moved on by half a context until the rest fits."""
    start = 0
    while n - start > context:
        start += max(1, context // 2)
    return start


def reference(logits_of, context, prompt, seed, sample, steps, temperature=1.0) -> list[int]:
    """One row without cache, batch or loop: the window's logits, one number, the inverse of the distribution."""
    tokens = list(prompt)
    for _ in range(steps):
        logits = np.array(logits_of(tokens[plain_start(len(tokens), context) :]), dtype=np.float64)
        if temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        weights = np.exp((logits - logits.max()) / temperature)
        number = float(uniforms(np.array(seed, dtype=np.uint64), np.array(sample), np.array(len(tokens)), 0))
        tokens.append(int(np.searchsorted(np.cumsum(weights) / weights.sum(), number, side="right")))
    return tokens[len(prompt) :]


def test_the_window_starts_at_the_smallest_step_that_lets_the_rest_fit():
    for context in (1, 2, 3, 5, 8):
        assert [window_start(n, context) for n in range(40)] == [plain_start(n, context) for n in range(40)]


@pytest.mark.parametrize("context", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("order", [2, None])
def test_every_row_is_what_a_loop_without_cache_and_batch_gives(context, order):
    model = TableLM(max_context=context, order=order)
    prompts = [[1], [2, 3, 4], [5] * 7, [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 5, 4], [2, 3, 4], [1, 2]]
    rows = run(model, prompts, 20, samples=2)
    for (i, sample), (tokens, reason) in rows.items():
        assert tokens == reference(model.logits, context, prompts[i], 100 + i, sample, 20)
        assert reason == "length"
    assert len(rows) == 12


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 7),
    st.lists(st.integers(0, 2**64 - 1), min_size=5, max_size=5),
    st.sets(st.integers(0, 5), max_size=2),
    st.randoms(use_true_random=False),
)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(prompts, context, seeds, end_ids, shuffler):
    model = TableLM(max_context=context, order=None)
    options = {"max_new_tokens": 9, "end_ids": sorted(end_ids)}
    together = run(model, prompts, seeds=seeds[: len(prompts)], samples=2, **options)
    for i, prompt in enumerate(prompts):
        alone = run(model, [prompt], seeds=[seeds[i]], samples=2, **options)
        assert [alone[0, 0], alone[0, 1]] == [together[i, 0], together[i, 1]]
    order = list(range(len(prompts)))
    shuffler.shuffle(order)
    shuffled = run(model, [prompts[i] for i in order], seeds=[seeds[i] for i in order], samples=2, **options)
    assert all(shuffled[place, sample] == together[i, sample] for place, i in enumerate(order) for sample in (0, 1))


@pytest.mark.parametrize("context", [6, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_continued_text_goes_on_as_an_unbroken_one(context, temperature):
    model = TableLM(max_context=context, order=None)
    options = {"seeds": [7], "processors": [Temperature(temperature)]}
    prompt = [1, 2, 3]
    whole = run(model, [prompt], 20, **options)[0, 0][0]
    for first in range(21):
        begun = run(model, [prompt], first, **options)[0, 0][0]
        assert begun + run(model, [prompt + begun], 20 - first, **options)[0, 0][0] == whole


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpt_with_cache_and_batch_writes_what_it_writes_without(preset):
    model = random_model(tiny_config(preset, block_size=12)).double()
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 4, 17, 4)]
    prompts[3] = prompts[1]

    @torch.no_grad()
    def logits_of(window):
        return model.all_logits(torch.tensor([window]))[0, -1].tolist()

    rows = run(model, prompts, 16, samples=2)
    for (i, sample), (tokens, _) in rows.items():
        assert tokens == reference(logits_of, 12, prompts[i], 100 + i, sample, 16)


def test_gpt_and_table_are_decodable():
    model = random_model(tiny_config("modern"))
    assert isinstance(model, Decodable)
    assert isinstance(model.new_cache(1, 2), Cache)
    assert isinstance(TableLM(), Decodable)
    assert isinstance(TableLM().new_cache(1, 2), Cache)


def test_an_equal_prompt_is_read_once_and_ended_rows_are_not_computed():
    model = TableLM(order=None, end_bias=2.0)
    rows = run(model, [[1, 2], [3], [1, 2]], 8, samples=4, end_ids=[0])
    lengths = [len(tokens) for tokens, _ in rows.values()]
    assert len(set(lengths)) > 2, "the rows are meant to end at different times"
    still_running = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert model.rows_read == [2, *still_running]


def test_reasons_to_end():
    model = TableLM(max_context=8, end_bias=2.0)
    rows = run(model, [[1, 2], [3, 3, 3], [4]], 40, end_ids=[0])
    assert all(tokens[-1] == 0 and 0 not in tokens[:-1] for tokens, reason in rows.values())
    assert {reason for _, reason in rows.values()} == {"end"}
    assert run(model, [[1]], 0) == {(0, 0): ([], "length")}
    assert run(model, [], 5) == {}


def test_stop_at_the_end_of_the_context():
    model = TableLM(max_context=6, order=None)
    rows = run(model, [[1, 2], [3] * 5, [4] * 6], 5, overflow="stop")
    assert {i: (len(tokens), reason) for (i, _), (tokens, reason) in rows.items()} == {
        0: (4, "context"),
        1: (1, "context"),
        2: (0, "context"),
    }
    assert rows[0, 0][0] == run(model, [[1, 2]], 4)[0, 0][0]
    with pytest.raises(ConfigError, match=r"7 tokens.*context is 6"):
        stream_rows(model, [[0] * 7], max_new_tokens=1, overflow="stop")


def test_bad_prompts_and_seeds_are_errors_at_once():
    model = TableLM(vocab_size=6)
    with pytest.raises(ConfigError, match=r"prompt 1: token id 6 at position 2 .* vocabulary of 6 tokens"):
        stream_rows(model, [[0], [1, 2, 6]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="token id -1 at position 0"):
        stream_rows(model, [[-1]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="prompt 0 has no tokens"):
        stream_rows(model, [[]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="seed is -3"):
        stream_rows(model, [[0]], max_new_tokens=1, seeds=[-3])


def test_fresh_seeds_differ_are_told_and_repeat_the_run():
    model = TableLM()
    events = list(stream_rows(model, [[1], [1]], max_new_tokens=12))
    seeds = {event.prompt: event.seed for event in events}
    assert seeds[0] != seeds[1]
    again = list(stream_rows(model, [[1], [1]], max_new_tokens=12, seeds=[seeds[0], seeds[1]]))
    assert again == events


def test_samples_of_a_prompt_and_seeds_give_different_texts():
    rows = run(TableLM(), [[1]], 12, samples=8)
    assert len({tuple(tokens) for tokens, _ in rows.values()}) == 8
    assert run(TableLM(), [[1]], seeds=[1]) != run(TableLM(), [[1]], seeds=[2])


def test_sequences_have_the_distribution_of_the_model():
    model = TableLM(vocab_size=3, order=2)
    count = 6000
    rows = run(model, [[1, 2]], 2, samples=count)
    statistic = 0.0
    for pair in itertools.product(range(3), repeat=2):
        probability = model.probabilities([1, 2])[pair[0]] * model.probabilities([1, 2, pair[0]])[pair[1]]
        observed = sum(tuple(tokens) == pair for tokens, _ in rows.values())
        statistic += (observed - count * probability) ** 2 / (count * probability)
    assert statistic < 8 + 6 * math.sqrt(2 * 8)


def test_top_k_one_and_top_p_zero_and_temperature_zero_are_greedy():
    model = TableLM(order=None, vocab_size=8)
    greedy = reference(model.logits, 64, [1, 2], 0, 0, 15, temperature=0)
    for processors in ([TopK(1)], [TopP(0.0)], [Temperature(0)], [Temperature(1e-4)], [Temperature(0), TopK(3)]):
        assert run(model, [[1, 2]], 15, processors=processors)[0, 0][0] == greedy


def test_parameters_follow_their_prompt_when_other_rows_leave():
    model = TableLM(order=None, end_bias=1.5)
    prompts = [[1, 2], [3], [4, 4, 4], [5]]
    temperatures, ks, ps = [0.0, 0.5, 1.0, 3.0], [6, 2, 3, 4], [1.0, 0.9, 0.2, 0.7]
    processors = [Temperature(temperatures), TopK(ks), TopP(ps)]
    together = run(model, prompts, 15, samples=3, end_ids=[0], processors=processors)
    assert len({len(tokens) for tokens, _ in together.values()}) > 3
    for i, prompt in enumerate(prompts):
        alone = run(
            model,
            [prompt],
            15,
            seeds=[100 + i],
            samples=3,
            end_ids=[0],
            processors=[Temperature(temperatures[i]), TopK(ks[i]), TopP(ps[i])],
        )
        assert [alone[0, j] for j in range(3)] == [together[i, j] for j in range(3)]


class Unrepeated:
    """Forbids the last two tokens written: a memory that goes wrong if rows are mixed up."""

    def start(self, context):
        return torch.full((len(context.rows), 2), -1)

    def __call__(self, context, logits, state):
        for column in state.unbind(1):
            logits = logits.masked_fill(torch.arange(logits.shape[1]) == column[:, None], -INF)
        return logits

    def accept(self, state, tokens, raw, processed):
        assert processed.gather(1, tokens[:, None]).min() > 0
        return torch.stack((state[:, 1], tokens), dim=1)


def test_a_processor_with_memory_gives_each_row_what_it_gives_it_alone():
    model = TableLM(order=None, end_bias=1.0, max_context=9)
    prompts = [[1, 2], [3], [4, 4, 4], [5, 1]]
    options = {"samples": 2, "end_ids": [0], "processors": [Unrepeated()]}
    together = run(model, prompts, 15, **options)
    assert len({len(tokens) for tokens, _ in together.values()}) > 2
    for i, prompt in enumerate(prompts):
        alone = run(model, [prompt], 15, seeds=[100 + i], **options)
        assert [alone[0, j] for j in range(2)] == [together[i, j] for j in range(2)]
    for tokens, _ in together.values():
        assert all(token not in tokens[max(0, i - 2) : i] for i, token in enumerate(tokens))


def test_the_context_shows_each_row_its_own_tokens():
    model = TableLM(order=None, end_bias=1.0)
    prompts = [[1, 2], [3], [4, 4, 4]]
    seen: dict[int, list[int]] = {}

    def look(context, logits):
        assert context.end_ids == (0,)
        assert context.ids.shape == (len(context.rows), int(context.lengths.max()))
        assert context.positions.tolist() == context.lengths.tolist()
        for row, prompt in enumerate(context.rows):
            assert context.prompt_lengths[row] == len(prompts[prompt])
            seen[prompt] = context.ids[row, : context.lengths[row]].tolist()
            numbers = uniforms(np.array(100 + prompt, dtype=np.uint64), np.array(0), context.positions[row], 9)
            assert context.uniform(9)[row] == float(numbers)
        return logits

    rows = run(model, prompts, 30, end_ids=[0], processors=[look])
    for i, prompt in enumerate(prompts):
        assert seen[i] == prompt + rows[i, 0][0][:-1]


def test_a_row_with_nothing_left_to_choose_ends_alone_and_names_the_processor():
    model = TableLM(order=None)

    def forbid_all_of_prompt_one(context, logits):
        rows = [
            row
            for row, (prompt, n) in enumerate(zip(context.rows, context.positions, strict=True))
            if (prompt, n) == (1, 5)
        ]
        logits[rows] = -INF
        return logits

    prompts = [[1, 2], [3, 3], [4]]
    options = {"processors": [Unrepeated(), forbid_all_of_prompt_one, TopP(0.9)], "max_new_tokens": 10}
    events = list(stream_rows(model, prompts, seeds=[100, 101, 102], **options))
    last = [event for event in events if event.prompt == 1][-1]
    assert (last.finish_reason, last.token, last.log_prob) == ("error", None, None)
    assert "position 5" in last.error
    assert "forbid_all_of_prompt_one left no token" in last.error
    assert sum(event.prompt == 1 for event in events) == 4
    alone = run(model, [prompts[0]], seeds=[100], **options)
    assert [event.token for event in events if event.prompt == 0] == alone[0, 0][0]


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, -INF, -INF]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_row_and_blame_the_model(bad, temperature):
    (event,) = stream_rows(FixedLM(bad), [[0]], max_new_tokens=5, processors=[Temperature(temperature), TopK(2)])
    assert event.finish_reason == "error"
    assert "the model's logits" in event.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_choice_is_made_in_float32_where_the_logits_are_half(dtype):
    rounded = torch.tensor(TableLM(vocab_size=8).logits([1, 2])).to(dtype).tolist()
    options = {"processors": [Temperature(0.7), TopK(6), TopP(0.95)], "max_new_tokens": 100, "seeds": [3]}
    assert list(stream_rows(FixedLM(rounded, dtype), [[0]], **options)) == list(
        stream_rows(FixedLM(rounded), [[0]], **options)
    )


def test_log_probabilities_are_the_models_own():
    model = TableLM(order=None)
    tokens = [1, 2]
    for event in stream_rows(model, [[1, 2]], max_new_tokens=8, processors=[Temperature(0.3), TopK(2)], seeds=[4]):
        assert event.log_prob == pytest.approx(math.log(model.probabilities(tokens)[event.token]), abs=1e-5)
        tokens.append(event.token)


def test_a_criterion_of_ones_own_ends_rows_with_its_reason():
    def three_of_a_kind(context):
        ends = [context.ids[row, n - 3 : n].tolist() for row, n in enumerate(context.positions)]
        return ["repetition" if len(set(end)) == 1 else None for end in ends]

    rows = run(
        TableLM(scale=3.0),
        [[1, 2, 3], [4, 5, 4]],
        60,
        samples=3,
        criteria=[lambda context: [None] * len(context.rows), three_of_a_kind],
    )
    assert "repetition" in {reason for _, reason in rows.values()}
    for tokens, reason in rows.values():
        kinds = [len(set(tokens[i : i + 3])) for i in range(len(tokens) - 2)]
        assert (reason == "repetition") == (kinds[-1] == 1)
        assert 1 not in kinds[1:-1]
