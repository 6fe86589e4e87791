"""Detectors of attention heads: every head gets a score from 0 to 1 for each kind.

Each kind of head is a rule that selects the slots a query should attend to; the score is the attention on these slots.
By default the text is a block of random tokens that repeats once, A B C D A B C D, so that only the repetition is
predictable. For the second C as query, each kind selects:

    previous            B, the token before              current     itself
    duplicate           the first C                      first       A, the first token
    induction           D after the first C              offset      the token a fixed distance back

Induction heads and how to measure them: Olsson et al. 2022, arXiv 2209.11895.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.axes import grid
from minigpt.internals.access.names import listed
from minigpt.internals.access.result import Axis, Result, Tabled
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.weights import ordinary_ids, read_out, write_weights
from minigpt.internals.causal.ablation import ablate
from minigpt.model.precision import widen
from minigpt.terminal import notice

LONGEST = 64  # maximum tokens of a random block

# Ids (B, T) and the offset -> mask (B or 1, T, S) of the slots that a head of that kind attends to.
Looks = Callable[[Tensor, int], Tensor]
OFFSET = 2  # default offset, in tokens


def _back(ids: Tensor) -> Tensor:  # (T, S): distance from the slot to the query
    places = torch.arange(ids.shape[1], device=ids.device)
    return places[:, None] - places


def _same(ids: Tensor) -> Tensor:  # (B, T, S): the slot has the same token as the query
    return ids[:, :, None] == ids[:, None]


def _after_same(ids: Tensor) -> Tensor:  # (B, T, S): the token before the slot is the query's token
    return torch.nn.functional.pad(_same(ids)[:, :, :-1], (1, 0)) & (_back(ids) >= 0)


LOOKS: dict[str, Looks] = {
    "previous": lambda ids, offset: (_back(ids) == 1)[None],
    "duplicate": lambda ids, offset: _same(ids) & (_back(ids) > 0),
    "induction": lambda ids, offset: _after_same(ids),
    "current": lambda ids, offset: (_back(ids) == 0)[None],
    "first": lambda ids, offset: ((_back(ids) > 0) & (torch.arange(ids.shape[1], device=ids.device) == 0))[None],
    "offset": lambda ids, offset: (_back(ids) == offset)[None],
}
KINDS = (*LOOKS, "copying")


def kinds_of(study: Access) -> tuple[str, ...]:
    """The kinds that this model has: copying assumes a final norm that divides by one number per position."""
    return KINDS if getattr(study.model.trunk.norm, "divides", False) else tuple(LOOKS)


def repeats_fit(study: Access) -> bool:
    """Whether the context and vocabulary are large enough for a repeated block of two tokens."""
    return _most(study) >= 2


def _most(study: Access) -> int:  # maximum tokens of a repeated block
    return min(study.config.block_size // 2, len(ordinary_ids(study)))


def repeated_block(study: Access, rows: int = 8, length: int | None = None, seed: int = 0) -> Tensor:
    """Draw random blocks of distinct tokens and repeat each once: ids (rows, 2 length).

    Args:
        study: study of the model; the tokens are drawn from its `ordinary_ids`.
        rows: number of rows.
        length: tokens per block; None: half of block_size, but at most 64 and at most the number of tokens.
        seed: seed of the random tokens.
    """
    ids = ordinary_ids(study)
    most = _most(study)
    if most < 2:
        raise ConfigError(
            "heads: a repeated random block needs a block_size of at least 4 and at least two different tokens; this "
            f"model has block_size {study.config.block_size} and {len(ids)} tokens; give a text (--text)"
        )
    length = min(most, LONGEST) if length is None else length
    if not 2 <= length <= most:
        raise ConfigError(
            f"length: {length} tokens per block; expected 2 to {most} (half of block_size {study.config.block_size}, "
            f"and at most the {len(ids)} different tokens)"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(ids), generator=generator)[:length] for _ in range(rows)])
    return ids[drawn.to(ids.device)].repeat(1, 2)


def pattern_score(pattern: Tensor, looks: Tensor) -> Tensor:
    """Mean attention (H), from 0 to 1, on the slots selected by `looks`, over queries with at least one such slot.

    Args:
        pattern: attention patterns (B, H, T, S).
        looks: mask of slots (B or 1, T, S).

    Raises:
        DataError: no query has such a slot.
    """
    looks = looks.expand(len(pattern), -1, -1)
    asked = looks.any(-1)  # (B, T)
    if not asked.any():
        raise DataError("text: no position matches this kind of head; give a longer text, or one with repetitions")
    on_them = (pattern * looks[:, None]).sum(-1)  # (B, H, T)
    return on_them.transpose(1, 2)[asked].mean(0)


def copying_score(pattern: Tensor, written: Tensor, ids: Tensor) -> Tensor:
    """Copying score of heads, (H): 1: attended tokens gain more logit than all others, 0.5: chance, 0: less than all.

    Args:
        pattern: attention patterns (B, H, T, S).
        written: direct contribution of each head to the logits of the K distinct tokens of the text, (B, H, T, K), in
            the order of `ids.unique()`.
        ids: token ids (B, S).

    For every query and slot it takes the share of other tokens that gain less logit than the slot's token, and averages
    these weighted by attention. The final norm divides all logits of a query by the same number, so it does not matter.
    """
    tokens, which = ids.unique(return_inverse=True)  # (K), (B, S)
    if len(tokens) < 2:
        raise DataError("text: copying needs at least two different tokens, but the text has one; give another text")
    written = written.contiguous()
    ranked = written.sort(-1).values
    below, not_above = (torch.searchsorted(ranked, written, right=right) for right in (False, True))
    share = (below + not_above - 1) / (2 * (len(tokens) - 1))  # (B, H, T, K); ties share their rank
    looked_at = pattern @ torch.nn.functional.one_hot(which, len(tokens)).to(pattern.dtype)[:, None]  # (B, H, T, K)
    return (looked_at * share.to(pattern.dtype)).sum(-1).mean((0, 2))


def head_scores(study: Access, kind: str, text: Text | None = None, *, offset: int = OFFSET, seed: int = 0) -> Result:
    """Score every head for one kind of attention pattern: layer x head, from 0 to 1.

    Args:
        study: see `Study`.
        kind: previous, duplicate, induction, current, first, offset or copying.
        text: text to run; None: random repeated blocks, see `repeated_block`.
        offset: distance in tokens, for the kind offset.
        seed: seed of the random blocks.

    The notes hold the score of uniform attention ("even"; 0.5 for copying) as a baseline.
    """
    return _scores(study, [kind], text, offset, seed)[kind]


def heads(
    study: Access,
    text: Text | None = None,
    *,
    kinds: str | Sequence[str] | None = None,
    causal: bool = True,
    offset: int = OFFSET,
    seed: int = 0,
) -> Heads:
    """Score every head for every kind of attention pattern, and measure the loss increase when it is ablated.

    Args:
        study: see `Study`.
        text: text to run; None: random repeated blocks, see `repeated_block`.
        kinds: kinds of `head_scores`, as "previous,induction" or a list. None: all kinds that the text allows; a text
            without repetitions has no scores for duplicate and induction.
        causal: also measure the loss increase on this text when a head is zero-ablated (see `ablate`).
        offset: distance in tokens, for the kind offset.
        seed: seed of the random blocks.
    """
    text = repeated_block(study, seed=seed) if text is None else text
    wanted = kinds_of(study) if kinds is None else listed(kinds)
    scores = _scores(study, wanted, text, offset, seed, leave_out=kinds is None)
    return Heads(scores, ablate(study, text, parts="head") if causal else None)


def _scores(
    study: Access, kinds: Sequence[str], text: Text | None, offset: int, seed: int, leave_out: bool = False
) -> dict[str, Result]:
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    ids = repeated_block(study, seed=seed) if text is None else study.ids(text)
    if leave_out and offset == OFFSET and ids.shape[1] <= offset:
        notice(f"no offset scores: the text has {ids.shape[1]} tokens, but offset is {offset}")
        kinds = [kind for kind in kinds if kind != "offset"]
    if "offset" in kinds and not 0 <= offset < ids.shape[1]:
        raise ConfigError(
            f"offset: {offset}; expected 0 to {ids.shape[1] - 1} (the text has {ids.shape[1]} tokens), or --kinds "
            "(kinds=) without offset"
        )
    _, cache = study.run_with_cache(ids, ["pattern", "z"] if "copying" in kinds else "pattern")
    layers, counted = range(study.config.n_layer), torch.arange(1, ids.shape[1] + 1, device=ids.device)
    made = {}
    for kind in kinds:
        if kind == "copying":
            out = read_out(study.model, ids.unique())  # (C, K)
            values = []
            for layer in layers:
                to_logits = write_weights(study.model, layer) @ out  # (H, D, K)
                written = torch.einsum("bthd,hdk->bhtk", cache["z", layer], to_logits)
                values.append(copying_score(cache["pattern", layer], written, ids))
            even = 0.5
        else:
            looks = LOOKS[kind](ids, offset)
            if not looks.any() and leave_out:
                notice(f"no {kind} scores: no position of this text has a slot that such a head attends to")
                continue
            if not looks.any():
                raise DataError(
                    f"text: none of its {ids.shape[1]} positions has a slot that a {kind} head attends to; give a "
                    "longer text, or one with repetitions, or leave the kind out of --kinds (kinds=)"
                )
            values = [pattern_score(cache["pattern", layer], looks) for layer in layers]
            share = looks.sum(-1) / counted  # (B or 1, T)
            even = float(share[looks.any(-1)].mean())
        title = f"{kind} heads" + (f" ({offset} back)" if kind == "offset" else "")
        notes = {"even": even, "tokens": ids.numel()}
        made[kind] = Result(title, widen(torch.stack(values)).numpy(force=True), grid(study.config), "score", notes)
    return made


@dataclass
class Heads(Tabled):
    """Result of `heads`. Prints as a table with one head per line; `table()` returns it as a Result."""

    scores: dict[str, Result]
    """Layer x head, by kind."""
    effect: Result | None = None
    """Heads x (loss, KL, flips): the effect of zero ablation; None if it was not measured."""

    def best(self, kind: str) -> tuple[str, float]:
        """The head with the highest score of this kind, and the score: ("L1H3", 0.94)."""
        ((layer, head), score), *_ = self.scores[kind].top(1)
        return f"L{layer}{head}", score

    def table(self) -> Result:
        """Heads x scores; the last column is the loss increase under zero ablation, in nats, if it was measured."""
        layers, names = (axis.labels for axis in next(iter(self.scores.values())).axes)
        columns = [result.values.reshape(-1) for result in self.scores.values()]
        labels = list(self.scores)
        if self.effect is not None:
            columns.append(self.effect.values[:, self.effect.axes[1].labels.index("loss")])
            labels.append("Δloss (nats)")
        rows = [f"L{layer}{head}" for layer in layers for head in names]
        axes = (Axis("head", rows), Axis("score", labels))
        return Result("Attention heads", np.stack(columns, 1), axes, "scores 0 to 1; Δloss when ablated", self._notes())

    def _notes(self) -> dict[str, str]:
        return {f"most {kind}": "{} {:.2f}".format(*self.best(kind)) for kind in self.scores}

    def __str__(self) -> str:
        table = self.table()
        table.notes = {}
        best = [f"  {what:15} {head}" for what, head in self._notes().items()]
        return "\n".join([str(table), *best])

    __repr__ = __str__
