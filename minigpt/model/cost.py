"""Cost of a model computed from its config: parameters, FLOPs, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minigpt.model.config import ACTIVATIONS, POSITIONS, GPTConfig
from minigpt.model.gpt import outline
from minigpt.model.norms import make_norm


@dataclass(frozen=True)
class Cost:
    """Parameters, FLOPs and memory of one model. A multiply-add counts as two floating-point operations (FLOPs)."""

    embedding_parameters: int
    """Token, n-gram and position embeddings; includes a tied unembedding."""
    block_parameters: int
    """All blocks and the final norm."""
    matrix_parameters: int
    """Parameters in the matrices of the blocks, which Muon updates."""
    unembedding_parameters: int
    """The unembedding; 0 if it is tied to the embedding."""
    forward_flops: int
    """Forward FLOPs per token at full context: 2 per matrix weight, plus 4 H D S for attention (S the mean, causal)."""
    cache_bytes_per_token: int
    """Keys and values of all layers in float32 (2 n_layer n_kv_head head_dim 4 bytes)."""

    @property
    def parameters(self) -> int:
        """Total number of parameters; tied parameters count once."""
        return self.embedding_parameters + self.block_parameters + self.unembedding_parameters

    @property
    def training_flops(self) -> int:
        """FLOPs per token of a training step: three forwards' worth (Kaplan et al. 2020, arXiv 2001.08361)."""
        return 3 * self.forward_flops


@dataclass(frozen=True)
class Activations:
    """Activation memory of training in bytes per token (kept for backward); without torch.compile and dropout."""

    block: int
    """One block."""
    stream: int
    """Input of a block: the only activation of a block that activation checkpointing keeps."""
    ends: int
    """The final norm."""
    logits: int
    """Logits and the intermediate values of the loss."""

    def bytes(self, layers: int, tokens: int, checkpointing: bool = False) -> int:
        """Total bytes without the logits, for `tokens` tokens and `layers` blocks."""
        blocks = layers * self.stream + self.block if checkpointing else layers * self.block
        return tokens * (blocks + self.ends)


def cost_of(config: GPTConfig) -> Cost:
    """Compute the Cost of a model from its config, whose vocab_size must be set.

    Parameters are counted on a model without memory.
    """
    assert config.vocab_size is not None and config.n_kv_head is not None and config.head_dim is not None
    layers = config.n_layer if POSITIONS.fact(str(config.position), "layers") else 1  # equal layers: one is enough
    model = outline(replace(config, n_layer=layers))
    blocks = list(model.trunk.blocks.parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = config.n_layer * sum(each.numel() for each in blocks if each.dim() == 2) // layers
    ends = sum(parameter.numel() for parameter in model.trunk.norm.parameters())
    projection = config.vocab_size * config.n_embd
    scores = 4 * config.n_layer * config.n_head * config.head_dim * (config.block_size + 1) // 2
    in_blocks = sum(parameter.numel() for parameter in blocks)
    unembedding = sizes.get("unembed.weight", 0)
    return Cost(
        embedding_parameters=sum(sizes.values()) - in_blocks - ends - unembedding,
        block_parameters=config.n_layer * in_blocks // layers + ends,
        matrix_parameters=matrices,
        unembedding_parameters=unembedding,
        forward_flops=2 * (matrices + projection) + scores,
        cache_bytes_per_token=2 * config.n_layer * config.n_kv_head * config.head_dim * 4,
    )


def activations_of(config: GPTConfig, half: bool = False, on_gpu: bool = True) -> Activations:
    """Compute the activation memory per token that training keeps for the backward pass.

    Args:
        config: config of the model; vocab_size must be set.
        half: matrix products in bfloat16, as with bf16-mixed. The residual stream and the norms stay float32.
        on_gpu: False for a CPU, where attention stays float32 too.
    """
    assert config.vocab_size is not None and config.n_inner is not None
    assert config.n_kv_head is not None and config.head_dim is not None
    size = 2 if half else 4
    width, vocab = config.n_embd, config.vocab_size
    keys, heads = config.n_kv_head * config.head_dim, config.n_head * config.head_dim
    norm = make_norm(config, SMALL)
    each = _kept(norm, torch.zeros(1, SMALL)) / SMALL - 4 if not getattr(norm, "divides", False) else 4
    read = round(each * width) + size * width  # what the norm keeps, and its output in the dtype of the products
    attends = size if on_gpu else 4
    attention = attends * (heads + 2 * keys)  # queries, keys and values before norm and positions
    if config.qk_norm:
        attention += 4 * (heads + keys)
    if config.adds("rotate"):
        attention += 4 * (heads + keys)
    if config.adds("bias"):
        attention += 4 * config.n_head * config.block_size  # the scores, since the fused kernel does not take a bias
    attention += attends * heads + 4 * config.n_head  # output, and the log-sum-exp of the softmax
    activation = ACTIVATIONS.bound(str(config.activation), config.own("activation"))
    hidden = [torch.zeros(1, SMALL) for _ in range(2 if config.gated else 1)]
    inner = size * config.n_inner * _kept(activation, *hidden) // (4 * SMALL)
    logits = 4 * vocab * (2 if config.logit_softcap else 1) + (2 * vocab if half else 0)
    return Activations(block=2 * read + attention + inner, stream=4 * width, ends=read, logits=logits)


SMALL = 64  # channels of the tensors that are counted


def _kept(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes of a function's result and of the distinct tensors that autograd keeps for it, without parameters."""
    held: dict[int, Tensor] = {}
    own = set(function.parameters()) if isinstance(function, nn.Module) else set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(function(*(tensor.requires_grad_() for tensor in inputs)))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
