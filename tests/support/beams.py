"""Beam search over small models, called with fields as options; and every text of one, by enumeration."""

from __future__ import annotations

import math

from minigpt.sampling.search.search import Hypothesis, SearchSettings, search_rows
from table_model import TableLM


def search(
    model, prompts, max_new_tokens=8, processors=(), end_ids=(), seeds=None, **options
) -> list[list[Hypothesis]]:
    """`search_rows` with the settings' fields among the options."""
    names = {name: options.pop(name) for name in list(options) if name in SearchSettings.__dataclass_fields__}
    names = {"num_return_sequences": names["num_beams"], **names}
    seeds = [100 + i for i in range(len(prompts))] if seeds is None else seeds
    return search_rows(
        model,
        prompts,
        SearchSettings(**names),
        max_new_tokens=max_new_tokens,
        processors=processors,
        end_ids=end_ids,
        seeds=seeds,
        **options,
    )


def every_text(model: TableLM, prompt: list[int], length: int, end_ids=()) -> dict[tuple[int, ...], float]:
    """All texts of at most `length` tokens, each to its end, with their log-probabilities."""
    texts: dict[tuple[int, ...], float] = {}
    open_texts = {(): 0.0}
    while open_texts:
        following = {
            (*text, token): total + math.log(p)
            for text, total in open_texts.items()
            for token, p in enumerate(model.probabilities([*prompt, *text]))
        }
        ended = {text for text in following if text[-1] in end_ids or len(text) == length}
        texts.update({text: following[text] for text in ended})
        open_texts = {text: total for text, total in following.items() if text not in ended}
    return texts
