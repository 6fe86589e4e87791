"""Beam search for the prompts of a call, as completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minigpt.errors import ConfigError
from minigpt.model.device import memory_errors
from minigpt.sampling.completion import Completion, Usage
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.loop.batch import Row
from minigpt.sampling.loop.loop import MEMORY_ADVICE, divide
from minigpt.sampling.loop.prompts import hidden_tokens, holds_stop, plain, read_all, text_reader
from minigpt.sampling.recipe import spellings
from minigpt.sampling.search.search import SearchSettings, search_rows
from minigpt.sampling.settings.calls import Call
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.settings.orders import Order
from minigpt.tokenizer.base import Tokenizer

Cook = Callable[[list[int], Call, int], tuple[list[Any], Order]]


def search(
    model: Decodable, tokenizer: Tokenizer, numbers: list[int], ids: list[list[int]], call: Call, cook: Cook
) -> Iterator[Completion]:
    """Run the beam search for a group of prompts, in several batches if its limits or the memory require it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        numbers: indices of the group's prompts in `ids`.
        ids: the prompts of the call.
        call: their settings.
        cook: takes indices, the call and the number of tokens that filters keep; returns processors and order.
    """
    common, configs = call.configs[numbers[0]], call.configs
    rows = [Row(n, 0, 0, ids[n], int(configs[n].max_new_tokens)) for n in numbers]
    beams, limits = int(common.num_beams), (common.max_rows, common.max_batch_tokens)
    # As in transformers: filters keep enough tokens to sample several continuations, one of which may be an end.
    keep = 1 if common.beam_method == "beam" else max(2, len(end_ids(model, tokenizer, common)) + 1)
    for part in divide(rows, model, *limits, beams=beams):
        with memory_errors(f"with {len(part)} prompts of {beams} beams; {MEMORY_ADVICE}"):
            found = _together(model, tokenizer, [row.prompt for row in part], ids, call, cook(numbers, call, keep))
        for hypotheses in found:
            yield from hypotheses


def _together(
    model: Decodable,
    tokenizer: Tokenizer,
    numbers: list[int],
    ids: list[list[int]],
    call: Call,
    cooked: tuple[list[Any], Order],
) -> list[list[Completion]]:
    """Run the beam search for some prompts of a group, in one batch."""
    common, configs = call.configs[numbers[0]], call.configs
    ends, hidden = end_ids(model, tokenizer, common), hidden_tokens(tokenizer, common.skip_special_tokens)
    draws = common.beam_method != "beam"
    processors, order = cooked
    words = [[spellings(tokenizer, text) for text in _alternatives(word)] for word in common.force_words]
    constraints = [[ids for spelled in word for ids in spelled] for word in words]
    constraints += [[one] if isinstance(one[0], int) else list(one) for one in common.force_words_ids]

    def stopped(number: int, written: list[int]) -> bool:
        place = number - call.first
        return holds_stop(tokenizer, ids[place], written, configs[place].stop, hidden)

    found = search_rows(
        model,
        [ids[n] for n in numbers],
        SearchSettings(
            num_beams=common.num_beams,
            num_return_sequences=common.num_return_sequences,
            length_penalty=common.length_penalty,
            early_stopping=common.early_stopping,
            method=common.beam_method,
            num_beam_groups=common.num_beam_groups,
            diversity_penalty=common.diversity_penalty,
        ),
        max_new_tokens=[int(configs[n].max_new_tokens) for n in numbers],
        processors=processors,
        feed=order.feed,
        seeds=[call.seeds[n] for n in numbers],
        end_ids=ends,
        overflow=common.overflow,
        stopped=stopped if any(configs[n].stop for n in numbers) else None,
        constraints=[constraints] * len(numbers) if constraints else (),
        numbers=[call.first + n for n in numbers],
    )
    return [
        [
            Completion(
                prompt_ids=ids[n],
                ids=best.tokens,
                text=read_all(
                    text_reader(tokenizer, ids[n], configs[n].stop, common.include_stop, hidden),
                    best.tokens,
                    ends,
                ),
                finish_reason=best.finish_reason,
                seed=best.seed if draws else None,
                log_probs=best.log_probs,
                usage=Usage(len(ids[n]), len(best.tokens)),
                error=best.error,
                score=best.score,
                complete=best.complete,
                missing=int(common.num_return_sequences) - sum(not other.error for other in hypotheses),
                prompt_index=call.first + n,
                sample_index=rank,
            )
            for rank, best in enumerate(hypotheses)
        ]
        for n, hypotheses in zip(numbers, found, strict=True)
    ]


def end_ids(model: Decodable, tokenizer: Tokenizer, config: SamplingConfig) -> list[int]:
    """The tokens that end a text. Raises ConfigError if the model does not have one that the config names."""
    if config.ignore_eos:
        return []
    if config.eos_token_id is None:  # the tokenizer's, unless it is beyond the model's vocabulary
        eot = tokenizer.eot
        return [] if eot is None or eot >= model.vocab_size else [int(eot)]
    given = plain(config.eos_token_id)
    ends = [given] if isinstance(given, int) else list(given)
    if ends and max(ends) >= model.vocab_size:
        raise ConfigError(
            f"sampling: eos_token_id is {max(ends)}; "
            f"expected a token id of the model, 0 to {model.vocab_size - 1}, or ignore_eos true"
        )
    return ends


def _alternatives(word: str | Sequence[str]) -> Sequence[str]:
    return [word] if isinstance(word, str) else word
