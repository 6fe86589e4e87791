"""Detectors of attention heads: every head gets a score from 0 to 1 for each kind.

A kind of head is a rule that says, of each query, which slots such a head looks at; the score is the attention that
falls on them. The text is a block of random tokens that comes twice, A B C D A B C D, so that nothing but its own
repetition can be read from it:

    query               the second C
    previous            B, one before                    current     itself
    duplicate           the first C                      first       A, the very first
    induction           the first D: what came after C   offset      a fixed number of tokens before

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
from minigpt.internals.access.names import listed
from minigpt.internals.access.result import Axis, Result, Tabled
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.weights import grid, ordinary_ids, read_out, write_weights
from minigpt.internals.causal.ablation import ablate
from minigpt.model.layers import widen
from minigpt.terminal import notice

LONGEST = 64  # tokens of a block, where the model holds more

# Ids (B, T) and the fixed offset -> which slots (B or 1, T, S) a head of that kind looks at.
Looks = Callable[[Tensor, int], Tensor]
OFFSET = 2  # tokens back, where none is asked for


def _back(ids: Tensor) -> Tensor:  # (T, S): how far behind the query a slot is
    places = torch.arange(ids.shape[1], device=ids.device)
    return places[:, None] - places


def _same(ids: Tensor) -> Tensor:  # (B, T, S): the slot's token is the query's
    return ids[:, :, None] == ids[:, None]


def _after_same(ids: Tensor) -> Tensor:  # (B, T, S): the token before the slot's is the query's
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


def repeats_fit(study: Access) -> bool:
    """Whether the model holds two tokens that come twice."""
    return _most(study) >= 2


def _most(study: Access) -> int:  # tokens of a block that comes twice
    return min(study.config.block_size // 2, len(ordinary_ids(study)))


def repeated_block(study: Access, rows: int = 8, length: int | None = None, seed: int = 0) -> Tensor:
    """Ids (rows, 2 length) of random blocks that come twice, no token twice within a block.

    Args:
        study: whose vocabulary is drawn from; see `ordinary_ids`.
        rows: how many.
        length: tokens of a block; None: half the model's block_size, at most 64, and no more than there are tokens.
        seed: another draws others.
    """
    ids = ordinary_ids(study)
    most = _most(study)
    if most < 2:
        raise ConfigError(
            "heads: a random block of 2 tokens or more that comes twice needs a block_size of 4 and two different "
            f"tokens; this model has block_size {study.config.block_size} and {len(ids)} of them; give a text (--text)"
        )
    length = min(most, LONGEST) if length is None else length
    if not 2 <= length <= most:
        raise ConfigError(
            f"length: a block of {length} tokens, repeated; expected 2 to {most} (half of block_size "
            f"{study.config.block_size}, and {len(ids)} different tokens)"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(ids), generator=generator)[:length] for _ in range(rows)])
    return ids[drawn.to(ids.device)].repeat(1, 2)


def pattern_score(pattern: Tensor, looks: Tensor) -> Tensor:
    """The mean attention (H), from 0 to 1, that patterns (B, H, T, S) put on the slots that `looks` (B or 1, T, S)
    says, over the queries that have such a slot. Raises DataError where none has.
    """
    looks = looks.expand(len(pattern), -1, -1)
    asked = looks.any(-1)  # (B, T)
    if not asked.any():
        raise DataError("text: no position has what this kind of head looks at; give a longer one, or one that repeats")
    on_them = (pattern * looks[:, None]).sum(-1)  # (B, H, T)
    return on_them.transpose(1, 2)[asked].mean(0)


def copying_score(pattern: Tensor, written: Tensor, ids: Tensor) -> Tensor:
    """How far heads lift the tokens that they look at, (H): 1 above all others, 0.5 as chance has it, 0 below all.

    Args:
        pattern: (B, H, T, S).
        written: what each head adds to the logits of the K tokens that the text is made of, (B, H, T, K), in the order
            of `ids.unique()`.
        ids: (B, S).

    Of every pair of a query and a slot the share of the other tokens that the slot's token is lifted above, weighed
    by attention. The final norm divides all of a query's logits by one number, so that it does not count.
    """
    tokens, which = ids.unique(return_inverse=True)  # (K), (B, S)
    if len(tokens) < 2:
        raise DataError("text: holds one token only, and copying is telling it from others; give a text of several")
    written = written.contiguous()
    ranked = written.sort(-1).values
    below, not_above = (torch.searchsorted(ranked, written, right=right) for right in (False, True))
    share = (below + not_above - 1) / (2 * (len(tokens) - 1))  # (B, H, T, K); equal ones share their ranks
    looked_at = pattern @ torch.nn.functional.one_hot(which, len(tokens)).to(pattern.dtype)[:, None]  # (B, H, T, K)
    return (looked_at * share.to(pattern.dtype)).sum(-1).mean((0, 2))


def head_scores(study: Access, kind: str, text: Text | None = None, *, offset: int = OFFSET, seed: int = 0) -> Result:
    """How much each head is of one kind: layer x head, from 0 to 1.

    Args:
        study: see `Study`.
        kind: previous, duplicate, induction, current, first, offset or copying.
        text: what the heads look at; None: random blocks that come twice, see `repeated_block`.
        offset: tokens back, for the kind offset.
        seed: of the random blocks.

    The notes hold the score of attention that is spread evenly ("even"; 0.5 for copying).
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
    """Every head's score of every kind, and what its absence costs.

    Args:
        study: see `Study`.
        text: what the heads look at; None: random blocks that come twice, see `repeated_block`.
        kinds: see `head_scores`; "previous,induction" or a list of them. None: all that the text has something for; a
            text in which nothing repeats has no duplicate and no induction heads.
        causal: measure too how the loss on that text changes when a head writes nothing (see `ablate`).
        offset: tokens back, for the kind offset.
        seed: of the random blocks.
    """
    text = repeated_block(study, seed=seed) if text is None else text
    scores = _scores(study, KINDS if kinds is None else listed(kinds), text, offset, seed, leave_out=kinds is None)
    return Heads(scores, ablate(study, text, parts="head") if causal else None)


def _scores(
    study: Access, kinds: Sequence[str], text: Text | None, offset: int, seed: int, leave_out: bool = False
) -> dict[str, Result]:
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    ids = repeated_block(study, seed=seed) if text is None else study.ids(text)
    if leave_out and offset == OFFSET and ids.shape[1] <= offset:
        notice(f"no offset scores: the text has {ids.shape[1]} tokens, and offset is {offset}")
        kinds = [kind for kind in kinds if kind != "offset"]
    if "offset" in kinds and not 0 <= offset < ids.shape[1]:
        raise ConfigError(
            f"offset: {offset} tokens back, and the text has {ids.shape[1]}; expected 0 or more and less than the text "
            "has, or --kinds (kinds=) without offset"
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
                notice(f"no {kind} scores: no token of this text has one that such a head would look at")
                continue
            if not looks.any():
                raise DataError(
                    f"text: none of its {ids.shape[1]} tokens has one that a {kind} head would look at; give a longer "
                    "text, or one that repeats, or leave the kind out of --kinds (kinds=)"
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
    """By kind: layer x head."""
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
