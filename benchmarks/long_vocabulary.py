"""Cost of the loss with a large vocabulary: time and peak memory of unembedding and loss, forward and backward.

    python benchmarks/long_vocabulary.py                              GPT-2's vocabulary, 1,024 tokens
    python benchmarks/long_vocabulary.py --vocabulary 4096 --width 384 --tokens 8192

    plain           all logits at once, F.cross_entropy (loss.py's plain_loss)
    chunks          minigpt's loss: computes each chunk's gradients in the forward pass (chunked_loss)
    torch's         torch.nn.functional.linear_cross_entropy (torch 2.13), same chunks, without softcap
    checkpointed    torch.utils.checkpoint around each chunk: its logits are computed twice

Each variant runs in a separate process, so that the operating system's memory figure covers it alone; the variants
alternate. On a CPU the time is CPU time of all threads, which other programs affect little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.model.config import GPTConfig
from minigpt.model.gpt import Unembed
from minigpt.model.precision import widen
from minigpt.training.recipe.loss import CPU_LOGITS, GPU_LOGITS, chunked_loss, plain_loss
from runs import machine

SIDES = ("plain", "chunks", "torch's", "checkpointed")


class Head(nn.Module):
    """The last part of a GPT: given hidden states, and the unembedding."""

    def __init__(self, tokens: int, width: int, vocabulary: int, softcap: float) -> None:
        super().__init__()
        config = GPTConfig(n_embd=width, vocab_size=vocabulary, logit_softcap=softcap)
        self.hidden = nn.Parameter(torch.randn(1, tokens, width))
        self.unembed = Unembed(config)
        nn.init.normal_(self.unembed.weight, std=0.02)
        self.vocab_size = vocabulary

    def trunk(self, ids: Tensor) -> Tensor:
        return self.hidden

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembed(self.hidden)


def checkpointed_loss(head: Head, targets: Tensor, rows: int) -> Tensor:
    def nats(states: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(widen(head.unembed(states)), target, reduction="sum")

    pairs = zip(head.hidden[0].split(rows), targets[0].split(rows), strict=True)
    parts = [checkpoint(nats, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.stack(parts).sum() / targets.numel()


def torchs_loss(head: Head, targets: Tensor, rows: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    hidden, weight = head.hidden[0], head.unembed.weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return F.linear_cross_entropy(hidden, weight, targets[0], options=options)


def measure(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return seconds and peak memory, in bytes, of one step of a variant, after a warm-up step."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    head = Head(arguments.tokens, arguments.width, arguments.vocabulary, arguments.softcap).to(device)
    targets = torch.randint(arguments.vocabulary, (1, arguments.tokens), device=device)
    rows = arguments.rows or max(1, (GPU_LOGITS if gpu else CPU_LOGITS) // arguments.vocabulary)
    compute = {
        "plain": lambda: plain_loss(head, targets, targets),
        "chunks": lambda: chunked_loss(head, targets, targets, rows),
        "torch's": lambda: torchs_loss(head, targets, rows),
        "checkpointed": lambda: checkpointed_loss(head, targets, rows),
    }[side]
    seconds, loss, base = [], 0.0, 0
    for number in range(4):
        head.zero_grad()
        if number == 1:
            base = forget_peak(gpu)
        began = time.perf_counter() if gpu else time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            value = compute()
        value.backward()
        loss = value.item()
        seconds.append((time.perf_counter() if gpu else time.process_time()) - began)
    return {"seconds": min(seconds[1:]), "bytes": peak(gpu) - base, "loss": loss}


def forget_peak(gpu: bool) -> int:
    """Reset the peak memory counter; return the bytes in use now."""
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(gpu: bool) -> int:
    return torch.cuda.max_memory_allocated() if gpu else status("VmHWM")


def status(name: str) -> int:
    """Read a field of Linux's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, help="tokens per chunk; default: as in training")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    sides = [
        side for side in SIDES if side != "torch's" or (hasattr(F, "linear_cross_entropy") and not arguments.softcap)
    ]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side in sides:
            command = [sys.executable, *sys.argv, "--side", side]
            found[side].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(
        f"{arguments.tokens} tokens, V {arguments.vocabulary}, C {arguments.width}, "
        f"{machine('bfloat16 autocast' if arguments.bf16 else 'float32')}, "
        f"logits {arguments.tokens * arguments.vocabulary * 4 / 2**20:.0f} MiB; {arguments.rounds} rounds in turn"
    )
    print(f"{'':14}{'seconds':>9}{'x plain':>9}{'peak MiB':>10}{'x plain':>9}{'loss':>12}")
    plain = found["plain"]
    for side, rounds in found.items():
        times = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rounds, plain, strict=True))
        memory = statistics.median(a["bytes"] / b["bytes"] for a, b in zip(rounds, plain, strict=True))
        seconds = statistics.median(each["seconds"] for each in rounds)
        size = statistics.median(each["bytes"] for each in rounds) / 2**20
        print(f"{side:14}{seconds:9.2f}{times:9.2f}{size:10.0f}{memory:9.2f}{rounds[0]['loss']:12.6f}")


if __name__ == "__main__":
    main()
