"""An HTML report about one text: token losses, attention, lenses, logit attribution and sampling.

It also shows the model card and the training curves.

    study.report("ROMEO: But soft").save("report.html")
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.runs import read_best, read_metrics, step_of
from minigpt.durable import write_text
from minigpt.errors import CheckpointError, ConfigError, MinigptError
from minigpt.internals.access.access import ANALYSES, Access
from minigpt.internals.access.axes import head_labels
from minigpt.internals.access.result import Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.translators import MADE_BY, Translators, saved_lens
from minigpt.internals.causal.ablation import ablate
from minigpt.internals.causal.effect import MEASURES
from minigpt.internals.causal.heads import heads, kinds_of, repeated_block, repeats_fit
from minigpt.internals.dynamics.snapshot import KINDS
from minigpt.internals.page import views
from minigpt.internals.page.render import as_json, render, unpacked
from minigpt.model.cost import cost_of
from minigpt.terminal import notice

VERSION = 1  # version of the data format
MOST = 256  # default maximum of tokens; the page's size grows with their square
POINTS = 400  # maximum points of a curve
CURVES = ("train/loss", "val/loss", "lr", "grad_norm")  # in addition to all internals/* metrics
SCORES = ("previous", "duplicate", "induction", "current", "first", "copying")
ROWS = 2  # random texts for the head scores


@dataclass
class Report:
    """A page and its data (format: docs/study/page.md). Notebooks display the page."""

    data: dict[str, Any]

    def html(self) -> str:
        """Return the page as one HTML string."""
        return render(self.data)

    def save(self, path: str | Path) -> Path:
        """Write the page (.html) or its data (.json), by the extension of the path."""
        path = Path(path)
        if path.suffix not in (".html", ".json"):
            raise ConfigError(f"{path}: unknown extension; expected .html or .json")
        write_text(path, self.html() if path.suffix == ".html" else json.dumps(self.data, allow_nan=False))
        return path

    def _repr_html_(self) -> str:
        page = html.escape(self.html())
        return f'<iframe sandbox="allow-scripts" style="width:100%;height:50rem;border:0" srcdoc="{page}"></iframe>'


def report(study: Access, text: Text, *, results: Sequence[Result] = (), most: int = MOST) -> Report:
    """Create the report about one text.

    Args:
        study: see `Study`.
        text: one text; cut to the first `most` tokens and to block_size.
        results: additional results with two axes, shown as heat maps.
        most: maximum number of tokens on the page.

    Raises:
        ConfigError: a result does not have two axes; also every error of `Study.ids`.
    """
    wrong = next((result for result in results if len(result.axes) != 2), None)
    if wrong is not None:
        raise ConfigError(f"results: {wrong.title!r} has {len(wrong.axes)} axes; a heat map needs two")
    whole = study.tokenizer.prompt_ids(text) if isinstance(text, str) else study.ids(text)
    if isinstance(whole, Tensor):
        if len(whole) > 1:
            raise ConfigError(f"text: {len(whole)} texts; give one text at a time")
        whole = whole[0].tolist()
    ids = study.ids(whole[: min(most, study.config.block_size)])[0]
    if len(ids) < len(whole):
        notice(f"the page shows the first {len(ids)} of {len(whole)} tokens")
    folder = folder_of(study)
    missing: dict[str, str] = {}

    def view(title: str, draw: Callable[[], Any], errors: type[Exception] = MinigptError) -> Any:
        """What a view shows; None, with the reason in `missing`, if it does not exist for this model."""
        try:
            return draw()
        except errors as error:
            missing[title] = " ".join(str(error).split()) or type(error).__name__
            notice(f"the page leaves out {title}: {missing[title]}")
            return None

    with study.running():
        logits, cache = views.run_of(study, ids)
        data: dict[str, Any] = {
            "v": VERSION,
            "title": folder.name if folder else "minigpt",
            "model": card(study),
            "tokens": [_token(study, id) for id in ids.tolist()],
            "attn": {
                **views.attention(torch.stack([cache["pattern", layer][0] for layer in range(study.config.n_layer)])),
                "badges": view("head scores", lambda: badges(study, ids)) or {},
            },
            "lens": {"kinds": view("lenses", lambda: lenses(study, ids)) or {}},
            "dla": view("logit attribution", lambda: views.attribution(study, cache, logits, ids)),
            "next": views.next_token(study, logits[-1], ids),
            "grids": [_grid(result) for result in results],
        }
        if len(ids) > 1:
            data["loss"] = views.loss(logits, ids)
        for name in ANALYSES:
            made = view(name, lambda name=name: ANALYSES[name](study, ids), Exception)  # type: ignore[misc]
            if made is not None and len(made.axes) == 2:
                data["grids"].append(_grid(made))
    data["missing"] = missing
    series = curves(study)
    if series:
        data["runs"] = {"series": series, "kinds": {name: [kind.title, kind.unit] for name, kind in KINDS.items()}}
    data["pieces"] = {id: _token(study, id)["s"] for id in sorted(_mentioned(data))}
    return Report(json.loads(as_json(data)))


def card(study: Access) -> dict[str, Any]:
    """Model card for the head of the page."""
    config, run = study.config, study.run
    made: dict[str, Any] = {
        "preset": config.preset,
        "params": cost_of(config).parameters,
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size")},
        "vocab": config.vocab_size,
        **{name: getattr(config, name) for name in ("norm", "position", "activation")},
    }
    if run is None:
        return made
    made["tokenizer"] = study.tokenizer.kind
    source = (run.config.get("data") or {}).get("source") if run.config else None
    if source:
        made["data"] = "/".join(Path(str(source)).parts[-2:])
    folder = folder_of(study)
    if folder is not None:
        made["step"] = step_of(run.path)
        best = read_best(folder)
        if best is not None and best.step == made["step"]:
            made["val_loss"] = best.loss
    return made


def lenses(study: Access, ids: Tensor) -> dict[str, Any]:
    """The logit lens, and the fitted lenses in the run folder."""
    made = {"logit": views.lens(study, ids)}
    for kind in MADE_BY if folder_of(study) else ():
        path = saved_lens(study, kind)
        if path.is_file():
            try:
                made[kind] = views.lens(study, ids, Translators.load(path, study))
            except CheckpointError as error:
                notice(f"{kind} lens skipped: {error}")
    return made


def curves(study: Access) -> dict[str, list[list[float]]]:
    """Metrics of a run from metrics.jsonl, by name: steps and values, thinned to POINTS points."""
    folder = folder_of(study)
    found: dict[str, tuple[list[float], list[float]]] = {}
    losses = (study.run.config.get("losses") or {}) if study.run is not None and study.run.config else {}
    added = {f"{split}/{name}" for name in losses for split in ("train", "val")}
    for row in read_metrics(folder / "metrics.jsonl") if folder else []:
        for name, value in row.items():
            wanted = name in CURVES or name.startswith("internals/") or name in added
            if wanted and isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {name: [_thinned(steps), _thinned(values)] for name, (steps, values) in found.items()}


def _thinned(values: list[float]) -> list[float]:
    every = -(-len(values) // POINTS)
    return values if every < 2 else [*values[:-1:every], values[-1]]


def badges(study: Access, ids: Tensor) -> dict[str, dict[str, float]]:
    """Of each head what it looks at in a random text that repeats, from 0 to 1, if the model holds one, and, where no
    edits are open, what its absence costs on this text, in nats per token.
    """
    names = head_labels(study.config)
    values: dict[str, list[float]] = {}
    if repeats_fit(study):
        wanted = [kind for kind in SCORES if kind in kinds_of(study)]
        scores = heads(
            study,
            repeated_block(study, rows=ROWS),
            kinds=wanted,
            causal=False,
        ).scores
        values = {kind: result.values.reshape(-1).tolist() for kind, result in scores.items()}
    if len(ids) > 1 and not study.watch().edits:
        values["effect"] = ablate(study, ids, parts="head").values[:, MEASURES.index("loss")].tolist()
    return {name: {kind: round(each[i], 6) for kind, each in values.items()} for i, name in enumerate(names)}


def _grid(result: Result) -> dict[str, Any]:
    rows, columns = result.axes
    return {
        "name": result.title,
        "unit": result.unit,
        "x": columns.labels,
        "y": rows.labels,
        "xname": columns.name,
        "yname": rows.name,
        "values": result.to_dict()["values"],
    }


def _token(study: Access, id: int) -> dict[str, Any]:
    """A token as shown on the page; bytes that are not valid UTF-8 by themselves are shown in hex."""
    text, tokenizer = study.token(id), views.tokenizer_of(study)
    if "\ufffd" in text and tokenizer is not None:
        text = f"<{tokenizer.pieces[id].hex(' ').upper()}>"
    return {"id": id, "s": text}


def _mentioned(data: dict[str, Any]) -> set[int]:
    """All token ids that appear in a view."""
    packs = [data["next"]["ids"], *(kind["ids"] for kind in data["lens"]["kinds"].values())]
    packs += [data["loss"]["ids"]] if "loss" in data else []
    dla = data["dla"] or {"answer": [], "versus": []}
    lists = [dla["answer"], dla["versus"], *(kind["target"] for kind in data["lens"]["kinds"].values())]
    return {int(id) for pack in packs for id in unpacked(pack).reshape(-1)} | {id for ids in lists for id in ids}


def folder_of(study: Access) -> Path | None:
    """Run folder of the study's checkpoint; None if the model has no run."""
    path = None if study.run is None else study.run.path
    return path.parent.parent if path is not None and path.parent.name == "checkpoints" else None
