"""Induction heads are born where a text repeats itself: a small model, watched while it trains from nothing."""

from __future__ import annotations

import json
from pathlib import Path

from minigpt.data.catalogue import repeated_blocks
from minigpt.data.config import DataConfig
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.training.config import OptimizerConfig
from training_runs import run_and_read, tiny_run


def test_induction_heads_emerge_while_it_trains(tmp_path: Path) -> None:
    """As configs/induction.yaml, with shorter blocks, which takes half the tokens."""
    documents = [{"text": text} for text, _ in repeated_blocks(4096, 64, 4, 12, 0)]
    text = tmp_path / "repeats.jsonl"
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    shape = {"preset": "modern", "block_size": 32, "n_head": 2, "n_embd": 64, "norm_weight": True}
    config = tiny_run(
        tmp_path,
        data=DataConfig(source=str(text), folder=str(tmp_path / "data")),
        tokenizer=TokenizerConfig(kind="char"),
        optimizer=OptimizerConfig(schedule="constant"),
        batch__tokens=1024,
        trainer__max_steps=260,
        trainer__log_every_n_steps=260,
        trainer__precision="32-true",
        eval__tokens=1024,
        internals__every=65,
        **{f"model__{name}": value for name, value in shape.items()},
    )
    _, rows = run_and_read(config)
    taken = {row["step"]: row for row in rows if "internals/in_context/score" in row}

    def best(step: int, kind: str) -> tuple[float, str]:
        heads = {key: value for key, value in taken[step].items() if key.startswith(f"internals/{kind}/")}
        return max((value, key.rpartition("/")[2]) for key, value in heads.items())

    assert best(0, "induction")[0] < 0.1 and best(65, "induction")[0] < 0.1
    score, head = best(260, "induction")
    assert score > 0.5 and head.startswith("L1")  # a second layer is needed for it
    assert best(260, "previous")[0] > 0.2 and best(260, "previous")[1].startswith("L0")
    assert taken[260][f"internals/ablation/{head}"] > 0.3  # and the loss is the lower for it
    assert taken[0]["internals/in_context/score"] > -0.1 and taken[260]["internals/in_context/score"] < -1
