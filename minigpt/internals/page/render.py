"""Report data -> one HTML file: JSON, a style sheet and plain scripts.

The page asks nothing of a network and of a build. What it is given is untrusted: the text of tokens, names of runs. So
the data is JSON in which no `<` occurs, scripts make elements from it without parsing markup, and a policy in the head
lets nothing be loaded.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

PAGE = Path(__file__).parent
SCRIPTS = ("base", "tokens", "attention", "lens", "attribution", "sampler", "next", "charts", "main")
KINDS = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}


def render(data: dict[str, Any]) -> str:
    """The page of a report's data (see docs/study/page.md for what it holds), as HTML."""
    parts = {
        "title": html.escape(str(data.get("title", "minigpt"))),
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "data": as_json(data),
        "script": "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)  # one pass: what is put in stays as it is


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element. Raises ValueError for NaN and infinities."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def packed(array: Any, kind: str) -> dict[str, Any]:
    """An array as {kind, shape, data}: little-endian numbers in C order, zlib, base64.

    Args:
        array: a tensor or an array of any shape.
        kind: u8, u16, u32 or f32.
    """
    values = np.ascontiguousarray(_plain(array), dtype=KINDS[kind])
    data = base64.b64encode(zlib.compress(values.tobytes(), 6)).decode()
    return {"kind": kind, "shape": list(values.shape), "data": data}


def packed_shares(array: Any, kind: str) -> dict[str, Any]:
    """Numbers from 0 to 1 by their square roots, which leaves small ones distinct: u8 to 0.004, u16 to 0.00002."""
    most = {"u8": 255, "u16": 65535}[kind]
    return {**packed(np.rint(np.sqrt(_plain(array)) * most), kind), "root": most}


def _plain(array: Any) -> np.ndarray:
    return array.detach().cpu().double().numpy() if isinstance(array, Tensor) else np.asarray(array)


def unpacked(entry: dict[str, Any]) -> np.ndarray:
    """The array that `packed` or `packed_shares` was given, shares to the precision of their kind."""
    raw = zlib.decompress(base64.b64decode(entry["data"]))
    values = np.frombuffer(raw, dtype=KINDS[entry["kind"]]).reshape(entry["shape"])
    return (values / entry["root"]) ** 2 if "root" in entry else values
