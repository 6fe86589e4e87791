"""`Study`: read and edit activations of a model, with every analysis as a method.

    study = Study("runs/NAME")
    logits, cache = study.run_with_cache("ROMEO:", names=["pattern", "resid_post"])
    cache["pattern", 0]                                              (1, heads, positions, slots)

    def without_head_1(z, site): z[:, :, 1] = 0; return z
    with study.hooks({("z", 0): without_head_1}):
        study.loss("ROMEO: But soft")

access/access.py implements reading and editing; each analysis is a function in its own file.
"""

from __future__ import annotations

from typing import Any

from minigpt.internals.access.access import Access
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.names import Names, select
from minigpt.internals.access.writing import write
from minigpt.internals.attribution.attribution import attribute_logit
from minigpt.internals.attribution.decomposition import accumulated, components
from minigpt.internals.attribution.flow import rollout, value_flow
from minigpt.internals.attribution.jacobian import fit_jacobian_lens
from minigpt.internals.attribution.lens import logit_lens
from minigpt.internals.attribution.saliency import saliency
from minigpt.internals.attribution.translators import jacobian_lens, lens_quality, tuned_lens
from minigpt.internals.attribution.tuned import train_tuned_lens
from minigpt.internals.attribution.weights import composition, copying_from_weights, ov_circuit, qk_circuit
from minigpt.internals.causal.ablation import ablate
from minigpt.internals.causal.circuits import find_circuit
from minigpt.internals.causal.effect import effect
from minigpt.internals.causal.heads import head_scores, heads
from minigpt.internals.causal.patching import attribution_patch, patch
from minigpt.internals.causal.paths import patch_paths
from minigpt.internals.dynamics.compare import compare
from minigpt.internals.dynamics.context import in_context_score, loss_by_position
from minigpt.internals.dynamics.snapshot import snapshot
from minigpt.internals.features.autoencoder_metrics import feature_contexts, feature_effect, judge_autoencoder
from minigpt.internals.features.autoencoder_training import train_autoencoder
from minigpt.internals.features.neurons import neuron_effect, top_contexts
from minigpt.internals.features.probes import probe
from minigpt.internals.features.steering import steering_vector
from minigpt.internals.page.report import report


class Study(Access):
    """A model and its tokenizer with access to all activations (see `Access`) and all analyses as methods.

    Args:
        run: a run or checkpoint folder, or a `Run` from `minigpt.load`. For a model in memory, use
            `Study.of(model, tokenizer)`.
    """

    components = components
    accumulated = accumulated
    attribute_logit = attribute_logit
    logit_lens = logit_lens
    train_tuned_lens = train_tuned_lens
    tuned_lens = tuned_lens
    fit_jacobian_lens = fit_jacobian_lens
    jacobian_lens = jacobian_lens
    lens_quality = lens_quality
    saliency = saliency
    steering_vector = steering_vector
    probe = probe
    top_contexts = top_contexts
    neuron_effect = neuron_effect
    train_autoencoder = train_autoencoder
    judge_autoencoder = judge_autoencoder
    feature_contexts = feature_contexts
    feature_effect = feature_effect
    find_circuit = find_circuit
    head_scores = head_scores
    heads = heads
    effect = effect
    ablate = ablate
    loss_by_position = loss_by_position
    in_context_score = in_context_score
    snapshot = snapshot
    compare = compare
    ov_circuit = ov_circuit
    qk_circuit = qk_circuit
    copying_from_weights = copying_from_weights
    composition = composition
    rollout = rollout
    value_flow = value_flow
    patch = patch
    attribution_patch = attribution_patch
    patch_paths = patch_paths
    report = report

    def generate(self, prompt: str, names: Names = (), **settings: Any) -> tuple[Any, Activations]:
        """Generate text from a prompt with the edits of the active `hooks`, and return activations.

        Args:
            prompt: one text.
            names: activations to return, for every token except the last generated one, which was never an input.
            settings: fields of `minigpt.SamplingConfig`.

        Returns:
            The completion (see `minigpt.Sampler`) and the activations, with the shapes of one forward pass over all
            tokens but the last.
        """
        return write(self, prompt, select(self.config, names), settings)
