"""The names of a model's activations, as in TransformerLens, with their axes and meaning.

    hook_embed                    batch pos d_model      outside the blocks
    blocks.3.attn.hook_pattern    batch head pos slot    in block 3

Every function that takes a name also takes a short form: "pattern" for all blocks, ("pattern", 3) for block 3,
("resid_post", -1) for the last block, or a shell pattern such as "blocks.*.hook_resid_*".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral
from typing import NamedTuple

from minigpt.errors import ConfigError
from minigpt.model.config import GPTConfig
from minigpt.model.norms import RMSNorm, hooks_of

Names = str | tuple[str, int] | Callable[[str], bool] | Iterable["str | tuple[str, int]"]


class Activation(NamedTuple):
    """Axes and meaning of one activation."""

    axes: tuple[str, ...]
    """batch, pos (query positions), slot (key positions), head, kv_head, d_head, d_model, d_mlp, or one."""
    meaning: str
    on_request: bool = False
    """Computed only if named explicitly, because it costs extra time and memory; patterns do not match it."""


STREAM = ("batch", "pos", "d_model")
QUERY = ("batch", "pos", "head", "d_head")
KEY = ("batch", "pos", "kv_head", "d_head")
SQUARE = ("batch", "head", "pos", "slot")
HIDDEN = ("batch", "pos", "d_mlp")


def activations(config: GPTConfig) -> dict[str, Activation]:
    """All activations of a model with this config, by full name, in the order of computation."""
    table = {"hook_embed": Activation(STREAM, "token embeddings")}
    for name, rows, group in (("bigram", config.bigram_rows, "bigram"), ("trigram", config.trigram_rows, "trigram")):
        if rows:
            table[f"hook_{name}_embed"] = Activation(STREAM, f"embedding of the {group} that ends at each token")
    if config.adds("embed"):
        table["hook_pos_embed"] = Activation(STREAM, "position embeddings")
    for layer in range(config.n_layer):
        table |= {f"blocks.{layer}.{name}": activation for name, activation in _of_block(config, layer).items()}
    return table | _of_norm("ln_final.", STREAM, "final norm", hooks_of(config))


def _of_norm(at: str, axes: tuple[str, ...], which: str, hooks: dict[str, str]) -> dict[str, Activation]:
    scale = (*axes[:-1], "one")
    return {
        at + name: Activation(scale if name == "hook_scale" else axes, meaning.replace("the norm", f"the {which}", 1))
        for name, meaning in hooks.items()
    }


def _of_block(config: GPTConfig, layer: int) -> dict[str, Activation]:
    table = {"hook_resid_pre": Activation(STREAM, "residual stream before the block")}
    kv_read = ("batch", "pos", "kv_head", "d_model")
    reads = {"q": ("batch", "pos", "head", "d_model"), "k": kv_read, "v": kv_read}
    for letter, axes in reads.items():
        what = {"q": "queries", "k": "keys", "v": "values"}[letter]
        table[f"hook_{letter}_input"] = Activation(axes, f"input of each head's {what}, before the norm", True)
    table |= _of_norm("ln1.", STREAM, "norm before attention", hooks_of(config))
    table["attn.hook_q"] = Activation(QUERY, "queries, before norm and positions")
    table["attn.hook_k"] = Activation(KEY, "keys, before norm and positions")
    table["attn.hook_v"] = Activation(KEY, "values")
    if config.qk_norm:
        for letter, axes in (("q", QUERY), ("k", KEY)):
            what = "queries" if letter == "q" else "keys"
            table |= _of_norm(f"attn.{letter}_norm.", axes, f"norm of the {what}", RMSNorm.hooks)
    if config.adds("rotate", layer):
        table["attn.hook_rot_q"] = Activation(QUERY, f"queries after {config.position}")
        table["attn.hook_rot_k"] = Activation(KEY, f"keys after {config.position}")
    table["attn.hook_attn_scores"] = Activation(SQUARE, "attention scores before the softmax; masked ones are -inf")
    table["attn.hook_pattern"] = Activation(SQUARE, "attention weights; each row sums to 1")
    table["attn.hook_z"] = Activation(QUERY, "each head's weighted sum of values")
    result = ("batch", "pos", "head", "d_model")
    table["attn.hook_result"] = Activation(result, "output of each head, added to the residual stream", True)
    table["hook_attn_out"] = Activation(STREAM, "output of attention, added to the residual stream")
    table["hook_resid_mid"] = Activation(STREAM, "residual stream between attention and MLP")
    table["hook_mlp_in"] = Activation(STREAM, "input of the MLP branch only, before its norm")
    table |= _of_norm("ln2.", STREAM, "norm before the MLP", hooks_of(config))
    if config.gated:
        table["mlp.hook_pre"] = Activation(HIDDEN, "gate before the nonlinearity")
        table["mlp.hook_pre_linear"] = Activation(HIDDEN, "up projection, multiplied by the gate")
    else:
        table["mlp.hook_pre"] = Activation(HIDDEN, "neurons before the nonlinearity")
    table["mlp.hook_post"] = Activation(HIDDEN, "neurons after the nonlinearity")
    table["hook_mlp_out"] = Activation(STREAM, "output of the MLP, added to the residual stream")
    table["hook_resid_post"] = Activation(STREAM, "residual stream after the block")
    return table


def full_name(config: GPTConfig, name: str, layer: int) -> str:
    """Return the full name of a block's activation: ("pattern", -1) -> blocks.5.attn.hook_pattern.

    Raises ConfigError if the layer or the activation does not exist.
    """
    if not -config.n_layer <= layer < config.n_layer:
        raise ConfigError(f"activation ({name!r}, {layer}): the model's layers are 0 .. {config.n_layer - 1}")
    prefix = f"blocks.{layer % config.n_layer}."
    return _find(config, name, [key for key in activations(config) if key.startswith(prefix)])[0]


def listed(words: str | Iterable[str]) -> list[str]:
    """Split a comma-separated string as given on the command line ("head,pos"); other iterables become a list."""
    return [word.strip() for word in words.split(",")] if isinstance(words, str) else list(words)


def select(config: GPTConfig, names: Names | None) -> list[str]:
    """Return the full names that `names` selects, in the order of computation.

    Args:
        config: config of the model.
        names: a full or short name, a shell pattern, (short name, layer), a list of these, or a predicate on the full
            name; None: all activations that cost nothing extra.

    Raises:
        ConfigError: a name matches nothing; the message suggests the closest names.
    """
    table = activations(config)
    usual = [name for name, activation in table.items() if not activation.on_request]
    if names is None:
        return usual
    if callable(names):
        picked = [name for name in table if names(name)]
        if not picked:
            raise ConfigError(f"activation: the function selects none of the model's {len(table)} names")
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
                raise ConfigError(
                    f"activation {item!r}: patterns do not match costly activations; give the name: {asked[0]}"
                )
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
            raise ConfigError(f"activation {name!r}: ambiguous, matches {', '.join(sorted(kinds))}; give a longer name")
        return short
    plain = {key.rpartition("hook_")[2]: key for key in among}
    near = [*get_close_matches(name, among, n=3), *get_close_matches(name, plain, n=3)][:3]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"activation {name!r}: this model has no such activation{hint}")
