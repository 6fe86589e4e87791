from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as theirs

from minigpt.errors import ConfigError
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.processors.bans import (
    AllowedIds,
    BadWords,
    BeginSuppress,
    LogitBias,
    NoRepeatNGram,
    PrefixAllowed,
    PromptNoRepeatNGram,
    SequenceBias,
    Suppress,
)
from minigpt.sampling.processors.endings import (
    ExponentialLengthDecay,
    ForcedFirst,
    ForcedLast,
    MinLength,
    MinNewTokens,
)
from minigpt.sampling.processors.processors import Temperature
from processor_cases import INF, assert_well_behaved, context_of, kept, ragged, random_logits
from table_model import TableLM, run
from toys import needs_transformers

ENDS = (0, 7)
SEQUENCES = {(1,): 0.5, (9,): -INF, (2,): -1.25, (0, 2): 2.5, (1, 2): -INF, (2, 1, 0): 4.0, (1, 1, 1, 4): -8.0}
WORDS = [[1], [0, 2], [2, 2, 1], [7], [0, 7], [1, 1, 1, 4]]


def allowed_after(prompt: int, ids: torch.Tensor) -> list[int]:
    return [int(ids[-1]), len(ids), 20 + prompt]


EXAMPLES = [
    NoRepeatNGram(1),
    NoRepeatNGram(2),
    NoRepeatNGram(3),
    PromptNoRepeatNGram(1),
    PromptNoRepeatNGram(2),
    SequenceBias(SEQUENCES),
    BadWords(WORDS),
    LogitBias({1: 0.5, 40: -INF}),
    AllowedIds([0, 3, 17]),
    Suppress((0, 3, 17)),
    BeginSuppress([0, 3, 17]),
    PrefixAllowed(allowed_after),
    MinLength(6),
    MinNewTokens(3),
    ForcedFirst(5),
    ForcedLast(4),
    ForcedLast(4, 9),
    ExponentialLengthDecay(2, 1.3),
    ExponentialLengthDecay(0, 0.8),
]


@pytest.mark.parametrize("processor", EXAMPLES, ids=lambda processor: type(processor).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_ban_treats_rows_alone_keeps_its_input_and_ignores_padding(processor, dtype):
    logits = random_logits(dtype=dtype)
    context = ragged(end_ids=ENDS)
    assert_well_behaved(processor, context, logits, ragged(end_ids=ENDS, padding=None))
    assert not torch.equal(processor(context, logits), logits)
    assert not getattr(processor, "shaping", False)


@pytest.mark.parametrize(
    "processor",
    [
        NoRepeatNGram(0),
        PromptNoRepeatNGram(0),
        NoRepeatNGram(16),
        SequenceBias({(1,): 0.0, (2, 1): 0.0}),
        LogitBias({4: 0.0}),
        AllowedIds(range(50)),
        MinLength(0),
        MinNewTokens(0),
        ExponentialLengthDecay(0, 1.0),
        ExponentialLengthDecay(15, 2.0),
    ],
    ids=repr,
)
def test_neutral_parameters_change_nothing(processor):
    logits = random_logits()
    assert torch.equal(processor(ragged(end_ids=ENDS), logits), logits)


def each_row(context, logits):
    """Each row's ids and logits without padding, as the oracle takes them, its prompt's length and its number."""
    for row in range(len(logits)):
        ids = context.ids[row : row + 1, : context.lengths[row]]
        yield row, ids, logits[row : row + 1], int(context.prompt_lengths[row])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_n_gram_bans_equal_transformers(n):
    logits, context = random_logits(), ragged()
    ours, of_prompt = NoRepeatNGram(n)(context, logits), PromptNoRepeatNGram(n)(context, logits)
    for row, ids, mine, prompt in each_row(context, logits):
        assert torch.equal(ours[row : row + 1], theirs.NoRepeatNGramLogitsProcessor(n)(ids, mine))
        oracle = theirs.EncoderNoRepeatNGramLogitsProcessor(n, ids[:, :prompt])
        assert torch.equal(of_prompt[row : row + 1], oracle(ids, mine))


def test_n_gram_bans_by_hand():
    logits = torch.zeros(1, 5)
    context = context_of([[1, 2, 3, 1, 2, 4, 1, 2]], [4])
    assert kept(NoRepeatNGram(1)(context, logits)) == [[0]]
    assert kept(NoRepeatNGram(2)(context, logits)) == [[0, 1, 2]]
    assert kept(NoRepeatNGram(3)(context, logits)) == [[0, 1, 2]]
    assert kept(NoRepeatNGram(4)(context, logits)) == [[0, 1, 2, 3, 4]], "4 1 2 came once, and goes on"
    assert kept(PromptNoRepeatNGram(2)(context, logits)) == [[0, 1, 2, 4]]
    assert kept(NoRepeatNGram([0, 2])(context_of([[1, 2, 1]] * 2), torch.zeros(2, 4))) == [[0, 1, 2, 3], [0, 1, 3]]


def with_more_before(ids):
    """A text behind a token of no sequence: before 5.18, transformers passes over what a short text would complete."""
    return torch.cat((torch.full_like(ids[:, :1], 49), ids), dim=1)


def test_sequence_bias_equals_transformers():
    logits, context = random_logits(), ragged()
    ours = SequenceBias(SEQUENCES)(context, logits)
    for row, ids, mine, _ in each_row(context, logits):
        oracle = theirs.SequenceBiasLogitsProcessor(SEQUENCES)
        assert torch.equal(ours[row : row + 1], oracle(with_more_before(ids), mine))


def test_biases_of_sequences_that_end_alike_add_up():
    bias = SequenceBias({(3,): 1.0, (2, 3): 2.0, (1, 2, 3): 4.0, (5, 2, 3): 8.0})
    context = context_of([[1, 2], [0, 2], [2], [2, 1]])
    assert bias(context, torch.zeros(4, 6))[:, 3].tolist() == [7.0, 3.0, 3.0, 1.0]


def test_bad_words_equal_transformers():
    logits, context = random_logits(), ragged(end_ids=ENDS)
    ours = BadWords(WORDS)(context, logits)
    for row, ids, mine, _ in each_row(context, logits):
        oracle = theirs.NoBadWordsLogitsProcessor(WORDS, list(ENDS))
        assert torch.equal(ours[row : row + 1], oracle(with_more_before(ids), mine))


def test_bad_words_never_forbid_the_end_alone():
    logits = torch.zeros(1, 8)
    assert kept(BadWords([[7], [1]])(context_of([[3]], end_ids=(7,)), logits)) == [[0, 2, 3, 4, 5, 6, 7]]
    assert kept(BadWords([[7], [1]])(context_of([[3]]), logits)) == [[0, 2, 3, 4, 5, 6]]
    assert kept(BadWords([[3, 7]])(context_of([[3]], end_ids=(7,)), logits)) == [[0, 1, 2, 3, 4, 5, 6]]


def test_logit_bias_is_added():
    logits = torch.tensor([[1.0, -INF, 3.0, 0.5]])
    assert LogitBias({0: 2.0, 1: 5.0, 2: -INF})(context_of([[0]]), logits).tolist() == [[3.0, -INF, -INF, 0.5]]


def test_suppression_equals_transformers():
    logits, context, ids_to_go = random_logits(), ragged(), [0, 3, 49]
    ours, at_begin = Suppress(ids_to_go)(context, logits), BeginSuppress(ids_to_go)(context, logits)
    assert (context.lengths == context.prompt_lengths).any() and (context.lengths > context.prompt_lengths).any()
    for row, ids, mine, prompt in each_row(context, logits):
        assert torch.equal(ours[row : row + 1], theirs.SuppressTokensLogitsProcessor(ids_to_go)(ids, mine))
        oracle = theirs.SuppressTokensAtBeginLogitsProcessor(ids_to_go, prompt)
        assert torch.equal(at_begin[row : row + 1], oracle(ids, mine))


def test_allowed_ids_keep_their_logits_and_others_go():
    logits = random_logits()
    result = AllowedIds([4, 4, 7])(ragged(), logits)
    assert torch.equal(result[:, [4, 7]], logits[:, [4, 7]])
    result[:, [4, 7]] = -INF
    assert (result == -INF).all()


@needs_transformers(">=5.18", "before, a row whose allowed tokens were all impossible is left without any")
def test_prefix_allowed_equals_transformers():
    logits, context = random_logits(), ragged()
    ours = PrefixAllowed(allowed_after)(context, logits)
    for row, ids, mine, _ in each_row(context, logits):

        def allowed_here(_, ids, row=row):
            return allowed_after(row, ids)

        assert torch.equal(ours[row : row + 1], theirs.PrefixConstrainedLogitsProcessor(allowed_here, 1)(ids, mine))


def test_prefix_allowed_forces_tokens_that_were_impossible_and_refuses_none():
    logits = torch.tensor([[1.0, -INF, -INF, 2.0]])
    assert PrefixAllowed(lambda prompt, ids: [1, 2])(context_of([[0]]), logits).tolist() == [[-INF, 0.0, 0.0, -INF]]
    assert PrefixAllowed(lambda prompt, ids: [1, 3])(context_of([[0]]), logits).tolist() == [[-INF, -INF, -INF, 2.0]]
    with pytest.raises(ConfigError, match="PrefixAllowed's answer"):
        PrefixAllowed(lambda prompt, ids: [])(context_of([[0]]), logits)


@pytest.mark.parametrize("least", [1, 4, 9, 100])
def test_minimum_lengths_equal_transformers(least):
    logits, context = random_logits(), ragged(end_ids=ENDS)
    total, new = MinLength(least)(context, logits), MinNewTokens(least)(context, logits)
    for row, ids, mine, prompt in each_row(context, logits):
        assert torch.equal(total[row : row + 1], theirs.MinLengthLogitsProcessor(least, list(ENDS))(ids, mine))
        oracle = theirs.MinNewTokensLengthLogitsProcessor(prompt, least, list(ENDS))
        assert torch.equal(new[row : row + 1], oracle(ids, mine))


def test_a_forced_first_token_comes_after_any_prompt():
    logits = random_logits()[:3]
    context = context_of([[1], [1, 2, 3], [1, 2]], [1, 3, 1])
    result = ForcedFirst(5)(context, logits)
    expected = theirs.ForcedBOSTokenLogitsProcessor(5)(torch.tensor([[1]]), logits[:1])
    assert torch.equal(result[:2], expected.expand(2, -1))
    assert torch.equal(result[2], logits[2])


@pytest.mark.parametrize("ids", [None, (3,), (3, 9)])
def test_a_forced_last_token_equals_transformers(ids):
    logits, context = random_logits(), ragged(end_ids=ENDS)
    ours = ForcedLast(4, ids)(context, logits)
    changed = 0
    for row, text, mine, prompt in each_row(context, logits):
        oracle = theirs.ForcedEOSTokenLogitsProcessor(prompt + 4, list(ENDS if ids is None else ids))
        assert torch.equal(ours[row : row + 1], oracle(text, mine))
        changed += int(not torch.equal(ours[row : row + 1], mine))
    assert 0 < changed < 12


@needs_transformers(">=5.19", "before, the end at -inf becomes NaN")
@pytest.mark.parametrize(("start", "factor"), [(0, 1.01), (2, 1.5), (3, 0.7), (30, 2.0)])
def test_exponential_decay_equals_transformers(start, factor):
    logits, context = random_logits(), ragged(end_ids=ENDS)
    ours = ExponentialLengthDecay(start, factor)(context, logits)
    for row, ids, mine, prompt in each_row(context, logits):
        oracle = theirs.ExponentialDecayLengthPenalty((start, factor), list(ENDS), prompt)
        assert torch.equal(ours[row : row + 1], oracle(ids, mine))


def test_exponential_decay_stays_finite_however_long_the_text():
    context = context_of([[1] * 4000], [1], end_ids=(0, 2))
    result = ExponentialLengthDecay(0, 1.5)(context, torch.tensor([[3.0, 1.0, -2.0]]))
    assert result.isfinite().all()
    assert (result[0, [0, 2]] > 1e29).all()


def test_end_ids_that_the_model_cannot_write_are_passed_over():
    logits = torch.zeros(1, 4)
    context = context_of([[1, 1]], [1], end_ids=(2, 256))
    assert kept(MinNewTokens(3)(context, logits)) == [[0, 1, 3]]
    assert kept(ForcedLast(2)(context, logits)) == [[2]]
    with pytest.raises(ConfigError, match="no token to force"):
        ForcedLast(2)(context_of([[1, 1]], [1], end_ids=(256,)), logits)
    nowhere = context_of([[1, 1]], [1])
    for processor in (MinLength(9), MinNewTokens(9), ExponentialLengthDecay(0, 2.0), BadWords([[0, 1]])):
        assert torch.equal(processor(nowhere, logits), logits)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (NoRepeatNGram, [0, 1, 2, 3]),
        (PromptNoRepeatNGram, [0, 1, 2, 3]),
        (MinLength, [0, 10, 11, 12]),
        (MinNewTokens, [0, 4, 5, 6]),
        (ForcedLast, [4, 5, 6, 7]),
        (lambda v: ExponentialLengthDecay(v, 1.3), [0, 4, 5, 6]),
        (lambda v: ExponentialLengthDecay(2, v), [0.5, 1.0, 1.3, 2.0]),
    ],
)
def test_a_number_for_each_prompt_does_what_it_does_alone(make, values):
    logits = random_logits()
    prompts = (0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 3, 3)
    rows = context_of([[1, 2, 3, 1, 2, 1, 2, 3, 1, 2]] * 12, [6] * 12, prompts, ENDS)
    together = make(values)(rows, logits)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], make(values[prompt])(rows, logits)[row])


def test_texts_obey_and_rows_that_end_at_different_times_give_what_they_give_alone():
    model = TableLM(end_bias=1.0, vocab_size=9)
    processors = [
        NoRepeatNGram(3),
        BadWords([[4, 5], [6]]),
        SequenceBias({(1, 2): 3.0}),
        MinNewTokens([2, 5, 0, 3]),
        ExponentialLengthDecay(8, 1.2),
        BeginSuppress([3]),
        ForcedLast(25),
    ]
    prompts = [[1], [2, 3, 4, 2, 3], [5, 1], [1, 2, 1, 2]]
    together = run(model, prompts, 25, processors=processors, samples=2, end_ids=(0,))
    assert len({len(tokens) for tokens, _ in together.values()}) > 3
    for (prompt, _), (tokens, reason) in together.items():
        text = prompts[prompt] + tokens
        grams = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
        written = grams[max(0, len(prompts[prompt]) - 2) :]
        assert all(grams.count(gram) == 1 for gram in written)
        assert 6 not in tokens and tokens[0] != 3
        assert all(text[i : i + 2] != [4, 5] for i in range(len(prompts[prompt]) - 1, len(text)))
        assert reason == "end" and len(tokens) > (2, 5, 0, 3)[prompt]
    for i, prompt in enumerate(prompts):
        mine = [p if not isinstance(p, MinNewTokens) else MinNewTokens(p.count[i]) for p in processors]
        alone = run(model, [prompt], 25, seeds=[100 + i], processors=mine, samples=2, end_ids=(0,))
        assert [alone[0, 0], alone[0, 1]] == [together[i, 0], together[i, 1]]


def test_greedy_rows_obey_bans():
    pipeline = Pipeline([Suppress([0]), Temperature(0.0)])
    assert pipeline(context_of([[0]]), torch.tensor([[5.0, 1.0, 2.0]])).argmax(-1).tolist() == [2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoRepeatNGram(-1), "NoRepeatNGram's n is -1"),
        (lambda: NoRepeatNGram(2.5), "NoRepeatNGram's n is 2.5"),
        (lambda: PromptNoRepeatNGram(None), "PromptNoRepeatNGram's n is None"),
        (lambda: SequenceBias({}), "SequenceBias's bias is {}"),
        (lambda: SequenceBias([[1], 2.0]), "SequenceBias's bias is"),
        (lambda: SequenceBias({(): 1.0}), "SequenceBias's bias is"),
        (lambda: SequenceBias({(1,): INF}), "SequenceBias's bias is"),
        (lambda: SequenceBias({(9, 1): 1.0})(context_of([[0]]), torch.zeros(1, 4)), "SequenceBias names token 9"),
        (lambda: BadWords([]), "BadWords' words are"),
        (lambda: BadWords([[-1]]), "BadWords's words is"),
        (lambda: BadWords([[1, 9]])(context_of([[0]]), torch.zeros(1, 4)), "BadWords names token 9"),
        (lambda: LogitBias({-1: 2.0}), "LogitBias's bias is"),
        (lambda: LogitBias({1: math.nan}), "LogitBias's bias is"),
        (lambda: LogitBias({4: 2.0})(context_of([[0]]), torch.zeros(1, 4)), "LogitBias names token 4"),
        (lambda: AllowedIds([]), "AllowedIds's ids is"),
        (lambda: AllowedIds([4])(context_of([[0]]), torch.zeros(1, 4)), "AllowedIds names token 4"),
        (lambda: Suppress("a"), "Suppress's ids is 'a'"),
        (lambda: BeginSuppress([True]), "BeginSuppress's ids is"),
        (lambda: PrefixAllowed(3), "PrefixAllowed's function is 3"),
        (lambda: MinLength(-2), "MinLength's length is -2"),
        (lambda: MinNewTokens("few"), "MinNewTokens's count is 'few'"),
        (lambda: ForcedFirst(-1), "ForcedFirst's token is"),
        (lambda: ForcedFirst(4)(context_of([[0]]), torch.zeros(1, 4)), "ForcedFirst names token 4"),
        (lambda: ForcedLast(0), "ForcedLast's max_new_tokens is 0"),
        (lambda: ExponentialLengthDecay(1, 0.0), "ExponentialLengthDecay's factor is 0.0"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
