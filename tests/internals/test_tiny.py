"""Every analysis on contexts of 1, 2 and 3 tokens, and on texts of one: an answer, or one line that holds together."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest

from minigpt.errors import ConfigError, MinigptError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Result, Tabled
from minigpt.internals.causal.effect import logit_difference
from minigpt.internals.causal.heads import KINDS, repeated_block
from minigpt.internals.features.autoencoder_config import AutoencoderConfig
from minigpt.internals.study import Study
from minigpt.tokenizer.plain import ByteTokenizer
from toys import random_model, tiny_config

CORPUS = "the cat sat on the mat and the dog sat on the log. " * 4
SMALL = AutoencoderConfig(steps=2, d_sae=8, batch=16, k=2)
OTHER = {"a": "b", "ab": "xb", "abc": "xbc"}
METRIC = logit_difference("c", "d")
INTENDED = {"composition"}  # of a head with those that come before it: elsewhere there is none


def lens_of(study, kind="tuned"):
    if kind == "tuned":
        return study.train_tuned_lens(CORPUS, steps=2, save=False)
    return study.fit_jacobian_lens(CORPUS, save=False)


def sae_of(study):
    return study.train_autoencoder(("resid_post", 0), config=SMALL, text=CORPUS)


ANALYSES = {
    "run_with_cache": lambda s, t: s.run_with_cache(t),
    "losses": lambda s, t: s.losses(t),
    "loss": lambda s, t: s.loss(t),
    "logits": lambda s, t: s.logits(t),
    "gradients": lambda s, t: s.gradients(t, lambda logits: logits[:, -1, 3].sum()),
    "generate": lambda s, t: s.generate(t, "resid_post", max_new_tokens=2),
    "components": lambda s, t: s.components(t),
    "accumulated": lambda s, t: s.accumulated(t),
    "attribute_logit": lambda s, t: s.attribute_logit(t, "c"),
    "logit_lens": lambda s, t: s.logit_lens(t),
    "train_tuned_lens": lambda s, t: lens_of(s),
    "tuned_lens": lambda s, t: s.tuned_lens(t, lens=lens_of(s)),
    "fit_jacobian_lens": lambda s, t: lens_of(s, "jacobian"),
    "jacobian_lens": lambda s, t: s.jacobian_lens(t, lens=lens_of(s, "jacobian")),
    "lens_quality": lambda s, t: s.lens_quality(lens_of(s), text=CORPUS),
    "saliency": lambda s, t: s.saliency(t, "c"),
    "steering_vector": lambda s, t: s.steering_vector([t, t], [OTHER[t]] * 2, ("resid_post", 0)),
    "probe": lambda s, t: s.probe([t, OTHER[t]] * 8, [0, 1] * 8),
    "top_contexts": lambda s, t: s.top_contexts(("post", 0), text=CORPUS),
    "top_contexts of the text": lambda s, t: s.top_contexts(("post", 0), text=t),
    "neuron_effect": lambda s, t: s.neuron_effect(0, 3),
    "train_autoencoder": lambda s, t: sae_of(s),
    "judge_autoencoder": lambda s, t: s.judge_autoencoder(sae_of(s), text=CORPUS),
    "judge_autoencoder of the text": lambda s, t: s.judge_autoencoder(sae_of(s), text=t),
    "feature_contexts": lambda s, t: s.feature_contexts(sae_of(s), text=CORPUS),
    "feature_effect": lambda s, t: s.feature_effect(sae_of(s), 3),
    "find_circuit": lambda s, t: s.find_circuit(t, OTHER[t], METRIC),
    "head_scores": lambda s, t: s.head_scores("induction"),
    "heads": lambda s, t: s.heads(),
    "heads of the text": lambda s, t: s.heads(t),
    **{f"head_scores {kind}": (lambda s, t, kind=kind: s.head_scores(kind, t)) for kind in KINDS},
    "effect": lambda s, t: s.effect(t, {("z", 0): 0.0}),
    "ablate": lambda s, t: s.ablate(t),
    "loss_by_position": lambda s, t: s.loss_by_position(t),
    "in_context_score": lambda s, t: s.in_context_score(t),
    "snapshot": lambda s, t: s.snapshot(t),
    "compare": lambda s, t: s.compare(s, t),
    "ov_circuit": lambda s, t: s.ov_circuit(0, 0),
    "qk_circuit": lambda s, t: s.qk_circuit(0, 0),
    "copying_from_weights": lambda s, t: s.copying_from_weights(),
    "composition": lambda s, t: s.composition("K"),
    "rollout": lambda s, t: s.rollout(t),
    "value_flow": lambda s, t: s.value_flow(t),
    "patch": lambda s, t: s.patch(t, OTHER[t], METRIC),
    "attribution_patch": lambda s, t: s.attribution_patch(t, OTHER[t], METRIC),
    "patch_paths": lambda s, t: s.patch_paths(t, OTHER[t], METRIC),
    "report": lambda s, t: s.report(t).html(),
}
PLUMBING = {"hooks", "watch", "forward", "running", "of"}  # ways into a run, not answers about one


def test_the_table_has_every_method_of_a_study():
    public = {name for name, _ in inspect.getmembers(Study, inspect.isfunction) if not name.startswith("_")}
    inherited = {name for name in public if name not in {**vars(Access), **vars(Study)}}
    assert public - inherited - PLUMBING == {name.partition(" ")[0] for name in ANALYSES}


@pytest.mark.parametrize(("block", "text"), [(1, "a"), (2, "a"), (2, "ab"), (3, "abc"), (16, "a")])
@pytest.mark.parametrize("name", ANALYSES)
def test_an_answer_of_numbers_or_one_line_that_holds_together(name, block, text):
    model = random_model(tiny_config("modern", vocab_size=257, block_size=block, n_layer=1, n_head=2, n_kv_head=2))
    try:
        found = ANALYSES[name](Study.of(model, ByteTokenizer()), text)
    except MinigptError as error:
        assert_holds_together(str(error), block, text)
        return
    for part in found if isinstance(found, tuple) else (found,):
        result = part.table() if isinstance(part, Tabled) else part
        if isinstance(result, Result) and result.values.dtype.kind == "f" and name not in INTENDED:
            assert not np.isnan(result.values).any(), f"{result.title} has a NaN"


def assert_holds_together(message: str, block: int, text: str) -> None:
    assert "\n" not in message
    for low, high in re.findall(r"(?:expected|from) (-?\d+)(?: to| \.\.) (-?\d+)", message):
        assert int(low) <= int(high), message
    assert not re.search(r"at most (0|-\d)|shape \(\d+, 0\)", message), message
    assert re.search(r"block_size|text|token", message), message


def test_what_needs_a_block_that_comes_twice_is_refused_in_words_or_left_out():
    study = Study.of(random_model(tiny_config("modern", vocab_size=257, block_size=3)), ByteTokenizer())
    with pytest.raises(ConfigError, match=r"needs a block_size of at least 4 .* this model has block_size 3"):
        repeated_block(study)
    assert study.head_scores("previous", "abc").values.shape == (2, 4)
    badges = study.report("abc").data["attn"]["badges"]
    assert set(badges["L0H0"]) == {"effect"}
    assert (
        {"ablation", "entropy"} <= set(study.snapshot("abc")) - {"induction", "previous"} == set(study.snapshot("abc"))
    )
    four = Study.of(random_model(tiny_config("modern", vocab_size=257, block_size=4)), ByteTokenizer())
    assert {"effect", "induction"} < set(four.report("abc").data["attn"]["badges"]["L0H0"])
    assert {"induction", "previous"} < set(four.snapshot("abcd"))
