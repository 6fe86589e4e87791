"""Score given texts: log-probability and rank of every token.

For perplexity, for ranking answers, for classification by the likeliest label. Nothing is sampled and no processor is
applied: these are the model's own probabilities, the same that sampling reports as `log_prob`.

A model sees at most T = max_context tokens, so a longer text is read in windows that begin at 0, stride, 2 stride, ...
and hold T tokens each (the last one fewer). A window predicts the token after each of its tokens, so T tokens, of which
all but the last `stride` were predicted by the window before with more context; those are context only. In short:

    token p is predicted once, from tokens start .. p - 1, where start is 0 for p <= T, and else the smallest multiple
    of the stride with p - start <= T

    T = 4, stride = 2        reads      predicts     those in brackets were predicted before
    first window             0 1 2 3     1 2  3 4
    second window            2 3 4 5    (3 4) 5 6
    third window             4 5 6 7    (5 6) 7 8

From T on every token then has T - stride + 1 to T tokens of context. Stride T reads each token once, in windows side by
side, as `minigpt.evaluation` does; stride 1 gives every token the longest context there is, at up to T times the work;
T // 2, the default, is what sampling shows a model too, so that a sampled text scores what it was sampled with.
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
from minigpt.sampling.draws.decodable import Decodable, device_of
from minigpt.sampling.loop.loop import check_prompts, evaluating
from minigpt.sampling.processors.processors import NEVER
from minigpt.terminal import progress
from minigpt.tokenizer.base import well_formed

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer

LOGITS_AT_ONCE = 2**24  # 64 MiB of float32; a few times that while they are worked on


@dataclass(frozen=True)
class Score:
    """Scores of a text: one entry per token in every list; None (in `top` an empty list) for tokens without a score."""

    ids: list[int]
    """The whole text, given tokens included."""
    log_probs: list[float | None]
    """Each token's log-probability given those before it (nats); -inf where the model rules it out."""
    ranks: list[int | None]
    """Each token's place in the model's distribution: 1 is the likeliest, equals share the best place."""
    top: list[list[tuple[int, float]]]
    """The likeliest tokens at each place and their log-probabilities, falling, as many as were asked for and are
    possible; without any entry if none were asked for."""
    bytes: float | None = None
    """Bytes of the text as given that the scored tokens stand for; None where ids were scored without a tokenizer."""

    @property
    def total(self) -> float:
        """Log-probability of all scored tokens together (nats)."""
        return math.fsum(value for value in self.log_probs if value is not None)

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return sum(value is not None for value in self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp(-total / count); not a number where nothing is scored."""
        if not self.count:
            return math.nan
        nats = -self.total / self.count
        return math.exp(nats) if nats < 709 else math.inf  # e^709 is about the largest float

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the text, comparable between tokenizers; not a number where `bytes` is None or 0."""
        return -self.total / math.log(2) / self.bytes if self.bytes else math.nan


def with_bytes(scores: Sequence[Score], texts: Sequence[str | Sequence[int]], tokenizer: Tokenizer) -> list[Score]:
    """Scores that tell how many bytes of their texts, as these were given, the scored tokens stand for.

    All bytes of the text, less the share that tokens which nothing predicts (the first one, where there is no
    end-of-text) have in the bytes of all tokens' pieces. Special tokens stand for none.
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
    """What one reading of (a part of) a text predicts: tokens first .. stop - 1, from those of start .. stop - 2."""

    text: int
    start: int
    first: int
    stop: int

    @property
    def width(self) -> int:
        """How many tokens are read."""
        return self.stop - 1 - self.start

    @property
    def skip(self) -> int:
        """How many of them are read before the first whose prediction counts."""
        return self.first - 1 - self.start


class _Predicted(NamedTuple):
    """What a batch of windows says of its tokens: (B, columns) each, top (B, columns, n), on the host."""

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
    """Score the tokens of each text, each given those before it. What a text scores does not depend on the others.

    The model is in evaluation mode meanwhile; its modules' modes are restored, after an error too. No gradient is
    recorded, and no random number drawn.

    Args:
        model: what predicts.
        texts: token ids, at least one each. To have a first token scored too, put an end-of-text before it.
        context: how many tokens at the beginning are given and not scored; one number, or one for each text.
        stride: by how many tokens the window moves on in a text longer than the model's context, 1 to max_context (see
            the top of this file); None for half the context.
        top: how many of the likeliest tokens to tell at each place.
        max_tokens_a_batch: most tokens, padding included, that are read together, but a window always is. A large
            vocabulary asks for fewer: the logits in memory are bounded besides.
        show: show a progress bar.

    Returns:
        One score per text, in the order given.

    Raises:
        ConfigError: an empty text, a token outside the vocabulary, a stride or another number out of range.
        NonFiniteError: the model's logits at some place are no distribution (NaN, infinite, or -inf for every token).
    """
    rows = [_plain(number, text) for number, text in enumerate(texts)]
    check_prompts(rows, model.vocab_size)
    given = _given(context, rows)
    stride = max(1, model.max_context // 2) if stride is None else stride
    _check_number("stride", stride, 1, model.max_context, "the model's context; None takes half of it")
    _check_number("top", top, 0, None, "0 tells none")
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
    """The windows in which tokens given .. length - 1 of a text are predicted."""
    first = given
    while first < length:
        start = max(0, -(-(first - model.max_context) // stride) * stride)
        stop = min(length, start + model.max_context + 1)
        yield Window(text, start, first, stop)
        first = stop


def _batches(windows: list[Window], vocab_size: int, max_tokens: int) -> Iterator[list[Window]]:
    """Windows of like width together, the widest first: what is too large for the memory shows at once."""
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
    """What the model says at the columns from the batch's least `skip` on."""
    width, skip = max(window.width for window in batch), min(window.skip for window in batch)
    # One token more than is read: targets are the ids moved by one. Causality hides the padding from what counts.
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
    """(B, T, V) logits, (B, T) targets -> their log-probabilities and ranks (B, T), and the likeliest (B, T, top)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.log_softmax(-1)  # NaN throughout where the logits are no distribution
    targets = targets.unsqueeze(-1)  # (B, T, 1)
    likeliest = log_probs.topk(top, dim=-1)
    return (
        log_probs.gather(-1, targets).squeeze(-1),
        1 + (logits > logits.gather(-1, targets)).sum(-1),
        likeliest.indices,
        likeliest.values,
    )


def _enter(scores: list[Score], batch: list[Window], predicted: _Predicted) -> None:
    """Enter what a batch says of each window's own tokens into the scores of their texts."""
    least = min(window.skip for window in batch)
    for window, log_probs, ranks, tokens, values in zip(batch, *predicted, strict=True):
        score = scores[window.text]
        own = slice(window.skip - least, window.width - least)
        for place, log_prob in enumerate(log_probs[own], start=window.first):
            if math.isnan(log_prob):
                raise NonFiniteError(
                    f"text {window.text}: the model's logits for position {place} are no distribution (NaN or infinite "
                    "values, or no possible token); check the model's weights, or score in float32"
                )
            score.log_probs[place] = log_prob
        score.ranks[window.first : window.stop] = ranks[own]
        if score.top:
            score.top[window.first : window.stop] = [
                [(token, value) for token, value in zip(*pair, strict=True) if value > NEVER]
                for pair in zip(tokens[own], values[own], strict=True)
            ]


def _plain(number: int, text: Sequence[int]) -> list[int]:
    """A text's ids as plain numbers, from any sequence, array or tensor."""
    try:
        return list(map(operator.index, text))
    except TypeError:
        problem = f"text {number} is {str(text)[:80]!r}; expected a list of token ids: encode it first"
        raise ConfigError(problem) from None


def _given(context: int | Sequence[int], rows: list[list[int]]) -> list[int]:
    """How many tokens of each text are given, from one number for all or one for each."""
    plain: Any = context.tolist() if hasattr(context, "tolist") else context
    each = list(plain) if isinstance(plain, Iterable) else [plain] * len(rows)
    if len(each) != len(rows):
        raise ConfigError(f"scoring: context has {len(each)} numbers for {len(rows)} texts; give one for each")
    for number, (given, row) in enumerate(zip(each, rows, strict=True)):
        _check_number("context", given, 1, len(row), f"the tokens of text {number}; nothing predicts a first token")
    return [int(given) for given in each]


def _check_number(name: str, value: int, least: int, most: int | None = None, hint: str = "") -> None:
    """Raise ConfigError for what is no whole number in the range."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least or (most and value > most):
        wanted = f"a whole number from {least} to {most}" if most else f"a whole number, {least} or more"
        raise ConfigError(f"scoring: {name} is {value!r}; expected {wanted}{f' ({hint})' if hint else ''}")
