"""Hugging Face's config.json translated to ours: each key is obeyed, refused by name, or named in a notice.

Absent keys mean what they mean to transformers, whose defaults stand below. docs/interop.md lists every key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minigpt.checkpoint.manifest import read_json
from minigpt.errors import CheckpointError
from minigpt.model.config import GPTConfig
from minigpt.terminal import notice_once

Values = Mapping[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GPT2_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "tie_word_embeddings": True,
}
GPT2_ALIASES = {  # another name, which wins where both are there
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Keys that ask for another computation, and the values at which they do not. Anything else is refused.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "per_layer_config": (None, {}, []),
    "is_encoder_decoder": (False, None),
}
GPT2_REFUSED: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}
LLAMA_REFUSED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0, None),
    "attention_chunk_size": (None,),
}
# Settings of sampling, which transformers takes from config.json where there is no generation_config.json.
GENERATION = _words(
    "max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens sequence_bias renormalize_logits stop_strings max_time guidance_scale penalty_alpha "
    "eos_token_id"
)
# Keys without effect on logits, ids and sampling here.
HARMLESS = _words(
    "model_type architectures transformers_version _name_or_path name_or_path _commit_hash minigpt dtype torch_dtype "
    "initializer_range use_cache bos_token_id pad_token_id tokenizer_class gradient_checkpointing return_dict "
    "output_hidden_states output_attentions output_scores return_dict_in_generate chunk_size_feed_forward id2label "
    "label2id num_labels problem_type finetuning_task task_specific_params torchscript attn_implementation "
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal "
    "use_bfloat16 tie_encoder_decoder is_decoder remove_invalid_values num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind"
)
GPT2_HARMLESS = _words(
    "n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout"
)
LLAMA_HARMLESS = _words("pretraining_tp original_max_position_embeddings")


def _expect(values: Values, allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for field, neutral in allowed.items():
        if field in values and values[field] not in neutral:
            raise CheckpointError(
                f"{where}: {field} is {values[field]!r}, which minigpt has no counterpart for; expected {neutral[0]!r}"
            )


def _whole(values: Values, field: str, where: str) -> int:
    value = values[field]
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {field} is {value!r}; a whole number was expected")
    return value


def _flag(values: Values, field: str, where: str) -> bool:
    if not isinstance(values[field], bool):
        raise CheckpointError(f"{where}: {field} is {values[field]!r}; true or false was expected")
    return bool(values[field])


def _gpt2_config(values: Values, where: str) -> GPTConfig:
    values = {**GPT2_DEFAULTS, **values}
    values |= {name: values[alias] for alias, name in GPT2_ALIASES.items() if alias in values}
    _expect(values, {**GPT2_REFUSED, "activation_function": tuple(GPT2_ACTIVATIONS)}, where)
    if values["embd_pdrop"] != values["resid_pdrop"]:
        notice_once(
            f"{where}: embd_pdrop is {values['embd_pdrop']} and resid_pdrop {values['resid_pdrop']}; minigpt drops "
            f"both with {values['resid_pdrop']} when it trains"
        )
    return GPTConfig(
        preset="gpt2",
        vocab_size=_whole(values, "vocab_size", where),
        block_size=_whole(values, "n_positions", where),
        n_layer=_whole(values, "n_layer", where),
        n_head=_whole(values, "n_head", where),
        n_embd=_whole(values, "n_embd", where),
        n_inner=values["n_inner"],
        norm_eps=values["layer_norm_epsilon"],
        activation=GPT2_ACTIVATIONS[values["activation_function"]],
        dropout=values["resid_pdrop"],
        attn_dropout=values["attn_pdrop"],
        tie_embeddings=_flag(values, "tie_word_embeddings", where),
    )


def _rope_theta(values: Values, where: str) -> float:
    """The base of plain rotary positions. Of the places transformers reads, rope_scaling wins over rope_parameters, and
    both over the top level.
    """
    place = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    rope = values[place] or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}  # "type" is what older files say
    _expect(rope, {"rope_type": ("default",), "partial_rotary_factor": (1.0, None)}, f"{where}, {place}")
    for kind, inner in rope.items():
        if isinstance(inner, dict):
            raise CheckpointError(f"{where}, {place}: {kind} has positions of its own, which minigpt cannot give it")
    return float(rope.get("rope_theta") or values["rope_theta"] or LLAMA_DEFAULTS["rope_theta"])


def _llama_config(values: Values, where: str) -> GPTConfig:
    values = {**LLAMA_DEFAULTS, **values}
    context = _whole(values, "max_position_embeddings", where)
    _expect(values, {**LLAMA_REFUSED, "hidden_act": ("silu", "swish")}, where)
    bias = _flag(values, "attention_bias", where)
    _expect(values, {"mlp_bias": (bias,)}, where)
    if isinstance(window := values.get("sliding_window"), int) and window < context:
        raise CheckpointError(
            f"{where}: sliding_window is {window}, which minigpt has no counterpart for; expected null, or at least "
            f"max_position_embeddings ({context})"
        )
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(
            f"{where}: layer_types names other kinds than full_attention, which minigpt does not have"
        )
    return GPTConfig(
        preset="llama",
        vocab_size=_whole(values, "vocab_size", where),
        block_size=context,
        n_layer=_whole(values, "num_hidden_layers", where),
        n_head=_whole(values, "num_attention_heads", where),
        n_kv_head=values["num_key_value_heads"],
        n_embd=_whole(values, "hidden_size", where),
        n_inner=_whole(values, "intermediate_size", where),
        head_dim=values["head_dim"],
        norm_eps=values["rms_norm_eps"],
        rope_theta=_rope_theta(values, where),
        bias=bias,
        attn_dropout=values["attention_dropout"] or 0.0,
        tie_embeddings=_flag(values, "tie_word_embeddings", where),
    )


CONFIG_READERS: dict[str, Callable[[Values, str], GPTConfig]] = {"gpt2": _gpt2_config, "llama": _llama_config}
KNOWN: dict[str, frozenset[str]] = {
    "gpt2": HARMLESS.union(GENERATION, REFUSED, GPT2_HARMLESS, GPT2_DEFAULTS, GPT2_ALIASES, GPT2_REFUSED),
    "llama": HARMLESS.union(
        GENERATION, REFUSED, LLAMA_HARMLESS, LLAMA_DEFAULTS, LLAMA_REFUSED, ("sliding_window", "layer_types")
    ),
}


def config_from_huggingface(values: Values, where: str = "config.json") -> GPTConfig:
    """Our config of a Hugging Face GPT-2's or Llama's config.json.

    One notice names the keys that nothing here acts on. Raises CheckpointError for another architecture and for a
    setting we have no counterpart for.
    """
    kind = values.get("model_type")
    if kind not in CONFIG_READERS:
        raise CheckpointError(f"{where}: model_type is {kind!r}; minigpt reads {' and '.join(CONFIG_READERS)}")
    _expect(values, REFUSED, where)
    config = CONFIG_READERS[kind](values, where)
    name_unheard(values, KNOWN[kind], where)
    return config


def name_unheard(values: Values, known: Collection[str], where: str) -> None:
    """One notice of the keys of a foreign file that nothing here acts on, if it has such."""
    if unheard := sorted(key for key, value in values.items() if key not in known and value not in (None, False)):
        notice_once(f"{where}: minigpt does not act on {', '.join(unheard)} (docs/interop.md lists what it acts on)")


def reconciled(ours: GPTConfig, values: Values, where: str) -> GPTConfig:
    """The config of a folder in Hugging Face's layout that minigpt wrote, and another program may have changed since.

    `ours` is minigpt's record of it, which programs keep as they found it. It says more, such as how the weights began;
    where the two say different things, Hugging Face's fields win, and a notice tells which.
    """
    theirs = config_from_huggingface(values, where)
    unsaid = {"preset", "zero_init"}
    if values["model_type"] == "llama":
        unsaid |= {"dropout"} if "attention_dropout" in values else {"dropout", "attn_dropout"}
    else:  # there is no other way than GPT-2's
        unsaid |= {"rope_theta", "norm_weight"}
    said = {name: value for name, value in theirs.to_dict().items() if name not in unsaid}
    changed = {name: value for name, value in said.items() if value != getattr(ours, name)}
    if changed:
        told = ", ".join(f"{name} {value} (then {getattr(ours, name)})" for name, value in changed.items())
        notice_once(f"{where}: was changed since minigpt wrote it, and is taken as it stands: {told}")
    return replace(ours, **changed)


def sampling_from_huggingface(values: Values, generation: Values | None, vocab_size: int, where: str) -> dict[str, Any]:
    """Sampling defaults of a foreign folder: those of its generation_config.json, else those in its config.json.

    Args:
        values: config.json.
        generation: generation_config.json; None where there is none.
        vocab_size: of the model; an end token beyond it can never come, and is left out with a notice.
        where: the folder.
    """
    in_config = {key: value for key, value in values.items() if key in GENERATION and value is not None}
    sampling = dict(in_config if generation is None else generation)
    if generation is not None:
        in_config.pop("eos_token_id", None)  # every transformers writes it twice
        unheard = {key: value for key, value in in_config.items() if generation.get(key) != value}
        name_unheard(unheard, (), f"{where}/config.json, beside a generation_config.json")
    ends = sampling.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if beyond := [end for end in listed if isinstance(end, int) and end >= vocab_size]:
        notice_once(f"{where}: eos_token_id {beyond} is beyond the model's {vocab_size} tokens, and left out")
        kept = [end for end in listed if end not in beyond]
        sampling["eos_token_id"] = kept if isinstance(ends, list) and kept else None
    return sampling


def read_sampling(folder: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The sampling defaults of a checkpoint or Hugging Face folder, unchecked; `vocab_size` is that of its model."""
    path, values = folder / "generation_config.json", read_json(folder / "config.json")
    stored = read_json(path) if path.is_file() else None
    if "minigpt" in values:
        return stored or {}
    if vocab_size is None:
        config = config_from_huggingface(values, str(folder / "config.json"))
        assert config.vocab_size is not None
        vocab_size = config.vocab_size
    return sampling_from_huggingface(values, stored, vocab_size, str(folder))
