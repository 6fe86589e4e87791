"""The parts of docs/sampling.md that the code tells: the table of filters, from their docstrings, orders, and names.

python tests/support/catalogue.py    # write them into the page
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path

from minigpt.sampling.settings.config import FIELDS
from minigpt.sampling.settings.names import NAMES
from minigpt.sampling.settings.orders import ORDERS
from minigpt.sampling.settings.shape import Shape, row

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"


def filters() -> str:
    """A row for each field that makes a filter."""
    lines = ["| fields | class | what it does | source | off | when |", "|---|---|---|---|---|---|"]
    for name in Shape.__dataclass_fields__:
        if "filter" in FIELDS[name].metadata:
            file, _, kind = FIELDS[name].metadata["filter"].partition(".")
            made = getattr(importlib.import_module(f"minigpt.sampling.processors.{file}"), kind)
            text = re.sub(r"\s*\n(?!\n)\s*", " ", inspect.getdoc(made) or "")
            told = dict(re.findall(r"(Source|When): (.*?)(?= When: |$)", text))
            what = (inspect.getdoc(made) or "").partition("\n\n")[0].replace("\n", " ")
            off = FIELDS[name].metadata["off"]
            fields = ", ".join(f"`{field}`" for field in row(name))
            cells = [fields, f"`{kind}`", what.rstrip("."), told.get("Source", "").rstrip("."), f"`{off_text(off)}`"]
            lines.append(f"| {' | '.join([*cells, told['When'][0].upper() + told['When'][1:]])} |")
    return "\n".join(lines)


def off_text(off: float | None) -> str:
    return "false" if off is None else f"{off:g}"


def orders() -> str:
    """The steps of every order that has a name."""
    lines = ["```text"]
    for name, order in ORDERS.items():
        lines.append(f"{name} (feed {order.feed})")
        lines += textwrap.wrap(" ".join(order.steps), 120, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, "```"])


def names() -> str:
    """A row for each name that a setting has in another program."""
    lines = ["| there | program | here | taken | what differs |", "|---|---|---|---|---|"]
    for name in NAMES:
        ours = f"`{name.ours}`" if name.ours else "nothing like it"
        lines.append(f"| `{name.other}` | {name.library} | {ours} | {'yes' if name.same else ''} | {name.differs} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with these parts between their marks."""
    for name, text in (("filters", filters()), ("orders", orders()), ("names", names())):
        marks = re.compile(rf"(?<=<!-- {name}: by tests/support/catalogue.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
        assert len(marks.findall(page)) == 1, f"docs/sampling.md has no part <!-- {name}: ... --> ... <!-- end -->"
        page = page.replace(marks.findall(page)[0], text + "\n")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
