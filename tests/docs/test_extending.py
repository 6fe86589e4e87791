"""docs/extending.md: every recipe, applied as written to a copy of the package, trains, resumes and samples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from training_runs import corpus_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")

PROGRAM = """
import sys
import torch, minigpt
from minigpt.cli.main import main
from minigpt.errors import ConfigError
from minigpt.model.cost import cost_of
from minigpt.training.recipe.optimizer import make_optimizer, optimizer_tensors

text, = sys.argv[1:]
small = "--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --batch.tokens 128 --eval.every 0"
small = f"{small} --checkpoint.every 2 --sample.max_new_tokens 0 --trainer.precision 32-true --trainer.accelerator cpu"
mine = "--model.activation leaky_relu2 --tokenizer.kind ascii --optimizer.name lion --optimizer.warmup_steps 1"
def train(name, steps):
    words = f"train --data.source {text} --run_name {name} --trainer.max_steps {steps} --optimizer.schedule constant"
    assert main(f"{words} {small} {mine}".split()) == 0
    return minigpt.load(f"runs/{name}/checkpoints/step-{steps:08d}")
train("stopped", 2)
resumed, whole = train("stopped", 4), train("whole", 4)
assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
model, tokenizer = whole.model, whole.tokenizer
assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat" and tokenizer.kind == "ascii"

# Lion: in the first step each weight moves by the learning rate, against the sign of its gradient.
fresh = minigpt.GPT(model.config)
config = minigpt.TrainConfig.from_dict({"optimizer": {"name": "lion", "weight_decay": 0.0}})
optimizer = make_optimizer(fresh, config.optimizer)
before = [p.detach().clone() for p in fresh.parameters()]
ids = torch.tensor([tokenizer.encode("the cat sat on")])
fresh(ids).logsumexp(-1).sum().backward()
optimizer.step()
rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
for old, new in zip(before, fresh.parameters(), strict=True):
    torch.testing.assert_close(new, old - rates[new] * new.grad.sign())
held = sum(t.numel() for t in optimizer_tensors(optimizer, fresh).values())
assert cost_of(model.config).optimizer_bytes("lion") == 4 * held

hidden = model.trunk.blocks[0].mlp.hidden(torch.tensor([-2.0, 3.0]), None)
torch.testing.assert_close(hidden, torch.tensor([0.04, 9.0]))
torch.testing.assert_close(minigpt.Study(whole).logits("the cat"), model(torch.tensor([tokenizer.encode("the cat")])))

sampler = minigpt.Sampler(model, tokenizer)
with torch.no_grad():
    logits = model(torch.tensor([tokenizer.encode("the ")]))[0, -1]
falling, order = logits.sort(descending=True)
kept = order[: int((falling[:5] - falling[1:6]).argmax()) + 1].tolist()
((done,),) = sampler.generate("the ", top_gap=5, temperature=1.0, max_new_tokens=1, seed=1, top_logprobs=129)
possible = [token for token, p in done.details[0].processed_top if p > float("-inf")]
assert sorted(possible) == sorted(kept), (possible, kept)
try:
    minigpt.SamplingConfig(mirostat=2, top_gap=5).validate()
    raise SystemExit("mirostat beside top_gap was not refused")
except ConfigError as error:
    assert "top_gap" in str(error)
assert main(["vocab", "runs/whole", "--first", "2"]) == 0
assert main(["sample", "runs/whole", "--prompt", "the", "--top_gap", "4", "--max_new_tokens", "3"]) == 0
assert main(["plan", *small.split(), *mine.split(), "--data.source", text, "--measure", "false"]) == 0
"""


def test_every_recipe_works_as_written(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "corpora.yaml", tmp_path / "data")
    blocks = re.findall(r"^```(diff|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 17
    for kind, block in blocks:
        name, _, rest = block.partition("\n")
        path = tmp_path / name.removeprefix("# ")
        if kind == "python":
            path.write_text(rest, encoding="utf-8")
            continue
        lines = rest.splitlines(keepends=True)
        before = "".join(line[1:] if line.strip() else line for line in lines if line[0] != "+")
        after = "".join(line[1:] if line.strip() else line for line in lines if line[0] != "-")
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} holds these lines {text.count(before)} times:\n{before}"
        path.write_text(text.replace(before, after), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(corpus_file(tmp_path))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "     0 b'\\x00'\n     1 b'\\x01'\n" in done.stdout
