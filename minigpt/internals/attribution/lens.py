"""Logit lens and its variants: the prediction at every place of the residual stream and every token.

    print(study.logit_lens("ROMEO:"))                  rows: points, columns: tokens, cells: most likely next token
    study.logit_lens("ROMEO:", stat="kl")              KL divergence from the model's output at each point, in nats

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") applies the final norm and the unembedding to
an intermediate stream. Other lenses first map the stream to an estimate of the final stream; see
minigpt.internals.attribution.translators.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result, _colour, _shade, _visible
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.decomposition import KINDS, Point, one_text, points
from minigpt.model.explicit import explicit_norm
from minigpt.model.precision import widen

Stat = Literal["top", "probability", "rank", "loss", "entropy", "kl"]
Reader = Callable[[Point, Tensor], Tensor]
"""Maps a stream (B, T, C) at a point to an estimate of the final stream (B, T, C)."""

UNITS = {
    "top": "probability of the most likely token",
    "probability": "probability of the next token",
    "rank": "rank of the next token, 1 = most likely",
    "loss": "loss of the next token in nats",
    "entropy": "entropy in nats",
    "kl": "KL divergence from the model's output in nats",
}
WIDTH = 100  # maximum characters per line of a printed table


@dataclass(repr=False)
class Lens(Result):
    """The result of a lens: points x tokens, with the most likely tokens of each cell."""

    candidates: list[list[list[tuple[str, float]]]] = field(default_factory=list)
    """candidates[row][column]: tokens with their probabilities, most likely first."""
    stat: str = "top"
    """Statistic in `values`; see `logit_lens`."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with "candidates": [row][column] lists of {token, probability}."""
        told = [
            [[{"token": token, "probability": share} for token, share in cell] for cell in row]
            for row in self.candidates
        ]
        return {**super().to_dict(), "stat": self.stat, "candidates": told}

    def _cells(self) -> list[list[str]]:
        """Text of each cell: the most likely token, or the number."""
        if self.stat == "top":
            return [[_visible(cell[0][0]) for cell in row] for row in self.candidates]
        form = {"rank": ".0f", "probability": ".3f"}.get(self.stat, ".2f")
        return [["" if value != value else format(value, form) for value in row] for row in self.values]

    def _shares(self) -> list[list[float]]:
        """Shading of each cell, 0 .. 1."""
        if self.stat in ("top", "probability"):
            return self.values.tolist()
        ends = [value for value in self.values.reshape(-1) if value == value]
        greatest = max(ends, default=0.0) or 1.0
        return [[value / greatest for value in row] for row in self.values]

    def _grid(self) -> str:
        rows, columns = (axis.labels for axis in self.axes)
        heads = [_visible(label.partition(" ")[2]) for label in columns]
        cells, shares = self._cells(), self._shares()
        first = max(map(len, rows))
        width = max(4, *(len(text) + 2 for line in [heads, *cells] for text in line))
        at_once = max(1, (WIDTH - first - 2) // width)
        lines = []
        for begin in range(0, len(columns), at_once):
            part = slice(begin, begin + at_once)
            lines.append(" " * (first + 2) + "".join(f"{head:>{width - 1}} " for head in heads[part]))
            for label, texts, strengths in zip(rows, cells, shares, strict=True):
                row = "".join(
                    f"{text:>{width - 1}}{_shade(share)}"
                    for text, share in zip(texts[part], strengths[part], strict=True)
                )
                lines.append(f"  {label:{first}}{row}".rstrip())
            lines.append("")
        return "\n".join(lines[:-1])

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{html.escape(_visible(label.partition(' ')[2]))}</th>" for label in self.axes[1].labels)
        body = ""
        for label, texts, strengths, tops in zip(
            self.axes[0].labels, self._cells(), self._shares(), self.candidates, strict=True
        ):
            told = ["\n".join(f"{_visible(token)} {share:.3f}" for token, share in cell) for cell in tops]
            cells = "".join(
                f'<td style="background:{_colour(share)}" title="{html.escape(title)}">{html.escape(text)}</td>'
                for text, share, title in zip(texts, strengths, told, strict=True)
            )
            body += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
        caption = html.escape(f"{self.title} ({self.unit})")
        return f"<figure><figcaption>{caption}</figcaption><table><tr><th></th>{heads}</tr>{body}</table></figure>"


def lens_logits(
    study: Access, text: Text, where: Sequence[Point], reader: Reader | None = None
) -> Iterator[tuple[Point, Tensor]]:
    """Yield each point with its logits (B, T, V). At the final point they equal the model's logits bit for bit."""
    ids = study.ids(text)
    _, cache = study.run_with_cache(ids, [point.name for point in where], stop=True)
    norm = study.model.trunk.norm
    for point in where:
        stream = cache[point.name]
        if reader is not None:
            stream = reader(point, stream)
        watch = study.watch()  # edits of the final norm apply here as in the model
        watch.positions = torch.arange(ids.shape[1], device=ids.device)
        with study.running():
            logits = study.model.unembed(explicit_norm(norm, stream, watch, "ln_final."))
        yield point, logits


def logit_lens(
    study: Access,
    text: Text,
    at: str | Iterable[str] = KINDS,
    stat: Stat = "top",
    answer: str | int | None = None,
    *,
    candidates: int = 10,
    reader: Reader | None = None,
) -> Lens:
    """Apply the logit lens: predict the next token from each point of the residual stream.

    Args:
        study: the study of the model.
        text: one text.
        at: points of each block: one or more of resid_pre, resid_mid, resid_post.
        stat: statistic to return. top: the most likely token and its probability. probability, rank (1 = most likely),
            loss (nats): of the actual next token in the text. entropy: of the distribution, in nats. kl: KL(model's
            output || point), in nats.
        answer: use this token instead of the actual next token, at every position.
        candidates: number of most likely tokens to keep for each cell.
        reader: map applied to a stream before the final norm; see minigpt.internals.attribution.translators.

    Returns:
        A result with the axes stream ("0 pre", "0 mid", ...) and token. Without `answer`, values that need a next
        token are NaN at the last position.

    Raises:
        ConfigError: invalid `at` or `stat`.
        DataError: several texts, or an answer that is not exactly one token.
    """
    if stat not in get_args(Stat):
        raise ConfigError(f"stat: {stat!r} is not one of {', '.join(get_args(Stat))}")
    ids, tokens = one_text(study, text)
    where, last = points(study.config, at), points(study.config, "resid_post")[-1]
    targets = torch.full((ids.shape[1],), -1, dtype=torch.int64, device=ids.device)
    if answer is None:
        targets[:-1] = ids[0, 1:]
    else:
        targets[:] = study.token_id(answer)
    [(_, final)] = lens_logits(study, ids, [last])
    output = widen(final[0]).log_softmax(-1)  # (T, V)
    values, found = [], []
    for _, logits in lens_logits(study, ids, where, reader):
        log_p = widen(logits[0]).log_softmax(-1)  # (T, V)
        values.append(statistic(stat, log_p, output, targets).cpu())
        best = log_p.exp().topk(min(candidates, log_p.shape[-1]), -1)
        found.append(
            [
                [(study.token(id), share) for id, share in zip(row, shares, strict=True)]
                for row, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
    kind = getattr(reader, "kind", "logit")
    unit = UNITS[stat] if answer is None else UNITS[stat].replace("the next token", repr(answer))
    axes = (Axis("stream", [point.label for point in where]), Axis("token", tokens))
    return Lens(f"{kind} lens", torch.stack(values).double().numpy(), axes, unit, {}, found, stat)


def statistic(stat: str, log_p: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """One number per position, (T).

    Args:
        stat: see `logit_lens`.
        log_p: log-probabilities (T, V) at a point.
        output: log-probabilities (T, V) of the model's output.
        targets: (T) target ids; -1 for no target, which gives NaN.
    """
    if stat == "top":
        return log_p.max(-1).values.exp()
    if stat == "entropy":
        return -(log_p.exp() * log_p).sum(-1)
    if stat == "kl":
        return (output.exp() * (output - log_p)).sum(-1)
    own = log_p.gather(-1, targets.clamp(min=0)[:, None])  # (T, 1)
    if stat == "rank":
        found = 1.0 + (log_p > own).sum(-1)
    else:
        found = own[:, 0].exp() if stat == "probability" else -own[:, 0]
    return found.masked_fill(targets < 0, torch.nan)
