"""Clean text in pieces; the result does not depend on where the pieces are cut."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

from minigpt.data.config import CleanConfig
from minigpt.data.reading import Piece

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# Text may be cut before these characters without changing its normal form or its lower case: none of them combines with
# the preceding character, and the lower case of a capital sigma on either side does not depend on the other side.
_BORDER = re.compile(
    r"(?=[\t-\r \u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3])|(?<=[A-Za-z0-9])(?=[A-Za-z0-9])"
)

_BLOCK_TAG = re.compile(
    "address|article|aside|blockquote|br|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li|main|nav|"
    "ol|p|pre|section|table|td|th|title|tr|ul"
)
_HIDDEN = ("script", "style")


def is_identity(config: CleanConfig) -> bool:
    """Whether the config leaves the text unchanged (documents may still be dropped)."""
    return config.normalize == "none" and not (config.strip_html or config.lowercase or config.strip_control)


def clean(pieces: Iterable[Piece], config: CleanConfig) -> Iterator[Piece]:
    """Clean a stream of documents.

    The order is: HTML, Unicode normalization, lower case, control characters. This function does not drop documents.
    """
    if is_identity(config):
        yield from pieces
        return
    cleaner = _Cleaner(config)
    for text, ends in pieces:
        yield Piece(cleaner.feed(text) + (cleaner.finish() if ends else ""), ends)


class _Cleaner:
    """Cleaning state that is carried from one piece of a document to the next."""

    def __init__(self, config: CleanConfig) -> None:
        self.config = config
        self.html = _TextOfHtml() if config.strip_html else None
        self.bordered = config.normalize != "none" or config.lowercase
        self.held: list[str] = []

    def feed(self, text: str) -> str:
        if self.html:
            text = self.html.take(text)
        if self.bordered:
            border = _last_border(text)
            if not border:
                self.held.append(text)
                return ""
            text, self.held = "".join([*self.held, text[:border]]), [text[border:]]
        return self._transform(text)

    def finish(self) -> str:
        text = "".join(self.held) + (self.html.finish() if self.html else "")
        self.held = []
        return self._transform(text)

    def _transform(self, text: str) -> str:
        if self.config.normalize != "none":
            text = unicodedata.normalize(self.config.normalize, text)
        if self.config.lowercase:
            text = text.lower()
        if self.config.strip_control:
            text = _CONTROL.sub("", text)
        return text


def _last_border(text: str) -> int:
    """Last position at which `text` may be cut, 0 if there is none."""
    return next((place for place in range(len(text) - 1, 0, -1) if _BORDER.match(text, place)), 0)


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.begin()

    def begin(self) -> None:
        self.reset()
        self.out: list[str] = []
        self.hidden = 0
        self.at_line_start = True

    def take(self, text: str) -> str:
        self.feed(text)
        out, self.out = "".join(self.out), []
        return out

    def finish(self) -> str:
        self.close()
        out = "".join(self.out)
        self.begin()
        return out

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in _HIDDEN
        self._line(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self._line(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _HIDDEN and self.hidden > 0
        self._line(tag)

    def handle_data(self, data: str) -> None:
        if data and not self.hidden:
            self.out.append(data)
            self.at_line_start = data.endswith("\n")

    def _line(self, tag: str) -> None:
        if _BLOCK_TAG.fullmatch(tag) and not self.at_line_start and not self.hidden:
            self.out.append("\n")
            self.at_line_start = True
