"""Beam search against transformers, weights shared: the same texts, the same scores."""

from __future__ import annotations

import functools

import pytest
import torch

from beams import search
from minigpt.sampling.processors.bans import NoRepeatNGram
from minigpt.sampling.processors.endings import MinNewTokens
from minigpt.sampling.processors.penalties import RepetitionPenalty
from minigpt.sampling.processors.processors import Temperature
from minigpt.sampling.processors.truncation import TopK
from minigpt.sampling.search.search import Hypothesis
from toys import needs_transformers, random_ids, random_model, tiny_config, transformers_twin


@functools.cache
def twins(preset: str):
    model = random_model(tiny_config(preset, vocab_size=47, block_size=40, tie_embeddings=False)).double()
    return model, transformers_twin(model.float()).double(), model.double()


def theirs(preset: str, prompt: list[int], end_ids=(), **options) -> list[tuple[list[int], float]]:
    """What transformers finds: written tokens with the end token, and scores."""
    twin = twins(preset)[1]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=46,
            eos_token_id=list(end_ids) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **{"do_sample": False, "top_k": 0, **options},
        )
    rows = []
    for tokens, score in zip(found.sequences[:, len(prompt) :].tolist(), found.sequences_scores.tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(tokens) if token in end_ids), len(tokens))
        rows.append((tokens[:end], score))
    return rows


def assert_same(mine: list[Hypothesis], others: list[tuple[list[int], float]]) -> None:
    assert [hypothesis.tokens for hypothesis in mine] == [tokens for tokens, _ in others]
    # They add up in float32.
    assert [hypothesis.score for hypothesis in mine] == pytest.approx([score for _, score in others], rel=2e-6)


PROMPTS = [random_ids(1, length, vocab_size=46, seed=length)[0].tolist() for length in (3, 7, 1)]

CASES = [
    {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "end_ids": ends}
    for beams, early, penalty, ends in [
        (2, False, 1.0, (5,)),
        (3, False, 0.0, (5, 9)),
        (5, False, 2.0, (1, 2, 3, 4, 5, 6)),
        (4, False, -1.0, (1, 2, 3, 4, 5, 6)),
        (2, True, 1.0, (1, 2, 3, 4, 5, 6)),
        (3, True, 0.5, (7, 8, 9)),
        (5, True, -1.0, (7,)),
        (2, "never", 0.0, (1, 2, 3, 4)),
        (3, "never", 1.0, (1, 2, 3, 4)),
        (4, "never", 2.0, (1, 2, 3, 4, 5, 6)),
        (3, "never", -1.0, (30, 31, 32, 33)),
        (4, False, 1.0, ()),
    ]
]


@pytest.mark.parametrize(("preset", "case"), list(zip(["gpt2", "llama"] * 6, CASES, strict=True)), ids=str)
def test_beams_and_scores_are_those_of_transformers(preset, case):
    mine = search(twins(preset)[2], PROMPTS, 9, **case)
    for prompt, hypotheses in zip(PROMPTS, mine, strict=True):
        options = {**case, "num_return_sequences": case["num_beams"]}
        assert_same(hypotheses, theirs(preset, prompt, max_new_tokens=9, **options))


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_processors_work_on_log_probabilities_as_in_transformers(preset):
    end_ids = (1, 2, 3, 4, 5, 6)
    processors = [RepetitionPenalty(1.3), NoRepeatNGram(2), MinNewTokens(4)]
    mine = search(twins(preset)[2], PROMPTS, 10, processors, end_ids, num_beams=4, num_return_sequences=2)
    for prompt, hypotheses in zip(PROMPTS, mine, strict=True):
        others = theirs(
            preset,
            prompt,
            end_ids,
            num_beams=4,
            num_return_sequences=2,
            max_new_tokens=10,
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            min_new_tokens=4,
        )
        assert_same(hypotheses, others)


@needs_transformers(">=5.24", "before, the first drawn continuations may end, not the best of the drawn ones")
@pytest.mark.parametrize("end_ids", [(), (5,), (1, 2, 3, 4, 5, 6)])
def test_beam_sampling_draws_what_transformers_draws(end_ids):
    processors = [Temperature(1.7), TopK(20)]

    def draw(scores, count):
        return torch.multinomial(scores.float().softmax(-1).unsqueeze(0), count)[0]

    for seed, prompt in enumerate(PROMPTS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mine = search(twins("gpt2")[2], [prompt], 8, processors, end_ids, num_beams=4, method="sample", draw=draw)
            torch.manual_seed(seed)
            others = theirs(
                "gpt2",
                prompt,
                end_ids,
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=8,
                do_sample=True,
                temperature=1.7,
                top_k=20,
            )
        assert_same(mine[0], others)
