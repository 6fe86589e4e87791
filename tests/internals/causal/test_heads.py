"""Detectors of attention heads, on patterns made by hand and on a model whose induction head was written by hand."""

from __future__ import annotations

import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.attribution.weights import ordinary_ids
from minigpt.internals.causal.heads import (
    KINDS,
    LOOKS,
    copying_score,
    head_scores,
    heads,
    pattern_score,
    repeated_block,
)
from minigpt.internals.study import Study
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from planted import INDUCTION, PREVIOUS, induction_model
from toys import PRESETS, random_ids, random_model, tiny_config

ABCABC = torch.tensor([[5, 6, 7, 5, 6, 7]])


def looking(at: list[int]) -> torch.Tensor:
    """The pattern (1, 1, T, T) in which query i looks at slot at[i] alone."""
    return torch.nn.functional.one_hot(torch.tensor(at), len(at)).float()[None, None]


# Where a perfect head of each kind looks in A B C A B C; what it does where there is no such slot does not count.
PERFECT = {
    "previous": [0, 0, 1, 2, 3, 4],
    "duplicate": [0, 0, 0, 0, 1, 2],
    "induction": [0, 0, 0, 1, 2, 3],
    "current": [0, 1, 2, 3, 4, 5],
    "first": [0, 0, 0, 0, 0, 0],
    "offset": [0, 0, 0, 1, 2, 3],
}


@pytest.mark.parametrize("kind", LOOKS)
def test_a_perfect_head_scores_one_and_one_that_looks_elsewhere_nothing(kind: str) -> None:
    looks = LOOKS[kind](ABCABC, 2)
    assert pattern_score(looking(PERFECT[kind]), looks).tolist() == [1.0]
    # The first query can look at nothing but itself, and the second's previous token is the first.
    of_previous = {"previous": 1.0, "current": 1 / 6, "first": 1 / 5}
    assert pattern_score(looking(PERFECT["previous"]), looks).tolist() == [pytest.approx(of_previous.get(kind, 0.0))]
    of_current = {"current": 1.0}
    assert pattern_score(looking(PERFECT["current"]), looks).tolist() == [of_current.get(kind, 0.0)]


def test_half_the_attention_scores_half_and_heads_are_kept_apart() -> None:
    both = torch.cat([looking(PERFECT["duplicate"]), looking(PERFECT["induction"])], 1)
    mixed = torch.cat([both, both.mean(1, keepdim=True)], 1)
    assert pattern_score(mixed, LOOKS["induction"](ABCABC, 2)).tolist() == [0.0, 1.0, 0.5]


def test_every_earlier_occurrence_counts() -> None:
    aaba = torch.tensor([[1, 1, 2, 1]])
    assert LOOKS["duplicate"](aaba, 2)[0, 3].tolist() == [True, True, False, False]
    assert LOOKS["induction"](aaba, 2)[0, 3].tolist() == [False, True, True, False]
    assert LOOKS["induction"](aaba, 2)[0, 1].tolist() == [False, True, False, False]


def test_what_a_text_cannot_tell_is_refused() -> None:
    with pytest.raises(DataError, match="repetitions"):
        pattern_score(looking([0, 1, 2]), LOOKS["duplicate"](torch.tensor([[1, 2, 3]]), 2))


def test_copying_is_lifting_the_token_looked_at_above_the_others() -> None:
    pattern = looking([0, 0, 1])
    ids = torch.tensor([[30, 10, 20]])  # unique: 10, 20, 30
    at_30, at_10 = [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]
    assert copying_score(pattern, torch.tensor([[[at_30, at_30, at_10]]]), ids).tolist() == [1.0]
    assert copying_score(pattern, torch.tensor([[[at_10, at_10, at_30]]]), ids).tolist() == [0.0]
    assert copying_score(pattern, torch.tensor([[[at_30, at_10, [1.0, 0.0, 2.0]]]]), ids).tolist() == [0.5]


def test_a_planted_induction_head_is_found_where_it_was_planted() -> None:
    study = Study.of(induction_model())
    found = study.heads()
    assert found.best("previous") == (f"L{PREVIOUS[0]}H{PREVIOUS[1]}", pytest.approx(1.0, abs=0.01))
    label, score = found.best("induction")
    assert label == f"L{INDUCTION[0]}H{INDUCTION[1]}" and score > 0.9
    for kind, place in (("previous", PREVIOUS), ("induction", INDUCTION)):
        result = found.scores[kind]
        others = [value for labels, value in result.top(6) if labels != (str(place[0]), f"H{place[1]}")]
        assert len(others) == 5 and max(others) < 0.3
    assert found.scores["copying"][str(INDUCTION[0]), f"H{INDUCTION[1]}"] > 0.85
    assert (found.scores["copying"].values == 0.5).sum() == 5  # those that write nothing into the logits
    # Without either of the two nothing can be told of the second block; the others do nothing.
    without = {
        label: value for label, value in zip(found.table().axes[0].labels, found.table().values[:, -1], strict=True)
    }
    assert min(without["L0H1"], without["L1H2"]) > 0.5
    assert all(abs(without[label]) < 1e-6 for label in ("L0H0", "L0H2", "L1H0", "L1H1"))
    assert "most induction  L1H2" in str(found)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_shares_and_even_attention_gets_the_even_score(preset: str, kind: str) -> None:
    study = Study.of(random_model(tiny_config(preset)))
    result = head_scores(study, kind)
    assert [len(axis.labels) for axis in result.axes] == [2, 4]
    assert result.values.min() >= 0 and result.values.max() <= 1
    flat = random_model(tiny_config(preset), scale=0.0)  # every score is 0, so attention is even
    if kind != "copying":
        even = head_scores(Study.of(flat), kind)
        torch.testing.assert_close(torch.tensor(even.values), torch.full((2, 4), even.notes["even"]).to(torch.float32))


def test_blocks_are_of_ordinary_tokens_each_once_and_come_twice() -> None:
    study = Study.of(
        random_model(tiny_config("gpt2", vocab_size=300, block_size=24)), build_tokenizer(TokenizerConfig("byte"))
    )
    specials = set(study.tokenizer.specials.values())
    assert specials and study.tokenizer.vocab_size < 300
    ordinary = ordinary_ids(study).tolist()
    assert ordinary == [id for id in range(study.tokenizer.vocab_size) if id not in specials]
    ids = repeated_block(study, rows=5)
    assert ids.shape == (5, 24) and torch.equal(ids[:, :12], ids[:, 12:])
    assert all(len(set(row)) == 12 for row in ids[:, :12].tolist())
    assert set(ids.unique().tolist()) <= set(ordinary)
    assert torch.equal(ids, repeated_block(study, rows=5)) and not torch.equal(
        ids, repeated_block(study, rows=5, seed=1)
    )
    few = Study.of(random_model(tiny_config("gpt2", vocab_size=5)))
    assert repeated_block(few).shape == (8, 10)
    for length in (1, 13):
        with pytest.raises(ConfigError, match="expected 2 to 12"):
            repeated_block(study, length=length)


def test_what_is_no_kind_is_refused() -> None:
    study = Study.of(random_model(tiny_config("gpt2")))
    with pytest.raises(ConfigError, match="expected one of previous"):
        head_scores(study, "inductive")
    with pytest.raises(ConfigError, match="offset: 9"):
        heads(study, random_ids(1, 9), offset=9)
