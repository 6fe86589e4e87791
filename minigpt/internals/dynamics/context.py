"""What a model gains from context: loss by position, and the in-context score.

Both use fixed windows of held-out text, so that checkpoints can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text

if TYPE_CHECKING:
    from minigpt.data.shards import Corpus

TOKENS = 4096  # default number of tokens in all windows
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 4096, 2**25  # limits per forward pass
EARLY, LATE, WIDTH = 0.1, 0.9, 0.1  # centres and width of the ranges of the in-context score, as shares of the context


def held_out_windows(corpus: Corpus, length: int, tokens: int = TOKENS) -> Tensor:
    """Read fixed windows (B, length), evenly spaced over the validation split of a corpus.

    Args:
        corpus: the corpus; if its validation split is shorter than a window, the training split is used.
        length: T, tokens per window.
        tokens: maximum tokens of all windows; there is at least one window.
    """
    stream = corpus.val if len(corpus.val) >= length else corpus.train
    count = max(1, min(tokens, len(stream)) // length)
    starts = np.linspace(0, len(stream) - length, count).astype(np.int64)
    return torch.from_numpy(stream.read(starts, length))


def held_out(study: Access, tokens: int = TOKENS) -> Tensor:
    """`held_out_windows` (B, block_size) of the training corpus of the study's run.

    Raises ConfigError if the study has no run, and DataError if the corpus has changed.
    """
    from minigpt.evaluation.text import corpus_of

    if study.run is None:
        raise ConfigError("text: this study has no run and thus no corpus; give a text or token ids (B, T)")
    return held_out_windows(corpus_of(study.run), study.config.block_size, tokens)


def in_parts(study: Access, ids: Tensor) -> tuple[Tensor, ...]:
    """Split ids (B, T) by rows into parts that are small enough for one forward pass of a study."""
    tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // study.model.vocab_size)
    return ids.split(max(1, tokens // ids.shape[1]))


def losses(study: Access, text: Text | None = None) -> Tensor:
    """Loss in nats of every token except the first, (B, T - 1); None: on `held_out`."""
    ids = study.ids(held_out(study) if text is None else text)
    return torch.cat([study.losses(part) for part in in_parts(study, ids)])


def loss_by_position(study: Access, text: Text | None = None) -> Result:
    """Measure the loss at each position of the context, in nats, averaged over the rows of the text.

    Args:
        study: the study of the model.
        text: rows of equal length; None: windows of the validation split of the run's corpus.

    Returns:
        A result with the axis position; position 1 is the second token, which is predicted from one token.
    """
    found = losses(study, text)
    labels = [str(position) for position in range(1, found.shape[1] + 1)]
    return Result(
        "loss by position",
        found.mean(0).cpu().numpy(),
        (Axis("position", labels),),
        "nats",
        {"rows": len(found), "mean": float(found.mean())},
    )


def in_context_score(study: Access, text: Text | None = None) -> Result:
    """How many nats per token costs less late in the context than early (Olsson et al. 2022, arXiv 2209.11895).

    The paper takes the loss of the 500th token minus the 50th. Here it is the mean loss around 90 % of context minus
    the mean around 10 %, so that it is defined for every length. More negative means more in-context learning.

    Args:
        study: the study of the model.
        text: rows of equal length; None: windows of the validation split of the run's corpus.

    Returns:
        A result with the axis loss: "early", "late", "score" (late - early).
    """
    return score_of(losses(study, text))


def score_of(losses: Tensor) -> Result:
    """Compute the in-context score from losses (B, T - 1); see `in_context_score`."""
    length = losses.shape[1] + 1
    by_position = losses.mean(0)  # entry i is position i + 1
    early, late = (
        float(by_position[begin - 1 : end].mean()) for begin, end in (_around(EARLY, length), _around(LATE, length))
    )
    where = {name: "{}-{}".format(*_around(share, length)) for name, share in (("early", EARLY), ("late", LATE))}
    axis = Axis("loss", ["early", "late", "score"])
    return Result("in-context score", np.array([early, late, late - early]), (axis,), "nats", where)


def _around(share: float, length: int) -> tuple[int, int]:
    """First and last position of the range around `share` of a context of `length` tokens; position 0 has no loss."""
    middle, half = share * (length - 1), WIDTH / 2 * (length - 1)
    first = min(max(1, round(middle - half)), length - 1)
    return first, max(first, min(length - 1, round(middle + half)))
