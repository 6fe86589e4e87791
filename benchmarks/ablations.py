"""Ablate the modern recipe: configs/speedrun.yaml with one part changed at a time, on tinyshakespeare.

    python benchmarks/ablations.py --file input.txt                      all rows, three seeds
    python benchmarks/ablations.py --file input.txt --rows adamw,gelu    selected rows
    python benchmarks/ablations.py --file input.txt --steps 300          a shorter schedule

A row shows the loss on the whole validation split after the same number of steps (mean and spread over seeds), the
difference from the recipe in standard errors of that difference, and the step time relative to the recipe's. A part
stays in the recipe if the row without it has a higher loss at the same number of steps, or an equal loss and is slower.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import yaml

from runs import ROOT, Outcome, machine, run

RATES = yaml.safe_load((ROOT / "configs/speedrun.yaml").read_text())["optimizer"]


def rate(name: str, factor: float) -> list[str]:
    """Return flags that set a learning rate to the recipe's value times a factor."""
    return [f"--optimizer.{name}", f"{factor * RATES[name]:g}"]


# Row name -> (description, flags).
ROWS: dict[str, tuple[str, list[str]]] = {
    "recipe": ("configs/speedrun.yaml unchanged", []),
    "adamw": ("AdamW for the matrices too", ["--optimizer.name", "adamw", "--optimizer.learning_rate", "4e-3"]),
    "no-bigrams": ("no bigram embeddings", ["--model.bigram_rows", "0"]),
    "no-trigrams": ("no trigram embeddings", ["--model.trigram_rows", "0"]),
    "learned": ("learned positions instead of rotary", ["--model.position", "learned"]),
    "no-qk-norm": ("no norm of queries and keys", ["--model.qk_norm", "false"]),
    "gelu": ("GELU instead of squared ReLU", ["--model.activation", "gelu"]),
    "swiglu": ("SwiGLU instead of squared ReLU, same number of parameters", ["--model.activation", "swiglu"]),
    "random-init": ("random initialisation of output projections and unembedding", ["--model.zero_init", "false"]),
    "norm-weights": ("norms with learned weights", ["--model.norm_weight", "true"]),
    "layernorm": ("LayerNorm instead of RMSNorm", ["--model.norm", "layernorm"]),
    "no-softcap": ("no softcap", ["--model.logit_softcap", "0"]),
    "tied": ("one matrix for embedding and unembedding", ["--model.tie_embeddings", "true"]),
    "cosine": ("cosine decay", ["--optimizer.schedule", "cosine"]),
    "ema": ("averaged weights", ["--optimizer.ema_decay", "0.99"]),
    "ns-3": ("three Newton-Schulz steps for five", ["--optimizer.newton_schulz_steps", "3"]),
    "muon-half": ("half of Muon's learning rate", rate("muon_learning_rate", 0.5)),
    "muon-double": ("twice Muon's learning rate", rate("muon_learning_rate", 2)),
    "adamw-half": ("half of AdamW's learning rate", rate("learning_rate", 0.5)),
    "adamw-double": ("twice AdamW's learning rate", rate("learning_rate", 2)),
}


def main() -> None:
    """Print one line per row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated rows to run: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of the schedule; default: the config's")
    arguments = parser.parse_args()
    common = ["--eval.every", "0"]
    if arguments.steps:
        common += ["--trainer.max_steps", str(arguments.steps)]
    text = Path(arguments.file).resolve()
    wanted = ["recipe", *(row for row in arguments.rows.split(",") if row != "recipe")]
    recipe: list[Outcome] = []
    for row in wanted:
        meaning, flags = ROWS[row]
        outcomes = [run("speedrun", text, *common, *flags, "--seed", str(seed + 1)) for seed in range(arguments.seeds)]
        if not recipe:
            recipe = outcomes
            print(machine(outcomes[0].precision), flush=True)
        losses, base = [outcome.best for outcome in outcomes], [outcome.best for outcome in recipe]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        variance = spread**2 + statistics.stdev(base) ** 2 if len(losses) > 1 else float("nan")
        error = (variance / len(losses)) ** 0.5
        difference = statistics.mean(losses) - statistics.mean(base)
        ratio = statistics.median(o.step_seconds for o in outcomes) / statistics.median(o.step_seconds for o in recipe)
        mean, errors = statistics.mean(losses), difference / (error or 1)
        print(
            f"{row:12} {mean:.4f} +-{spread:.4f}  {difference:+.4f} ({errors:+.1f} errors)  step x {ratio:.2f}  "
            f"{meaning}",
            flush=True,
        )


if __name__ == "__main__":
    main()
