"""Score given texts: log-probability and rank of every token.

Used for perplexity, for ranking answers, and for classification by the most likely label. Nothing is sampled and no
processor is applied: these are the model's own probabilities, which sampling reports as `log_prob`.

A model sees at most T = max_context tokens, so a longer text is read in windows that start at 0, stride, 2 stride, ...
and have T tokens each (the last one fewer). A window predicts the token after each of its T tokens. All but the last
`stride` of these were already predicted by the previous window, with more context, and only serve as context here:

    token p is predicted once, from tokens start .. p - 1, where start is 0 for p <= T, and else the smallest multiple
    of the stride with p - start <= T

    T = 4, stride = 2        reads      predicts     (in parentheses: already predicted)
    first window             0 1 2 3     1 2  3 4
    second window            2 3 4 5    (3 4) 5 6
    third window             4 5 6 7    (5 6) 7 8

So from position T on, every token has T - stride + 1 to T tokens of context. Stride T reads each token once, in
adjacent windows, like `minigpt.evaluation`. Stride 1 gives every token the longest possible context, at up to T times
the cost. The default T // 2 is the window of sampling, so a sampled text gets the log-probabilities of its sampling.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minigpt.errors import ConfigError, NonFiniteError
from minigpt.model.modes import evaluating
from minigpt.sampling.draws.decodable import Decodable, device_of
from minigpt.sampling.loop.loop import check_prompts
from minigpt.sampling.processors.processors import NEVER
from minigpt.terminal import progress
from minigpt.tokenizer.base import well_formed

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer

LOGITS_AT_ONCE = 2**24  # 64 MiB of float32; a few times that during computation


@dataclass(frozen=True)
class Score:
    """Scores of a text: one entry per token in every list; None (in `top` an empty list) for tokens without a score."""

    ids: list[int]
    """The whole text, including tokens that are not scored."""
    log_probs: list[float | None]
    """Each token's log-probability given the tokens before it (nats); -inf if the model gives it probability 0."""
    ranks: list[int | None]
    """Each token's rank in the model's distribution: 1 is the most likely; tied tokens share the best rank."""
    top: list[list[tuple[int, float]]]
    """The most likely tokens at each position and their log-probabilities, in descending order; an empty list if none
    were requested."""
    bytes: float | None = None
    """Bytes of the original text that the scored tokens stand for; None if ids were scored without a tokenizer."""

    @property
    def total(self) -> float:
        """Total log-probability of all scored tokens (nats)."""
        return math.fsum(value for value in self.log_probs if value is not None)

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return sum(value is not None for value in self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp(-total / count); NaN if nothing is scored."""
        if not self.count:
            return math.nan
        nats = -self.total / self.count
        return math.exp(nats) if nats < 709 else math.inf  # e^709 is close to the largest float64

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text, comparable between tokenizers; NaN if `bytes` is None or 0."""
        return -self.total / math.log(2) / self.bytes if self.bytes else math.nan


def with_bytes(scores: Sequence[Score], texts: Sequence[str | Sequence[int]], tokenizer: Tokenizer) -> list[Score]:
    """Set `Score.bytes` of each score: how many bytes of the original text the scored tokens stand for.

    These are all bytes of the text, minus the share of tokens that are not scored (the first token, if the tokenizer
    has no end-of-text). Shares are measured by the tokens' byte lengths; special tokens count as 0 bytes.
    """
    lengths = [len(piece) for piece in tokenizer.token_bytes()]
    told = []
    for score, text in zip(scores, texts, strict=True):
        scored: float = sum(
            lengths[id] for id, value in zip(score.ids, score.log_probs, strict=True) if value is not None
        )
        if not tokenizer.verbatim and scored:
            spelled = [id for id in score.ids if lengths[id]]
            given = well_formed(text).encode() if isinstance(text, str) else tokenizer.decode_bytes(spelled)
            scored = scored * len(given) / sum(lengths[id] for id in spelled)
        told.append(replace(score, bytes=float(scored)))
    return told


class Window(NamedTuple):
    """One window over a text: reads tokens start .. stop - 2 and predicts tokens first .. stop - 1."""

    text: int
    start: int
    first: int
    stop: int

    @property
    def width(self) -> int:
        """Number of tokens read."""
        return self.stop - 1 - self.start

    @property
    def skip(self) -> int:
        """Number of tokens read before the first one whose prediction counts."""
        return self.first - 1 - self.start


class _Predicted(NamedTuple):
    """Predictions for a batch of windows, on the host: (B, columns) each, top (B, columns, n)."""

    log_probs: list[list[float]]
    ranks: list[list[int]]
    top_tokens: list[list[list[int]]]
    top_log_probs: list[list[list[float]]]


def score_ids(
    model: Decodable,
    texts: Sequence[Sequence[int]],
    *,
    context: int | Sequence[int] = 1,
    stride: int | None = None,
    top: int = 0,
    max_tokens_a_batch: int = 16384,
    show: bool = False,
) -> list[Score]:
    """Score each token of each text, given the tokens before it. A text's scores do not depend on the other texts.

    The model runs in evaluation mode; the modes of its modules are restored afterwards, also after an error. No
    gradients are recorded and no random numbers are drawn.

    Args:
        model: the model that predicts the next token.
        texts: token ids, at least one per text. To score the first token too, put an end-of-text token before it.
        context: number of tokens at the start that are not scored; one number, or one per text.
        stride: shift of the window, in tokens, in a text longer than the model's context: 1 to max_context (see the
            docstring of this module); None for half the context.
        top: number of most likely tokens to report at each position.
        max_tokens_a_batch: maximum number of tokens per batch, including padding; a batch has at least one window. With
            a large vocabulary batches are smaller, because the size of the logits is limited as well.
        show: show a progress bar.

    Returns:
        One score per text, in the order given.

    Raises:
        ConfigError: an empty text, a token outside the vocabulary, a stride or another number out of range.
        NonFiniteError: the model's logits at a position are not a distribution (NaN, infinite, or -inf for every
            token).
    """
    rows = [_plain(number, text) for number, text in enumerate(texts)]
    check_prompts(rows, model.vocab_size)
    given = _given(context, rows)
    stride = max(1, model.max_context // 2) if stride is None else stride
    _check_number("stride", stride, 1, model.max_context, "the model's context; None uses half of it")
    _check_number("top", top, 0, None, "0 reports none")
    _check_number("max_tokens_a_batch", max_tokens_a_batch, 1)
    top = min(int(top), model.vocab_size)

    windows = [
        window for number, row in enumerate(rows) for window in _windows(number, len(row), given[number], model, stride)
    ]
    scores = [Score(row, [None] * len(row), [None] * len(row), [[] for _ in row] if top else []) for row in rows]
    with (
        torch.no_grad(),
        evaluating(model),
        progress("scoring", sum(window.stop - window.first for window in windows), "tokens", show=show) as bar,
    ):
        done = 0
        for batch in _batches(windows, model.vocab_size, max_tokens_a_batch):
            _enter(scores, batch, _predict(model, batch, rows, top))
            done += sum(window.stop - window.first for window in batch)
            bar.update(done)
    return scores


def _windows(text: int, length: int, given: int, model: Decodable, stride: int) -> Iterator[Window]:
    """The windows that predict tokens given .. length - 1 of a text."""
    first = given
    while first < length:
        start = max(0, -(-(first - model.max_context) // stride) * stride)
        stop = min(length, start + model.max_context + 1)
        yield Window(text, start, first, stop)
        first = stop


def _batches(windows: list[Window], vocab_size: int, max_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar width, widest first, so that an out-of-memory error occurs at the start."""
    batch: list[Window] = []
    width = skip = 0
    for window in sorted(windows, key=lambda window: (-window.width, window.skip)):
        count, both = len(batch) + 1, min(skip, window.skip)
        if batch and (count * width > max_tokens or count * (width - both) * vocab_size > LOGITS_AT_ONCE):
            yield batch
            batch = []
        width, skip = (width, both) if batch else (window.width, window.skip)
        batch.append(window)
    if batch:
        yield batch


def _predict(model: Decodable, batch: list[Window], texts: list[list[int]], top: int) -> _Predicted:
    """The model's predictions at the columns from the batch's smallest `skip` on."""
    width, skip = max(window.width for window in batch), min(window.skip for window in batch)
    # One token more than is read, as targets are the ids shifted by one. Causal attention never sees the padding.
    tokens = [texts[window.text][window.start : window.stop] for window in batch]
    padded = torch.tensor([[*row, *[0] * (width + 1 - len(row))] for row in tokens], device=device_of(model))
    ids, targets = padded[:, :-1], padded[:, 1:]  # (B, T)
    columns = max(1, LOGITS_AT_ONCE // (len(batch) * model.vocab_size))
    cache = model.new_cache(len(batch), width) if skip or width > columns else None
    if skip:
        model.next_logits(ids[:, :skip], cache)
    parts = [
        _look_up(model.all_logits(ids[:, begin : begin + columns], cache), targets[:, begin : begin + columns], top)
        for begin in range(skip, width, columns)
    ]
    return _Predicted(*(torch.cat(part, dim=1).tolist() for part in zip(*parts, strict=True)))


def _look_up(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and ranks of targets (B, T) in logits (B, T, V), and the most likely tokens (B, T, top)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.log_softmax(-1)  # all NaN if the logits are not a distribution
    targets = targets.unsqueeze(-1)  # (B, T, 1)
    likeliest = log_probs.topk(top, dim=-1)
    return (
        log_probs.gather(-1, targets).squeeze(-1),
        1 + (logits > logits.gather(-1, targets)).sum(-1),
        likeliest.indices,
        likeliest.values,
    )


def _enter(scores: list[Score], batch: list[Window], predicted: _Predicted) -> None:
    """Copy the predictions for each window's own tokens into the scores of their texts."""
    least = min(window.skip for window in batch)
    for window, log_probs, ranks, tokens, values in zip(batch, *predicted, strict=True):
        score = scores[window.text]
        own = slice(window.skip - least, window.width - least)
        for place, log_prob in enumerate(log_probs[own], start=window.first):
            if math.isnan(log_prob):
                raise NonFiniteError(
                    f"text {window.text}: the model's logits for position {place} are not a distribution (NaN or "
                    "infinite values, or no possible token); check the model's weights, or score in float32"
                )
            score.log_probs[place] = log_prob
        score.ranks[window.first : window.stop] = ranks[own]
        if score.top:
            score.top[window.first : window.stop] = [
                [(token, value) for token, value in zip(*pair, strict=True) if value > NEVER]
                for pair in zip(tokens[own], values[own], strict=True)
            ]


def _plain(number: int, text: Sequence[int]) -> list[int]:
    """Convert a text's ids to Python ints, from any sequence, array or tensor."""
    try:
        return list(map(operator.index, text))
    except TypeError:
        problem = f"text {number} is {str(text)[:80]!r}; expected a list of token ids; encode it first"
        raise ConfigError(problem) from None


def _given(context: int | Sequence[int], rows: list[list[int]]) -> list[int]:
    """Number of tokens at the start of each text that are not scored, from one number for all or one per text."""
    plain: Any = context.tolist() if hasattr(context, "tolist") else context
    each = list(plain) if isinstance(plain, Iterable) else [plain] * len(rows)
    if len(each) != len(rows):
        raise ConfigError(f"scoring: context has {len(each)} numbers for {len(rows)} texts; give one per text")
    for number, (given, row) in enumerate(zip(each, rows, strict=True)):
        _check_number("context", given, 1, len(row), f"the length of text {number}; a first token cannot be scored")
    return [int(given) for given in each]


def _check_number(name: str, value: int, least: int, most: int | None = None, hint: str = "") -> None:
    """Raise ConfigError unless the value is a whole number in the range."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least or (most and value > most):
        wanted = f"a whole number from {least} to {most}" if most else f"a whole number, {least} or more"
        raise ConfigError(f"scoring: {name} is {value!r}; expected {wanted}{f' ({hint})' if hint else ''}")
