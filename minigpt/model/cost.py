"""Cost of a model computed from its config: parameters, FLOPs, memory."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.model.config import GPTConfig


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

    def optimizer_bytes(self, name: str) -> int:
        """What the optimizer remembers in float32, but for a counter per tensor.

        Args:
            name: "adamw" (two moments per parameter) or "muon" (one for matrices inside blocks, two for the rest).
        """
        return 4 * (2 * self.parameters - (self.matrix_parameters if name == "muon" else 0))


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
    """Compute the Cost of a model from its config. vocab_size must be set."""
    assert config.vocab_size is not None and config.n_inner is not None
    assert config.n_kv_head is not None and config.head_dim is not None
    width, vocab, layers = config.n_embd, config.vocab_size, config.n_layer
    qkv_width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    attention = width * qkv_width + config.n_head * config.head_dim * width
    mlp = (3 if config.activation == "swiglu" else 2) * width * config.n_inner
    gates = config.n_inner if config.activation == "swiglu" else 0
    biases = qkv_width + width + config.n_inner + gates + width if config.bias else 0
    weighs = config.norm == "layernorm" or bool(config.norm_weight)
    norm = width * (2 if config.norm == "layernorm" and config.bias else 1) * weighs
    block = attention + mlp + biases + 2 * norm + (2 * config.head_dim if config.qk_norm and config.norm_weight else 0)
    positions = config.block_size * width if config.position == "learned" else 0
    ngrams = min(config.bigram_rows or 0, vocab * (vocab + 1)) * width
    ngrams += min(config.trigram_rows or 0, vocab * (vocab + 1) ** 2) * width
    matrices = layers * (attention + mlp)
    scores = 4 * layers * config.n_head * config.head_dim * (config.block_size + 1) // 2
    return Cost(
        embedding_parameters=vocab * width + ngrams + positions,
        block_parameters=layers * block + norm,
        matrix_parameters=matrices,
        unembedding_parameters=0 if config.tie_embeddings else vocab * width,
        forward_flops=2 * (matrices + vocab * width) + scores,
        cache_bytes_per_token=2 * layers * config.n_kv_head * config.head_dim * 4,
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
    norm = 4 * width + (2 if half else 4) * width  # its input, and its output in the dtype of the matrix products
    attends = size if on_gpu else 4
    attention = attends * (heads + 2 * keys)  # queries, keys and values before norm and rope
    if config.qk_norm:
        attention += 4 * (heads + keys)
    if config.position == "rope":
        attention += 4 * (heads + keys)
    attention += attends * heads + 4 * config.n_head  # output, and the log-sum-exp of the softmax
    inner = size * config.n_inner * (4 if config.activation == "swiglu" else 2)
    logits = 4 * vocab * (2 if config.logit_softcap else 1) + (2 * vocab if half else 0)
    return Activations(block=2 * norm + attention + inner, stream=4 * width, ends=norm, logits=logits)
