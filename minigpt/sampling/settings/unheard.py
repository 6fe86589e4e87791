"""Keys of a generation_config.json that have no effect in minigpt: named in one notice."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minigpt.terminal import notice_once

# These keys do not change the generated text: how to compute it, extra outputs, token ids that minigpt does not need.
HARMLESS = frozenset(
    {
        *("transformers_version", "_from_model_config", "_commit_hash", "bos_token_id", "pad_token_id"),
        *("decoder_start_token_id", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("prefill_chunk_size", "compile_config", "disable_compile", "low_memory", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
        *("max_matching_ngram_size", "use_mtp", "speculation_type", "remove_invalid_values"),
    }
)
NEUTRAL: dict[str, tuple[Any, ...]] = {"guidance_scale": (1,), "penalty_alpha": (0,)}  # in addition to null and false


def name_unheard(record: dict[str, Any], known: Collection[str]) -> None:
    """Show one notice that lists the ignored keys of a generation_config.json, except those without effect.

    Args:
        record: the content of the file.
        known: keys that minigpt uses.
    """
    unheard = sorted(
        key
        for key, value in record.items()
        if key not in known and key not in HARMLESS and value not in (None, False, *NEUTRAL.get(key, ()))
    )
    if unheard:
        notice_once(f"generation_config.json: minigpt ignores {', '.join(unheard)} (see docs/interop.md)")
