"""What a model gains from context: loss by position, and the in-context score.

Both are measured on windows of held-out text that stay the same, so that they can be compared between checkpoints.
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

TOKENS = 4096  # in all windows together
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 4096, 2**25  # at most, in a forward
EARLY, LATE, WIDTH = 0.1, 0.9, 0.1  # of the context: where the in-context score looks, and how far around


def held_out_windows(corpus: Corpus, length: int, tokens: int = TOKENS) -> Tensor:
    """Windows (B, length) evenly spaced over a corpus's validation split, the same every time.

    Args:
        corpus: where its validation split is shorter than a window, the training split stands for it.
        length: T, tokens in a window.
        tokens: in all windows together, at most, but at least one window.
    """
    stream = corpus.val if len(corpus.val) >= length else corpus.train
    count = max(1, min(tokens, len(stream)) // length)
    starts = np.linspace(0, len(stream) - length, count).astype(np.int64)
    return torch.from_numpy(stream.read(starts, length))


def held_out(study: Access, tokens: int = TOKENS) -> Tensor:
    """`held_out_windows` (B, block_size) of the corpus that the study's run was trained on.

    Raises ConfigError for a study that is of no run, DataError where that text is another by now.
    """
    from minigpt.evaluation.text import corpus_of

    if study.run is None:
        raise ConfigError("this study is of a model alone, which has no text of its own; give one, or token ids (B, T)")
    return held_out_windows(corpus_of(study.run), study.config.block_size, tokens)


def in_parts(study: Access, ids: Tensor) -> tuple[Tensor, ...]:
    """Ids (B, T) in parts of whole rows that are small enough for a watched forward."""
    tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // study.model.vocab_size)
    return ids.split(max(1, tokens // ids.shape[1]))


def losses(study: Access, text: Text | None = None) -> Tensor:
    """Nats of each token after those before it, (B, T - 1); None: of `held_out`."""
    ids = study.ids(held_out(study) if text is None else text)
    return torch.cat([study.losses(part) for part in in_parts(study, ids)])


def loss_by_position(study: Access, text: Text | None = None) -> Result:
    """How well each position of the context is predicted: nats, mean over the text's rows.

    Args:
        study: of the model.
        text: rows of equal length; None: windows of the run's own validation split.

    Returns:
        Axis position: 1 is the second token, which sees one before it.
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

    There it is the 500th token's loss minus the 50th's; here that of the tokens around nine tenths of the context minus
    that of those around one tenth, so that it is defined for every length. The more is learned from the context, the
    further below zero.

    Args:
        study: of the model.
        text: rows of equal length; None: windows of the run's own validation split.

    Returns:
        Axis loss: "early", "late", "score" (late - early).
    """
    return score_of(losses(study, text))


def score_of(losses: Tensor) -> Result:
    """The in-context score of losses (B, T - 1); see `in_context_score`."""
    length = losses.shape[1] + 1
    by_position = losses.mean(0)  # entry i: of position i + 1
    early, late = (
        float(by_position[begin - 1 : end].mean()) for begin, end in (_around(EARLY, length), _around(LATE, length))
    )
    where = {name: "{}-{}".format(*_around(share, length)) for name, share in (("early", EARLY), ("late", LATE))}
    axis = Axis("loss", ["early", "late", "score"])
    return Result("in-context score", np.array([early, late, late - early]), (axis,), "nats", where)


def _around(share: float, length: int) -> tuple[int, int]:
    """The first and last position around a share of a context of so many tokens; position 0 has no loss."""
    middle, half = share * (length - 1), WIDTH / 2 * (length - 1)
    first = min(max(1, round(middle - half)), length - 1)
    return first, max(first, min(length - 1, round(middle + half)))
