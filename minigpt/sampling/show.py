"""The top candidates of a token through all processors, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minigpt.sampling.loop.loop import Event

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer

WIDEST = 18  # maximum number of characters shown of a token


def show_work(event: Event, tokenizer: Tokenizer) -> str:
    """Format the candidates for one token as a table: one row per candidate, one column per processor.

    A column shows the probabilities after a processor; the first column is the model's distribution. The last two lines
    show how many tokens are still possible and how many the processor removed. An arrow marks the chosen token.
    """
    chosen, work = event.token, event.work
    assert chosen is not None and work
    tokens = list(work[0].probabilities)
    labels = {token: _label(tokenizer, token) for token in tokens}
    margin = max(map(len, [*labels.values(), "possible"]))
    widths = [max(9, len(stage.name)) for stage in work]
    lines = [" " * (margin + 3) + "  ".join(f"{s.name:>{w}}" for s, w in zip(work, widths, strict=True))]
    for token in tokens:
        arrow = "->" if token == chosen else "  "
        cells = [_cell(stage.probabilities[token], width) for stage, width in zip(work, widths, strict=True)]
        lines.append(f"{arrow} {labels[token]:{margin}}" + "  ".join(cells))
    for name, values in (("possible", [s.possible for s in work]), ("removed", [s.removed for s in work])):
        cells = [f"{value:>{width},}" for value, width in zip(values, widths, strict=True)]
        lines.append(f"   {name:{margin}}" + "  ".join(cells))
    return "\n".join(lines) + "\n"


def _cell(probability: float, width: int) -> str:
    return " " * (width - 1) + "-" if probability == 0 else f"{probability:>{width}.4f}"


def _label(tokenizer: Tokenizer, token: int) -> str:
    text = repr(tokenizer.decode([token]))
    return text if len(text) <= WIDEST else text[: WIDEST - 2] + ".."
