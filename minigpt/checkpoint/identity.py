"""A checkpoint knows its own logits, and what it needs to be opened.

Saving stores the logits of a dozen fixed ids; loading computes them again. A model whose code has changed since, a part
that is another one under the same name, or a file that was edited then is an error, never a different model in silence.
Modules that are not what the config describes, such as a subclass of GPT, are named in the checkpoint.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from minigpt.checkpoint.manifest import read_json
from minigpt.errors import CheckpointError
from minigpt.model.config import TABLES, GPTConfig
from minigpt.model.gpt import GPT, outline
from minigpt.model.modes import evaluating

FILE = "logits.json"
TOKENS = 12
COLUMNS = 12  # of the vocabulary, evenly spaced
# Largest difference as a fraction of the largest logit. Sums in another order, on another CPU, differ by about 1e-6 of
# it; matrix products in TF32 by 1e-3; half precision rounds every layer's result.
TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
ON_A_GPU = 5e-3


def probe(config: GPTConfig, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The fixed ids (1, T) and the columns (K) of the vocabulary whose logits are stored."""
    assert config.vocab_size is not None
    ids = torch.arange(1, min(TOKENS, config.block_size) + 1, device=device) * 7919 % config.vocab_size
    columns = torch.arange(min(COLUMNS, config.vocab_size), device=device) * (config.vocab_size // COLUMNS or 1)
    return ids[None], columns


@torch.no_grad()
def logits_of(model: GPT, weights: dict[str, Tensor] | None = None) -> list[list[float]]:
    """The probe's logits, (T, K), in evaluation mode; with these weights in place of the model's own if given."""
    ids, columns = probe(model.config, model.device)
    with evaluating(model), torch.autocast(ids.device.type, enabled=False), _eager():
        logits = model(ids) if weights is None else functional_call(model, weights, (ids,))
    return logits[0][:, columns].double().cpu().tolist()


def _eager() -> AbstractContextManager[Any]:
    """Context manager: compiled blocks run eagerly. The compiler takes a second to import, so only if it is in use."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def check_logits(model: GPT, folder: Path) -> None:
    """Raise CheckpointError if a loaded model does not compute the logits that were stored with it.

    Folders without stored logits, such as those of Hugging Face or of older versions, are not checked.
    """
    path = folder / FILE
    if not path.is_file():
        return
    stored = read_json(path).get("logits")
    found = torch.tensor(logits_of(model), dtype=torch.float64)
    try:
        expected = torch.tensor(stored, dtype=torch.float64)
        assert expected.shape == found.shape
    except (TypeError, ValueError, RuntimeError, AssertionError):
        raise CheckpointError(f"{path}: does not hold the logits of this model; copy the folder again") from None
    if not bool(torch.isfinite(expected).all()):
        return  # saved while the model computed no numbers
    allowed = TOLERANCE.get(model.unembed.weight.dtype, 0.2)
    if model.device.type != "cpu":
        allowed = max(allowed, ON_A_GPU)
    difference = float((found - expected).abs().max())
    if not difference <= allowed * max(1.0, float(expected.abs().max())):
        raise CheckpointError(
            f"{folder}: this is not the model that was saved: its logits differ by up to {difference:.3g}. The code of "
            f"a plug-in, a part or minigpt has changed since, or a file was edited; use the code that trained it. If "
            f"you changed the weights yourself, delete {FILE}"
        )


def to_store(model: GPT, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What logits.json holds: ids, columns and logits of a model with these weights, which may be on another device."""
    if any(weights[name] is not parameter for name, parameter in model.named_parameters() if name in weights):
        first = next(iter(weights.values()))
        if type(first) is not type(model.unembed.weight.data) or first.device != model.device:
            from minigpt.checkpoint.filling import filled_model

            model = filled_model(model.config, weights, "model", dtype=first.dtype, device="cpu").eval()
    ids, columns = probe(model.config)
    values = logits_of(model, weights)
    finite = [[value if math.isfinite(value) else None for value in row] for row in values]
    return {"ids": ids[0].tolist(), "columns": columns.tolist(), "logits": finite}


def needs_of(model: GPT) -> dict[str, Any]:
    """What opening a model needs besides its config: registered parts with their modules, and classes of its own."""
    needs: dict[str, Any] = {}
    parts = {f"{field} '{name}'": table.rows[name].module for field, (table, name) in _chosen(model.config).items()}
    if plugins := {part: module for part, module in parts.items() if module is not None}:
        needs["parts"] = plugins
    if others := differences(model):
        needs["classes"] = others
    return needs


def _chosen(config: GPTConfig) -> dict[str, Any]:
    return {field: (table, str(getattr(config, field))) for field, table in TABLES.items()}


def differences(model: GPT) -> list[str]:
    """Modules whose class is not the one that the config describes, such as "trunk.blocks.0.mlp: mine.MLP"."""
    own = {name: type(module) for name, module in model.named_modules()}
    described = {name: type(module) for name, module in outline(model.config).named_modules()}
    found = []
    for name in sorted(own.keys() | described.keys()):
        ours, theirs = own.get(name), described.get(name)
        if ours is not theirs and not (ours and ours.__name__ == f"FSDP{theirs.__name__ if theirs else ''}"):
            what = f"{ours.__module__}.{ours.__qualname__}" if ours else "nothing"
            found.append(f"{name or 'the model'}: {what}")
    return found


def refuse_other_classes(needs: Any, where: Path) -> None:
    """Raise CheckpointError for a checkpoint whose model had classes that its config does not describe."""
    classes = needs.get("classes") if isinstance(needs, dict) else None
    if classes:
        listed = ", ".join(map(str, classes[:3])) + (f" and {len(classes) - 3} more" if len(classes) > 3 else "")
        raise CheckpointError(
            f"{where}: its model had modules of other classes ({listed}); give load(path, model=...) a function that "
            f"makes such a model from a GPTConfig"
        )
