"""The names of a model's activations, as in TransformerLens, with their axes and meaning.

    hook_embed                    batch pos d_model      a name of the whole model
    blocks.3.attn.hook_pattern    batch head pos slot    a name of one block

Short forms are understood wherever a name is: "pattern" is that activation of every block, ("pattern", 3) of block 3,
("resid_post", -1) of the last block; shell patterns too: "blocks.*.hook_resid_*".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral
from typing import NamedTuple

from minigpt.errors import ConfigError
from minigpt.model.config import GPTConfig

Names = str | tuple[str, int] | Callable[[str], bool] | Iterable["str | tuple[str, int]"]


class Activation(NamedTuple):
    """One row of the table."""

    axes: tuple[str, ...]
    """batch, pos (query positions), slot (key positions), head, kv_head, d_head, d_model, d_mlp, or one."""
    meaning: str
    on_request: bool = False
    """Costs extra, so that no pattern includes it: only its name does."""


STREAM = ("batch", "pos", "d_model")
QUERY = ("batch", "pos", "head", "d_head")
KEY = ("batch", "pos", "kv_head", "d_head")
SQUARE = ("batch", "head", "pos", "slot")
SCALE = ("batch", "pos", "one")
HIDDEN = ("batch", "pos", "d_mlp")


def activations(config: GPTConfig) -> dict[str, Activation]:
    """Every activation of a model of this shape, by full name, in the order in which they are computed."""
    table = {"hook_embed": Activation(STREAM, "the tokens' embeddings")}
    for name, rows, group in (("bigram", config.bigram_rows, "pairs"), ("trigram", config.trigram_rows, "triples")):
        if rows:
            table[f"hook_{name}_embed"] = Activation(STREAM, f"the embeddings of the {group} that end in each token")
    if config.position == "learned":
        table["hook_pos_embed"] = Activation(STREAM, "the positions' embeddings")
    for layer in range(config.n_layer):
        table |= {f"blocks.{layer}.{name}": activation for name, activation in _of_block(config).items()}
    table["ln_final.hook_scale"] = Activation(SCALE, "what the final norm divides by")
    table["ln_final.hook_normalized"] = Activation(STREAM, "the normed stream, before the norm's own weight and bias")
    return table


def _of_block(config: GPTConfig) -> dict[str, Activation]:
    table = {"hook_resid_pre": Activation(STREAM, "the stream as the block receives it")}
    kv_read = ("batch", "pos", "kv_head", "d_model")
    reads = {"q": ("batch", "pos", "head", "d_model"), "k": kv_read, "v": kv_read}
    for letter, axes in reads.items():
        what = {"q": "queries", "k": "keys", "v": "values"}[letter]
        table[f"hook_{letter}_input"] = Activation(axes, f"the stream as each head reads it for its {what}", True)
    table["ln1.hook_scale"] = Activation(SCALE, "what the norm before attention divides by")
    table["ln1.hook_normalized"] = Activation(STREAM, "the normed stream, before the norm's own weight and bias")
    table["attn.hook_q"] = Activation(QUERY, "queries, before norm and rotation")
    table["attn.hook_k"] = Activation(KEY, "keys, before norm and rotation")
    table["attn.hook_v"] = Activation(KEY, "values")
    if config.qk_norm:
        for letter, axes in (("q", QUERY), ("k", KEY)):
            what = "queries" if letter == "q" else "keys"
            table[f"attn.{letter}_norm.hook_scale"] = Activation(
                (*axes[:3], "one"), f"what the norm of {what} divides by"
            )
            table[f"attn.{letter}_norm.hook_normalized"] = Activation(axes, f"{what} normed, before the norm's weight")
    if config.position == "rope":
        table["attn.hook_rot_q"] = Activation(QUERY, "queries as rotated to their positions")
        table["attn.hook_rot_k"] = Activation(KEY, "keys as rotated to their positions")
    table["attn.hook_attn_scores"] = Activation(SQUARE, "scores before the softmax; minus infinity for the future")
    table["attn.hook_pattern"] = Activation(SQUARE, "attention weights; each row sums to 1")
    table["attn.hook_z"] = Activation(QUERY, "each head's weighted sum of values")
    result = ("batch", "pos", "head", "d_model")
    table["attn.hook_result"] = Activation(result, "what each head writes to the stream", True)
    table["hook_attn_out"] = Activation(STREAM, "what attention adds to the stream")
    table["hook_resid_mid"] = Activation(STREAM, "the stream between attention and MLP")
    table["hook_mlp_in"] = Activation(STREAM, "the stream as the MLP alone reads it")
    table["ln2.hook_scale"] = Activation(SCALE, "what the norm before the MLP divides by")
    table["ln2.hook_normalized"] = Activation(STREAM, "the normed stream, before the norm's own weight and bias")
    if config.activation == "swiglu":
        table["mlp.hook_pre"] = Activation(HIDDEN, "the gate's input to the nonlinearity")
        table["mlp.hook_pre_linear"] = Activation(HIDDEN, "what the gate is multiplied with")
    else:
        table["mlp.hook_pre"] = Activation(HIDDEN, "neurons before the nonlinearity")
    table["mlp.hook_post"] = Activation(HIDDEN, "neurons after it")
    table["hook_mlp_out"] = Activation(STREAM, "what the MLP adds to the stream")
    table["hook_resid_post"] = Activation(STREAM, "the stream as the block leaves it")
    return table


def full_name(config: GPTConfig, name: str, layer: int) -> str:
    """The full name of a block's activation: ("pattern", -1) -> blocks.5.attn.hook_pattern.

    Raises ConfigError where there is no such layer or activation.
    """
    if not -config.n_layer <= layer < config.n_layer:
        raise ConfigError(f"activation ({name!r}, {layer}): the model's layers are 0 .. {config.n_layer - 1}")
    prefix = f"blocks.{layer % config.n_layer}."
    return _find(config, name, [key for key in activations(config) if key.startswith(prefix)])[0]


def listed(words: str | Iterable[str]) -> list[str]:
    """Several words, as the command line has them ("head,pos") or one by one."""
    return [word.strip() for word in words.split(",")] if isinstance(words, str) else list(words)


def select(config: GPTConfig, names: Names | None) -> list[str]:
    """The full names that are meant, in the order of computation.

    Args:
        config: the model's.
        names: a full or short name, a shell pattern, (short name, layer), a function of the full name, or several of
            these; None: everything that is computed anyway.

    Raises:
        ConfigError: nothing is called that; names the nearest.
    """
    table = activations(config)
    usual = [name for name, activation in table.items() if not activation.on_request]
    if names is None:
        return usual
    if callable(names):
        picked = [name for name in table if names(name)]
        if not picked:
            raise ConfigError(f"activation: the function picks none of the model's {len(table)} names; let it pick one")
        return picked
    if isinstance(names, str) or (isinstance(names, tuple) and len(names) == 2 and isinstance(names[1], Integral)):
        names = [names]
    found: set[str] = set()
    for item in names:
        if isinstance(item, tuple):
            found.add(full_name(config, *item))
        elif any(sign in item for sign in "*?["):
            matches = [name for name in usual if fnmatchcase(name, item)]
            asked = [name for name in table if fnmatchcase(name, item)]
            if not matches and asked:
                raise ConfigError(f"activation {item!r}: is on request only; name it without a pattern: {asked[0]}")
            if not matches:
                raise ConfigError(f"activation {item!r}: the pattern matches none of the model's {len(table)} names")
            found.update(matches)
        else:
            found.update(_find(config, item, list(table)))
    return [name for name in table if name in found]


def _find(config: GPTConfig, name: str, among: list[str]) -> list[str]:
    if name in among:
        return [name]
    short = [key for key in among if key.endswith((f".hook_{name}", f".{name}")) or key == f"hook_{name}"]
    if short:
        kinds = {key.split(".", 2)[2] if key.startswith("blocks.") else key for key in short}
        if len(kinds) > 1:
            raise ConfigError(f"activation {name!r}: may be any of {', '.join(sorted(kinds))}; give more of the name")
        return short
    plain = {key.rpartition("hook_")[2]: key for key in among}
    near = [*get_close_matches(name, among, n=3), *get_close_matches(name, plain, n=3)][:3]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"activation {name!r}: this model has none of that name{hint}")
