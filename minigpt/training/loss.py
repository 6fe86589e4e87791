"""The training loss: next-token cross-entropy, plain or compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model.gpt import GPT
from minigpt.model.layers import widen
from minigpt.terminal import notice


def next_token_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of targets (B, T) given ids (B, T)."""
    logits = model(ids)  # (B, T, V)
    return F.cross_entropy(widen(logits).flatten(0, 1), targets.flatten())


def compiled_loss() -> Callable[[GPT, Tensor, Tensor], Tensor]:
    """The loss compiled by torch.compile, or as it is with one line of notice where no compiler works here."""
    compiled = torch.compile(next_token_loss, dynamic=False)
    broken = False

    def compute(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        nonlocal broken
        if not broken:
            try:
                return compiled(model, ids, targets)
            except Exception as error:  # no compiler, or a kernel that does not compile: both come as many types
                if "dynamo" not in type(error).__module__ and "inductor" not in type(error).__module__:
                    raise
                broken = True
                notice(f"torch.compile does not work here ({type(error).__name__}); training goes on uncompiled")
        return next_token_loss(model, ids, targets)

    return compute
