"""The config of every GPT: sizes, and the choices that distinguish GPT-2, Llama and the modern preset.

    GPTConfig(preset="llama", vocab_size=512)    the preset fills in the fields that are not given

Fields that depend on the preset default to None in the signature; an instance always holds the resolved value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from minigpt.choices import Row, Table, under
from minigpt.errors import ConfigError

NORMS = Table(
    "norm",
    "model.norm",
    {
        "layernorm": Row("minigpt.model.norms:LayerNorm", "subtracts the mean, divides by the standard deviation"),
        "rmsnorm": Row("minigpt.model.norms:RMSNorm", "divides by the root mean square"),
    },
)
POSITIONS = Table(
    "position",
    "model.position",
    {
        "learned": Row("minigpt.model.positions:Learned", "an embedding per position", {"embed": True}),
        "rope": Row("minigpt.model.positions:Rotary", "rotary, half-split pairs", {"rotate": True, "even": True}),
    },
)
ACTIVATIONS = Table(
    "activation",
    "model.activation",
    {
        "gelu": Row("minigpt.model.activations:gelu", "tanh approximation"),
        "gelu_exact": Row("minigpt.model.activations:gelu_exact", "erf"),
        "relu2": Row("minigpt.model.activations:relu2", "squared ReLU"),
        "swiglu": Row("minigpt.model.activations:swiglu", "gated", {"gated": True}),
    },
)

# Fields set by each preset. "gpt2" equals Hugging Face's GPT2LMHeadModel, "llama" its LlamaForCausalLM.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu",
        "norm_weight": True,
        "qk_norm": False,
        "bias": True,
        "tie_embeddings": True,
        "zero_init": False,
        "logit_softcap": 0.0,
        "bigram_rows": 0,
        "trigram_rows": 0,
    },
    "llama": {
        "norm": "rmsnorm",
        "position": "rope",
        "activation": "swiglu",
        "norm_weight": True,
        "qk_norm": False,
        "bias": False,
        "tie_embeddings": False,
        "zero_init": False,
        "logit_softcap": 0.0,
        "bigram_rows": 0,
        "trigram_rows": 0,
    },
    "modern": {
        "norm": "rmsnorm",
        "position": "rope",
        "activation": "relu2",
        "norm_weight": False,
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": False,
        "zero_init": True,
        "logit_softcap": 15.0,
        "bigram_rows": 0,
        "trigram_rows": 0,
    },
}
TABLES = {"norm": NORMS, "position": POSITIONS, "activation": ACTIVATIONS}


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT. Raises ConfigError, naming the field, if no model can be built from the values."""

    preset: Literal["gpt2", "llama", "modern"] = "modern"
    """Default of every architecture field below that is not given: gpt2, llama or modern."""
    vocab_size: int | None = None
    """Size of the embedding; the tokenizer's vocabulary size if not given. A larger value pads the vocabulary."""
    block_size: int = 128
    """Context length, in tokens."""
    n_layer: int = 4
    """Number of Transformer blocks."""
    n_head: int = 2
    """Number of query heads."""
    n_kv_head: int | None = None
    """Number of key/value heads, a divisor of n_head (grouped-query attention); n_head if not given."""
    n_embd: int = 128
    """Width of the residual stream."""
    head_dim: int | None = None
    """Width of a head; n_embd / n_head if not given."""
    n_inner: int | None = None
    """Hidden width of the MLP; 4 n_embd if not given (gated: 8/3 n_embd, rounded up to a multiple of 32)."""
    dropout: float = 0.0
    """Dropout probability of embeddings and block outputs during training."""
    attn_dropout: float | None = None
    """Dropout probability of attention weights; equal to dropout if not given. 0 allows the fused kernel on a CPU."""
    norm: str | None = field(default=None, metadata={"table": NORMS})
    """Type of normalization."""
    norm_eps: float = 1e-5
    """Added to the variance in a norm."""
    norm_weight: bool | None = None
    """Whether rmsnorm has a learned weight per channel; layernorm always has one."""
    position: str | None = field(default=None, metadata={"table": POSITIONS})
    """Positions."""
    rope_theta: float = 10000.0
    """Base of the rope frequencies."""
    activation: str | None = field(default=None, metadata={"table": ACTIVATIONS})
    """MLP activation."""
    qk_norm: bool | None = None
    """Apply RMSNorm to queries and keys of each head before the rotation."""
    bias: bool | None = None
    """Biases in linear layers and layernorm."""
    tie_embeddings: bool | None = None
    """Share the weight of the embedding and the unembedding."""
    zero_init: bool | None = None
    """Initialise the output projections of every block to zero, so that blocks of a new model write nothing."""
    logit_softcap: float | None = None
    """c > 0: logits become c tanh(logits / c). 0: no cap."""

    bigram_rows: int | None = None
    """Rows of an embedding table indexed by the hash of each token and the one before it; 0: no table."""
    trigram_rows: int | None = None
    """Rows of an embedding table indexed by the hash of each token and the two before it; 0: no table."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of plug-ins, by dotted name: {"norm.alpha": 0.3}, on the command line --model.norm.alpha 0.3."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"model.preset: '{self.preset}' is not one of {', '.join(PRESETS)}")
        derived: dict[str, Any] = {
            **PRESETS[self.preset],
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // max(self.n_head, 1),
            "attn_dropout": self.dropout,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, table in TABLES.items():
            table.check(getattr(self, name))
        if self.n_inner is None:
            inner = -(-8 * self.n_embd // 96) * 32 if self.gated else 4 * self.n_embd
            object.__setattr__(self, "n_inner", inner)
        self._check()

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies a gate, so that the MLP has a third matrix."""
        return bool(ACTIVATIONS.fact(str(self.activation), "gated", False))

    def own(self, part: str) -> dict[str, Any]:
        """The settings of a part (norm, position or activation) that are its own."""
        return under(part, self.settings)

    def adds(self, way: str, layer: int | None = None) -> bool:
        """Whether positions act in this way, in this layer (None: in any).

        Args:
            way: "embed" (added to the stream), "rotate" (applied to queries and keys) or "bias" (added to scores).
            layer: index of the block.
        """
        name = str(self.position)
        layers = POSITIONS.fact(name, "layers")
        acts = POSITIONS.fact(name, way) is not None
        return acts and (layer is None or layers is None or bool(layers(layer)))

    def _check(self) -> None:
        for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner", "vocab_size"):
            value = getattr(self, name)
            if name == "vocab_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 2**31:
                raise ConfigError(f"model.{name}: {value!r} is not a whole number from 1 to {2**31}")
        for name in ("bigram_rows", "trigram_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**31:
                raise ConfigError(f"model.{name}: {value!r} is not a whole number from 0 (none) to {2**31}")
        if self.n_head % self.n_kv_head:  # type: ignore[operator]
            raise ConfigError(
                f"model.n_kv_head: {self.n_kv_head} does not divide n_head ({self.n_head}); choose a divisor of it"
            )
        if self.n_embd % self.n_head and self.head_dim == self.n_embd // self.n_head:
            raise ConfigError(
                f"model.n_head: {self.n_head} does not divide n_embd ({self.n_embd}); "
                f"choose a divisor of it, or give model.head_dim"
            )
        if POSITIONS.fact(str(self.position), "even") and self.head_dim % 2:  # type: ignore[operator]
            raise ConfigError(
                f"model.head_dim: {self.head_dim} is odd; {self.position} rotates pairs of channels and needs an even "
                f"value"
            )
        for name in ("dropout", "attn_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not in [0, 1)")
        for name in ("norm_eps", "rope_theta"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not a positive number")
        if not 0.0 <= self.logit_softcap < float("inf"):  # type: ignore[operator]
            raise ConfigError(f"model.logit_softcap: {self.logit_softcap} is not 0 (off) or a positive number")
        known = [name for name in self.settings if name.partition(".")[0] in TABLES and "." in name]
        if len(known) < len(self.settings):
            unknown = next(name for name in self.settings if name not in known)
            raise ConfigError(
                f"model.settings: {unknown!r} is not of the form norm.NAME, position.NAME or activation.NAME"
            )
        for name, table in TABLES.items():
            table.own(getattr(self, name), self.own(name))

    def to_dict(self) -> dict[str, Any]:
        """All fields with their resolved values, ready for JSON; `settings` only if a plug-in has some."""
        values = asdict(self)
        return values if self.settings else {name: value for name, value in values.items() if name != "settings"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Create a config from the output of to_dict. Raises ConfigError for unknown fields."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(f"model: unknown fields {sorted(unknown)}; a newer version may have written this config")
        return cls(**values)
