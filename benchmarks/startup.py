"""Start-up times: imports, every `--help`, the first token, and loading a model.

python benchmarks/startup.py

First table: median seconds of seven runs, each in a new process, alternating with a bare `python -c pass`, whose time
is included in all others. "first token" is the whole command `python sample.py RUN --prompt x --max_new_tokens 1` for a
run of the default size (a million parameters, random weights); most of it is `import torch`.

Second table: `minigpt.load` of a Hugging Face folder with 135 million parameters in Llama's architecture (30 layers,
576 channels, V 49152, random weights), compared with safetensors.torch.load_file of the same file, which maps it
without reading, and with the same followed by a copy of every tensor. They alternate in one process, after a warm-up
round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from minigpt.cli.main import VERBS

ROOT = Path(__file__).parents[1]
ROUNDS = 7


def seconds(*arguments: str) -> float:
    """Run a process; return its wall-clock seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - began


def timed(call: Callable[[], object]) -> float:
    """Return wall-clock seconds of a call; its result is freed after the measurement."""
    began = time.perf_counter()
    kept = call()
    taken = time.perf_counter() - began
    del kept
    return taken


def make_run(folder: Path) -> Path:
    """Write a run of the untrained default model, with a vocabulary of 1,024 trained on this package's source."""
    from minigpt.checkpoint.saving import save_checkpoint
    from minigpt.model.config import GPTConfig
    from minigpt.model.gpt import GPT
    from minigpt.tokenizer.train_bpe import train_bpe

    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "minigpt").rglob("*.py")]
    tokenizer = train_bpe(texts, 1024, False)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size))
    save_checkpoint(folder / "checkpoints" / "step-00000001", model, tokenizer)
    return folder


def make_llama(folder: Path) -> Path:
    """Write a Hugging Face Llama folder with 135 million parameters."""
    from minigpt.checkpoint.saving import state_of
    from minigpt.checkpoint.tensors import save_tensors
    from minigpt.checkpoint.weights import to_huggingface
    from minigpt.model.config import GPTConfig
    from minigpt.model.gpt import GPT
    from minigpt.tokenizer.build import save_tokenizer
    from minigpt.tokenizer.plain import ByteTokenizer

    sizes = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_inner": 1536}
    config = GPTConfig(preset="llama", vocab_size=49152, block_size=2048, tie_embeddings=True, **sizes)  # type: ignore[arg-type]
    layout = to_huggingface(config, state_of(GPT(config)))
    assert layout is not None
    save_tensors(folder / "model.safetensors", layout[1])
    (folder / "config.json").write_text(json.dumps(layout[0]), encoding="utf-8")
    save_tokenizer(ByteTokenizer(), folder)
    return folder


def print_processes(run: Path) -> None:
    """Print the times of processes."""
    commands = {"python -c pass": ["-c", "pass"], "import minigpt": ["-c", "import minigpt"]}
    commands |= {f"minigpt {verb} --help": ["-m", "minigpt", verb, "--help"] for verb in ["", *VERBS]}
    commands["import torch"] = ["-c", "import torch"]
    commands["first token"] = ["sample.py", str(run), "--prompt", "x", "--max_new_tokens", "1"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, arguments in commands.items():
            times[name].append(seconds(*[part for part in arguments if part]))
    print(f"{'':24}{'median':>9}{'max':>9}{'over bare python':>20}")
    floor = statistics.median(times["python -c pass"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{name:24}{median:8.3f}s{max(taken):8.3f}s{median - floor:19.3f}s")


def print_loading(folder: Path) -> None:
    """Print the times of loading a model."""
    from minigpt.checkpoint.tensors import load_tensors
    from minigpt.sampling.run import load

    path = folder / "model.safetensors"
    calls: dict[str, Callable[[], object]] = {
        "load_file": lambda: load_tensors(path),
        "load_file and a copy": lambda: [tensor.clone() for tensor in load_tensors(path).values()],
        "minigpt.load": lambda: load(folder),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(ROUNDS + 1):
        for name, call in calls.items():
            taken = timed(call)
            if round:
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"\n{'135 M parameters':24}{'median':>9}{'minigpt.load is':>20}")
    for name, median in medians.items():
        print(f"{name:24}{median:8.3f}s{medians['minigpt.load'] / median:14.2f} times")


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as temporary:
        print_processes(make_run(Path(temporary) / "run"))
        print_loading(make_llama(Path(temporary) / "llama"))


if __name__ == "__main__":
    main()
