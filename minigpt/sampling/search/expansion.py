"""Three ways to rank the continuations of beams in a step of a search.

A ranking maps the continuations' summed log-probabilities, (R, V) for R beams, to keys, (R, V); the continuations with
the largest keys become the candidates. Adding Gumbel noise to log-probabilities and taking the largest samples without
replacement from the distribution (Vieira, 2014, "Gumbel-max trick and weighted reservoir sampling").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt.sampling.draws.noise import Noise, Purpose
from minigpt.sampling.search.hypotheses import NEVER, Beam, Candidate, Group


@dataclass(frozen=True)
class Step:
    """One step of several groups: R beams, one per row; the beams of a group are adjacent."""

    groups: Sequence[Group]
    totals: Tensor
    """Summed log-probabilities of the continuations, -inf for impossible ones: (R, V) float64."""
    own: Tensor
    """The model's log-probabilities: (R, V)."""
    positions: np.ndarray
    """Positions of the new tokens: (R,)."""
    noise: Noise

    @property
    def beams(self) -> list[Beam]:
        """The R beams."""
        return [beam for group in self.groups for beam in group.beams]

    def gumbels(self) -> Tensor:
        """Standard Gumbel noise for every possible continuation, independent between a prompt's beams: (R, V)."""
        lanes = np.array([lane for group in self.groups for lane in range(len(group.beams))])
        possible = (self.totals > NEVER).any(0).nonzero().squeeze(1)  # often only a few of a large vocabulary
        numbers = self.noise.table(self.positions, lanes, Purpose.SEARCH, possible.cpu().numpy())
        noise = torch.zeros_like(self.totals)
        noise[:, possible] = torch.from_numpy(gumbel(numbers)).to(noise.device)
        return noise


Ranking = Callable[[Step], Tensor]


def likeliest(step: Step) -> Tensor:
    """Beam search: rank by the summed log-probabilities."""
    return step.totals


def drawn(step: Step) -> Tensor:
    """Beam sampling: sample continuations without replacement, in proportion to their probabilities."""
    return step.totals + step.gumbels()


def drawn_top_down(step: Step) -> Tensor:
    """Stochastic beam search: perturbed log-probabilities, whose maximum over a beam's continuations is the beam's own.

    This finds the texts with the largest perturbed log-probabilities without enumerating all texts (Kool, van Hoof and
    Welling, 2019, arXiv:1903.06059). With G the beam's perturbed log-probability, g the unconditional ones of its
    continuations and Z the maximum of g, the key is -log(exp(-G) - exp(-Z) + exp(-g)), computed in a form that neither
    overflows nor cancels (their appendix B.3).
    """
    perturbed = step.totals + step.gumbels()
    greatest = perturbed.amax(-1, keepdim=True)
    own = torch.tensor([beam.key for beam in step.beams], dtype=torch.float64, device=perturbed.device).unsqueeze(1)
    below = own - perturbed + _log1mexp(perturbed - greatest)
    keys = own - below.clamp(min=0) - (-below.abs()).exp().log1p()
    return keys.masked_fill(step.totals == NEVER, NEVER)


def drawn_by(draw: Callable[[Tensor, int], Tensor]) -> Ranking:
    """A ranking by an external sampler.

    Args:
        draw: takes the summed log-probabilities of K beams, best beam first, flattened to (K * V,), and a count;
            returns the sampled indices.
    """

    def ranking(step: Step) -> Tensor:
        keys = torch.full_like(step.totals, NEVER)
        first, vocab_size = 0, keys.shape[1]
        for group in step.groups:
            order = sorted(range(len(group.beams)), key=lambda number: -group.beams[number].total)
            rows = [first + number for number in order]
            flat = keys.new_full((group.settings.width * vocab_size,), NEVER)
            flat[: len(rows) * vocab_size] = step.totals[rows].flatten()
            for rank, place in enumerate(draw(flat, min(group.looked_at, len(flat))).tolist()):
                if place < len(rows) * vocab_size:
                    keys[rows[place // vocab_size], place % vocab_size] = -rank
            first += len(rows)
        return keys

    return ranking


RANKINGS: dict[str, Ranking] = {"beam": likeliest, "sample": drawn, "stochastic": drawn_top_down}


def root_key(noise: Noise, position: np.ndarray) -> float:
    """The perturbed log-probability of the empty text, from which stochastic beam search starts."""
    return float(gumbel(noise.uniform(position, Purpose.SEARCH_ROOT))[0])


def gumbel(uniforms: np.ndarray) -> np.ndarray:
    """Convert uniform numbers in [0, 1) to standard Gumbel noise."""
    return -np.log(-np.log(np.maximum(uniforms, 2.0**-54)))


def candidates(step: Step, keys: Tensor) -> Iterator[list[Candidate]]:
    """Yield the candidates of each group, largest key first.

    Each beam contributes as many candidates as the group needs in total. The tokens of `Group.wanted` are always among
    them, regardless of their keys.
    """
    beams = [(group, number, beam) for group in step.groups for number, beam in enumerate(group.beams)]
    wanted = [sorted(group.wanted(beam)) for group, _, beam in beams]
    if any(wanted):
        rows = [row for row, tokens in enumerate(wanted) for _ in tokens]
        keys = keys.clone()
        keys[rows, [token for tokens in wanted for token in tokens]] = torch.inf
    count = max(group.looked_at for group in step.groups) + max(map(len, wanted))
    values, tokens = keys.topk(min(count, keys.shape[1]), dim=-1)  # (R, count)
    columns = (values, step.totals.gather(1, tokens), tokens.double(), step.own.gather(1, tokens).double())
    table = torch.stack(columns, dim=-1).tolist()  # one transfer to the host
    row = 0
    for group in step.groups:
        found = [
            Candidate(key, total, number, int(token), log_prob)
            for number in range(len(group.beams))
            for key, total, token, log_prob in table[row + number]
            if key > NEVER and total > NEVER
        ]
        row += len(group.beams)
        yield sorted(found, key=lambda candidate: (-candidate.key, candidate.beam, candidate.token))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0."""
    return torch.where(x > -0.7, (-x.expm1()).log(), (-x.exp()).log1p())
