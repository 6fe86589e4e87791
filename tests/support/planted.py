"""A model whose weights are written by hand, so that it is known what each head does."""

from __future__ import annotations

import torch

from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT

PREVIOUS, INDUCTION = (0, 1), (1, 2)


def induction_model(
    V: int = 16,
    T: int = 24,
    heads: int = 3,
    previous: tuple[int, int] = PREVIOUS,
    induction: tuple[int, int] = INDUCTION,
) -> GPT:
    """Two layers and no MLP to speak of. Head L0H1 (`previous`) copies the token before into channels of its own, and
    head L1H2 (`induction`) looks for the place whose token before is the current one and raises the token there. The
    other heads are empty: they look at everything alike and write nothing.

    The stream: V channels for the token, T for the position, V for the token before.
    """
    width = max(V, T)
    config = GPTConfig(
        preset="gpt2", norm="rmsnorm", bias=False, tie_embeddings=False, vocab_size=V, block_size=T,
        n_layer=2, n_head=heads, n_embd=2 * V + T, head_dim=width,
    )  # fmt: skip
    model = GPT(config).eval()
    token, place, before = slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T)

    def write(layer: int, head: int, query: torch.Tensor, key: torch.Tensor, goes: slice) -> None:
        attn = model.trunk.blocks[layer].attn
        q, k, v = (attn.qkv.weight[(part * heads + head) * width :][:width] for part in range(3))
        q.copy_(query)
        k.copy_(key)
        v[:V, token] = torch.eye(V)
        attn.proj.weight[goes, head * width : head * width + V] = torch.eye(V)

    def reads(channels: slice, rows: torch.Tensor) -> torch.Tensor:  # (D, C)
        matrix = torch.zeros(width, 2 * V + T)
        matrix[: len(rows), channels] = rows
        return matrix

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight") and "norm1" not in name and "norm2" not in name:
                parameter.zero_()
        model.trunk.embed.weight[:, token] = torch.eye(V)
        model.trunk.position.weight[:, place] = torch.eye(T)
        model.unembed.weight[:, token] = torch.eye(V)
        one_on = torch.eye(T).roll(1, 0)  # a key at p answers to the query at p + 1
        one_on[0] = 0
        write(*previous, reads(place, 4 * torch.eye(T)), reads(place, 4 * one_on), before)
        write(*induction, reads(token, 8 * torch.eye(V)), reads(before, 8 * torch.eye(V)), token)
    return model
