"""What a model costs before it exists: parameters, floating-point operations, memory. Arithmetic only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.model.config import GPTConfig


@dataclass(frozen=True)
class Cost:
    """Counts of one model. A multiply-add is two floating-point operations (FLOPs)."""

    parameters: int
    """All of them, shared ones once."""
    embedding_parameters: int
    """Token and position embeddings; the unembedding too where it is not tied."""
    forward_flops: int
    """FLOPs a token of a forward at full context: 2 a matrix weight, and 4 H D S for attention, S averaged (causal)."""
    training_flops: int
    """FLOPs a token of a training step: three forwards' worth."""
    cache_bytes_per_token: int
    """Keys and values of all layers in float32 (2 n_layer n_kv_head head_dim 4 bytes)."""
    state_bytes: int
    """Weights, gradients and AdamW's two moments in float32: 16 bytes a parameter."""

    def activation_bytes(self, config: GPTConfig, tokens: int) -> int:
        """A rough count of what float32 training keeps of `tokens` tokens for the backward pass, logits included."""
        assert config.n_inner is not None and config.head_dim is not None and config.n_kv_head is not None
        gated = 3 if config.activation == "swiglu" else 2
        heads = (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim
        layer = 4 * config.n_embd + heads + gated * config.n_inner
        assert config.vocab_size is not None
        return 4 * tokens * (config.n_layer * layer + 2 * config.n_embd + 2 * config.vocab_size)


def cost_of(config: GPTConfig) -> Cost:
    """Count a model from its config alone. vocab_size must be known."""
    assert config.vocab_size is not None and config.n_inner is not None
    assert config.n_kv_head is not None and config.head_dim is not None
    width, vocab, layers = config.n_embd, config.vocab_size, config.n_layer
    qkv_width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    attention = width * qkv_width + config.n_head * config.head_dim * width
    mlp = (3 if config.activation == "swiglu" else 2) * width * config.n_inner
    biases = 0
    if config.bias:
        biases = qkv_width + width + config.n_inner + width
    norm = width * (2 if config.norm == "layernorm" and config.bias else 1)
    block = attention + mlp + biases + 2 * norm + (2 * config.head_dim if config.qk_norm else 0)
    positions = config.block_size * width if config.position == "learned" else 0
    unembedding = 0 if config.tie_embeddings else vocab * width
    embeddings = vocab * width + positions + unembedding
    matrices = layers * (attention + mlp) + vocab * width
    scores = 4 * layers * config.n_head * config.head_dim * (config.block_size + 1) // 2
    parameters = layers * block + norm + embeddings
    forward = 2 * matrices + scores
    return Cost(
        parameters=parameters,
        embedding_parameters=embeddings,
        forward_flops=forward,
        training_flops=3 * forward,
        cache_bytes_per_token=2 * layers * config.n_kv_head * config.head_dim * 4,
        state_bytes=16 * parameters,
    )
