"""Report data -> one HTML file: JSON, a style sheet and plain scripts.

The data is untrusted: texts of tokens, names of runs. So the JSON contains no `<`, scripts create elements without
parsing markup, and a content security policy blocks all loading.
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
    """Render the data of a report (format: docs/study/page.md) as HTML."""
    parts = {
        "title": html.escape(str(data.get("title", "minigpt"))),
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "data": as_json(data),
        "script": "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(
        r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template
    )  # one pass: inserted text is not expanded again


def as_json(data: Any) -> str:
    """Encode as JSON that is safe inside a script element. Raises ValueError for NaN and infinities."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()  # replace lone surrogates
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def packed(array: Any, kind: str) -> dict[str, Any]:
    """Pack an array as {kind, shape, data}: little-endian numbers in C order, zlib, base64.

    Args:
        array: a tensor or an array of any shape.
        kind: u8, u16, u32 or f32.
    """
    values = np.ascontiguousarray(_plain(array), dtype=KINDS[kind])
    data = base64.b64encode(zlib.compress(values.tobytes(), 6)).decode()
    return {"kind": kind, "shape": list(values.shape), "data": data}


def packed_shares(array: Any, kind: str) -> dict[str, Any]:
    """Pack the square roots of numbers from 0 to 1, for precision near 0; maximum error 0.004 (u8), 0.00002 (u16)."""
    most = {"u8": 255, "u16": 65535}[kind]
    return {**packed(np.rint(np.sqrt(_plain(array)) * most), kind), "root": most}


def _plain(array: Any) -> np.ndarray:
    return array.detach().cpu().double().numpy() if isinstance(array, Tensor) else np.asarray(array)


def unpacked(entry: dict[str, Any]) -> np.ndarray:
    """Invert `packed` and `packed_shares`, the latter up to rounding."""
    raw = zlib.decompress(base64.b64decode(entry["data"]))
    values = np.frombuffer(raw, dtype=KINDS[entry["kind"]]).reshape(entry["shape"])
    return (values / entry["root"]) ** 2 if "root" in entry else values
