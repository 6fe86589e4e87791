"""OV and QK circuits: what heads can do according to their weights.

(Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, transformer-circuits.pub/2021/framework)

    OV    attended token -> what the head adds to the logit of each token        W_E W_V W_O W_U
    QK    query token, key token -> attention score                              W_E W_Q W_K^T W_E^T

Both are vocabulary x vocabulary matrices of rank D, stored as two thin factors. The weights of the norms and the
centring of LayerNorm are folded in. Not included, because it depends on the input: positions in the stream, the layers
in between, and the scale of norms that read more than an embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.axes import grid, head_labels
from minigpt.internals.access.linear import dividing
from minigpt.internals.access.result import Axis, Result, Tabled
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT, Block
from minigpt.model.norms import explicit_norm
from minigpt.model.precision import precise, widen


def ordinary_ids(study: Access) -> Tensor:
    """Ids of tokens that represent text: no special tokens, unused ids or padding rows."""
    size = study.model.vocab_size
    try:
        pieces = study.tokenizer.token_bytes()
    except ConfigError:  # a study without a tokenizer
        return torch.arange(size, device=study.model.device)
    used = [id for id, piece in enumerate(pieces[:size]) if piece]
    return torch.tensor(used, device=study.model.device)


def _block(model: GPT, layer: int) -> Block:
    block = model.trunk.blocks[layer]
    assert isinstance(block, Block)
    return block


def _folded(norm: Any, config: GPTConfig, weight: Tensor) -> Tensor:  # (..., C, K) -> (..., C, K)
    """Fold a norm's weight and centring into the matrix after it; only the norm's division remains."""
    norm = dividing(norm, config, "weights with the norm folded in")
    weight = weight if norm.weight is None else norm.weight[:, None] * weight
    return weight - weight.mean(-2, keepdim=True) if norm.centred else weight


@torch.no_grad()
def read_weights(model: GPT, layer: int, letter: str) -> Tensor:  # (heads, C, D)
    """Projection of each head from the stream to queries ("q", H heads), keys ("k", G) or values ("v", G)."""
    block = _block(model, layer)
    attn = block.attn
    parts = attn.qkv.weight.unflatten(0, (-1, attn.head_dim)).split((attn.n_head, attn.n_kv_head, attn.n_kv_head))
    return _folded(block.norm1, model.config, parts["qkv".index(letter)].transpose(1, 2))


@torch.no_grad()
def write_weights(model: GPT, layer: int) -> Tensor:  # (H, D, C)
    """Output projection of each head, from its z to the stream."""
    attn = _block(model, layer).attn
    return attn.proj.weight.T.unflatten(0, (attn.n_head, attn.head_dim))


@torch.no_grad()
def read_out(model: GPT, ids: Tensor) -> Tensor:  # (K) -> (C, K)
    """Projection from the final stream to the uncapped logits of these ids, up to the final norm's division."""
    return _folded(model.trunk.norm, model.config, model.unembed.weight[ids].T)


@dataclass
class TokenMatrix(Tabled):
    """A low-rank vocabulary x vocabulary matrix: `left` (V, D) times `right` (V, D) transposed.

    Prints its strongest singular directions, each with its top input (row) and output (column) tokens.
    """

    title: str
    left: Tensor
    right: Tensor
    tokens: list[str]
    """Tokens of the rows and columns."""
    notes: dict[str, Any] = field(default_factory=dict)

    def spectrum(self) -> Result:
        """Singular values, largest first: how many directions the head uses, and how unequally."""
        _, values, _ = self.svd()
        axis = Axis("direction", [str(i) for i in range(len(values))])
        return Result(f"{self.title}: singular values", values.numpy(force=True), (axis,), "", self.notes)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition: row directions (V, D), singular values (D), column directions (V, D)."""
        left, right = torch.linalg.qr(self.left), torch.linalg.qr(self.right)
        u, values, vh = torch.linalg.svd(left.R @ right.R.T)
        return left.Q @ u, values, right.Q @ vh.T

    def eigenvalues(self) -> Tensor:
        """The D eigenvalues that can be nonzero, (D), complex."""
        return torch.linalg.eigvals(self.right.T @ self.left)

    def copying(self) -> float:
        """Copying score sum(eigenvalues) / sum(|eigenvalues|): 1: tokens raise their own logit, -1: they lower it."""
        values = self.eigenvalues()
        return float(values.real.sum() / values.abs().sum().clamp(min=1e-30))

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Submatrix (R, K) at these rows (R) and columns (K)."""
        return self.left[rows] @ self.right[columns].T

    def directions(self, count: int = 4, tokens: int = 6) -> list[tuple[float, list[str], list[str]]]:
        """Strongest directions: singular value, top input tokens, top output tokens.

        The sign of a direction is chosen so that its strongest input token has a positive weight.
        """
        u, values, v = self.svd()
        found = []
        for i in range(min(count, len(values))):
            sign = torch.sign(u[u[:, i].abs().argmax(), i])
            ends = [(sign * side[:, i]).topk(min(tokens, len(side))).indices.tolist() for side in (u, v)]
            rows, columns = ([self.tokens[place] for place in end] for end in ends)
            found.append((float(values[i]), rows, columns))
        return found

    def __str__(self) -> str:
        lines = [
            f"  {value:10.4g}  {' '.join(map(repr, rows))}  ->  {' '.join(map(repr, columns))}"
            for value, rows, columns in self.directions()
        ]
        tail = "  ".join(f"{name}: {value}" for name, value in self.notes.items())
        return "\n".join(part for part in (f"{self.title}: strongest directions", *lines, tail) if part)

    __repr__ = __str__

    def table(self, count: int = 8, tokens: int = 6) -> Result:
        """Singular values of the strongest directions, labelled with their top input and output tokens."""
        found = self.directions(count, tokens)
        labels = [f"{i} {' '.join(rows)} -> {' '.join(columns)}" for i, (_, rows, columns) in enumerate(found)]
        values = np.array([value for value, _, _ in found])
        return Result(f"{self.title}: strongest directions", values, (Axis("direction", labels),), "", self.notes)


@torch.no_grad()
def ov_circuit(study: Access, layer: int, head: int) -> TokenMatrix:
    """OV circuit of a head: what it adds to the logits (columns) when it attends to a token (rows).

    The head's value bias is left out, because its contribution does not depend on the attended token.
    """
    _check(study, layer, head)
    model, block, ids = study.model, _block(study.model, layer), ordinary_ids(study)
    bias = getattr(block.norm1, "bias", None)
    read = explicit_norm(block.norm1, model.trunk.embed.weight[ids])
    read = read if bias is None else read - bias  # (V, C)
    attn = block.attn
    values = attn.qkv.weight.unflatten(0, (-1, attn.head_dim))[-attn.n_kv_head :]  # (G, D, C)
    left = widen(read @ values[head * attn.n_kv_head // attn.n_head].T)  # (V, D)
    right = widen((write_weights(model, layer)[head] @ read_out(model, ids)).T)  # (V, D)
    return TokenMatrix(f"OV circuit of L{layer}H{head}", left, right, _tokens(study, ids), _caveats(study, layer, "OV"))


@torch.no_grad()
def qk_circuit(study: Access, layer: int, head: int, distance: int = 1) -> TokenMatrix:
    """QK circuit of a head: attention scores before the softmax, between query tokens (rows) and key tokens (columns).

    Args:
        study: see `Study`.
        layer: layer of the head.
        head: index of the query head.
        distance: number of positions between key and query; only matters with rope.

    Queries and keys are computed from the token embeddings only, with biases, query-key norm and rope. So the scores
    are exact in block 0 of a model without learned positions and n-gram embeddings.
    """
    _check(study, layer, head)
    if not 0 <= distance < study.config.block_size:
        raise ConfigError(f"distance: {distance}; expected 0 to block_size - 1 ({study.config.block_size - 1})")
    model, block, ids = study.model, _block(study.model, layer), ordinary_ids(study)
    attn = block.attn
    heads = attn.heads(explicit_norm(block.norm1, model.trunk.embed.weight[ids])[None])[0]  # (H + 2G, V, D)
    query, key = heads[head], heads[attn.n_head + head * attn.n_kv_head // attn.n_head]  # (V, D)
    if attn.q_norm is not None and attn.k_norm is not None:
        query, key = explicit_norm(attn.q_norm, query), explicit_norm(attn.k_norm, key)
    # All queries have one position, and all keys another.
    query = attn.turned(query[None, None], torch.full((len(ids),), distance, device=ids.device))[0, 0]
    key = attn.turned(key[None, None], torch.zeros_like(ids))[0, 0]
    title = f"QK circuit of L{layer}H{head}" + (f" at distance {distance}" if attn.rotates else "")
    left = widen(query) / math.sqrt(attn.head_dim)
    return TokenMatrix(title, left, widen(key), _tokens(study, ids), _caveats(study, layer, "QK"))


def copying_from_weights(study: Access) -> Result:
    """Copying score of the OV circuit of every head, from -1 to 1: layer x head; see `TokenMatrix.copying`."""
    layers, count = range(study.config.n_layer), range(study.config.n_head)
    values = [[ov_circuit(study, layer, head).copying() for head in count] for layer in layers]
    left_out = _caveats(study, None, "OV")
    return Result("copying, by eigenvalues of OV", np.array(values), grid(study.config), "score", left_out)


@torch.no_grad()
def composition(study: Access, kind: Literal["Q", "K", "V"]) -> Result:
    """Composition scores from weights: how much later heads read from earlier heads; earlier head x later head.

        ||W_OV X|| / (||W_OV|| ||X||) - 1 / sqrt(C)

    W_OV is the earlier head's; X is the later head's W_QK (Q), W_QK^T (K) or W_OV (V). Norms are Frobenius norms
    (Elhage et al. 2021). 1/sqrt(C) is the chance level: the root mean square over all rotations of one matrix against
    the other. NaN unless the first head is in an earlier layer than the second.
    """
    if kind not in ("Q", "K", "V"):
        raise ConfigError(f"kind {kind!r}: expected Q, K or V, the input of the later head that reads the earlier one")
    model, config = study.model, study.config
    group = config.n_head // (config.n_kv_head or config.n_head)
    reads, writes = [], []  # of each layer, (H, C, D) each: the two factors of X
    ov = []
    for layer in range(config.n_layer):
        q, k, v = (precise(read_weights(model, layer, letter)) for letter in "qkv")
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)  # (H, C, D)
        attn = _block(model, layer).attn
        for norm in (attn.q_norm, attn.k_norm):
            q = q if norm is None or norm.weight is None else q * precise(norm.weight)
        o = precise(write_weights(model, layer)).transpose(1, 2)  # (H, C, D)
        ov.append((v, o))
        near, far = {"Q": (q, k), "K": (k, q), "V": (v, o)}[kind]
        reads.append(near)
        writes.append(far)
    (a, b), x, y = (torch.cat([pair[i] for pair in ov]) for i in (0, 1)), torch.cat(reads), torch.cat(writes)
    between = torch.einsum("acd,bce->abde", b, x)  # (LH, LH, D, D)
    joined = torch.einsum("aij,abjk,bkl,abil->ab", _gram(a), between, _gram(y), between).clamp(min=0).sqrt()
    scores = joined / (_norm(a, b)[:, None] * _norm(x, y)).clamp(min=1e-30) - 1 / math.sqrt(config.n_embd)
    layers = torch.arange(config.n_layer).repeat_interleave(config.n_head)
    scores[layers[:, None] >= layers] = torch.nan
    axes = (Axis("earlier", head_labels(config)), Axis("later", head_labels(config)))
    left_out = _caveats(study, None, "OV" if kind == "V" else "QK")
    return Result(f"{kind}-composition", scores.numpy(force=True), axes, "above chance", left_out)


def _gram(factor: Tensor) -> Tensor:  # (H, C, D) -> (H, D, D)
    return factor.transpose(1, 2) @ factor


def _norm(left: Tensor, right: Tensor) -> Tensor:  # of left right^T, (H)
    return (_gram(left) * _gram(right)).sum((1, 2)).clamp(min=0).sqrt()


def _tokens(study: Access, ids: Tensor) -> list[str]:
    return [study.token(id) for id in ids.tolist()]


def _check(study: Access, layer: int, head: int) -> None:
    layers, heads = study.config.n_layer, study.config.n_head
    if not 0 <= layer < layers or not 0 <= head < heads:
        raise ConfigError(f"L{layer}H{head}: no such head; the model has L0H0 to L{layers - 1}H{heads - 1}")


def _caveats(study: Access, layer: int | None, circuit: str) -> dict[str, Any]:
    """Describe what a weight-based analysis of this model leaves out."""
    config, left_out = study.config, []
    if layer != 0:
        left_out.append("outputs of earlier layers")
    if config.adds("embed"):
        left_out.append(f"{config.position} positions")
    if config.bigram_rows or config.trigram_rows:
        left_out.append("n-gram embeddings")
    if circuit == "QK" and config.adds("bias", layer):
        left_out.append(f"what {config.position} adds to the scores")
    if circuit == "QK" and layer is None and config.adds("rotate"):
        left_out.append(str(config.position))
    if circuit == "QK" and layer is None and config.qk_norm:
        left_out.append("scale of the query-key norm")
    return {"left out": ", ".join(left_out)} if left_out else {}
