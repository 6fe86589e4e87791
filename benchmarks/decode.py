"""Decoding speed: minigpt compared with transformers' generate on the same weights, and with a lower bound ("floor").

    python benchmarks/decode.py                   all tables, about 20 minutes
    python benchmarks/decode.py --only small      rows whose name contains this text
    python benchmarks/decode.py --compile         the compiled rows too

minigpt decodes with `minigpt.model.fast` (packed weights); the plain and the compiled model are shown as well. The
floor is the time of the same linear layers, in PyTorch's own layout, plus attention over the same number of cached
tokens: no norms, no activations, no token choice, no loop over rows. All variants use float32 and the same threads,
without speculative decoding or quantisation. Each generates 200 tokens after a prompt of 16, without end-of-text. Where
the result is deterministic, the tokens are compared before timing. The variants alternate; the tables show medians, and
medians of the ratios of each round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from minigpt.checkpoint.saving import state_of
from minigpt.checkpoint.weights import to_huggingface
from minigpt.model.config import GPTConfig
from minigpt.model.fast import fast
from minigpt.model.gpt import GPT
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from runs import machine

PROMPT, NEW = 16, 200


class Numbers:
    """Dummy tokenizer: prompts are token ids, and only decoding is measured."""

    kind, eot = "numbers", None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Return nothing: text is not needed."""
        return []

    def decode(self, ids: list[int]) -> str:
        """Return nothing: text is not needed."""
        return ""

    def stream_decoder(self) -> Numbers:
        """Return itself: it has no state."""
        return self

    def push(self, token: int) -> str:
        """Return nothing: text is not needed."""
        return ""

    def flush(self) -> str:
        """Return nothing: text is not needed."""
        return ""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with GPT-2's architecture."""

    name: str
    layers: int
    heads: int
    width: int
    vocabulary: int

    def make(self) -> GPT:
        """Build the model with random weights, large enough that the most likely token is clear."""
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(
                preset="gpt2",
                n_layer=self.layers,
                n_head=self.heads,
                n_embd=self.width,
                vocab_size=self.vocabulary,
                block_size=512,
            )
        )
        return model.eval()


SMALL = Shape("small (6 layers, 384, V 65)", 6, 6, 384, 65)
GPT2 = Shape("GPT-2 (12 layers, 768, V 50257)", 12, 12, 768, 50257)


def twin(model: GPT) -> transformers.GPT2LMHeadModel:
    """Return the model with the same weights in transformers."""
    layout = to_huggingface(model.config, state_of(model))
    assert layout is not None
    values, tensors = layout
    values = {name: value for name, value in values.items() if name != "architectures"}
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values, bos_token_id=None, eos_token_id=None))
    other.load_state_dict(tensors, strict=False)
    return other.eval()


def floor(model: GPT, rows: int) -> Callable[[], None]:
    """Run only the linear layers and attention of NEW - 1 decoding steps, without the prefill of the prompt."""
    config = model.config
    width = config.n_embd // config.n_head
    keys, values = torch.randn(2, config.n_layer, rows, config.n_head, PROMPT + NEW, width)
    query, start = torch.randn(rows, config.n_head, 1, width), torch.randn(rows, config.n_embd)
    layers = [
        [(part.weight, part.bias) for part in (block.attn.qkv, block.attn.proj, block.mlp.up, block.mlp.down)]
        for block in model.trunk.blocks
    ]

    @torch.inference_mode()
    def run() -> None:
        for length in range(PROMPT + 1, PROMPT + NEW):
            x = start
            for layer, (qkv, proj, up, down) in enumerate(layers):
                F.linear(x, *qkv)
                F.scaled_dot_product_attention(query, keys[layer, :, :, :length], values[layer, :, :, :length])
                x = F.linear(F.linear(F.linear(x, *proj), *up), *down)
            F.linear(x, model.unembed.weight)

    return run


def rounds(sides: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round; the variants alternate, after one warm-up run each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(count + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def tell(name: str, times: dict[str, list[float]], tokens: int) -> None:
    """Print a row: tokens per second of each variant, and the ratios of minigpt's variants to the others."""
    told = [f"{side} {tokens / statistics.median(each):,.0f}" for side, each in times.items()]
    for side in times:
        if side.startswith("minigpt"):
            for other in ("transformers", "floor"):
                if other in times:
                    ratios = [theirs / ours for theirs, ours in zip(times[other], times[side], strict=True)]
                    spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
                    told.append(f"{side}/{other} {statistics.median(ratios):.2f} ({spread})")
    print(f"{name:46} " + "   ".join(told), flush=True)


def prompts_of(rows: int, vocabulary: int, lengths: list[int] | None = None) -> list[list[int]]:
    """Return random prompts of token ids, without id 0, which is the padding."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths or [PROMPT] * rows
    ]


def decoding(shape: Shape, rows: int, count: int, compile_too: bool, beams: int = 1, samples: int = 1) -> None:
    """Measure and print one row of the main table."""
    model = shape.make()
    other = twin(model)
    prompts = prompts_of(rows, shape.vocabulary)
    ids = torch.tensor(prompts)
    settings = {"max_new_tokens": NEW, "num_beams": beams, "num_return_sequences": samples}
    settings["temperature"] = 1.0 if samples > 1 else 0.0
    config = SamplingConfig(**settings, seed=1)  # type: ignore[arg-type]
    theirs_extra = {"do_sample": samples > 1, "top_k": 0} if samples > 1 else {"do_sample": False}

    def theirs() -> Tensor:
        with torch.no_grad():
            return other.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                pad_token_id=0,
                num_beams=beams,
                num_return_sequences=samples,
                **theirs_extra,
            )

    def ours(of: object) -> Callable[[], list[list[list[int]]]]:
        sampler = Sampler(of, Numbers(shape.vocabulary), config)  # type: ignore[arg-type]
        return lambda: [[one.ids for one in each] for each in sampler.generate(prompts)]

    what = f"{beams} beams" if beams > 1 else f"{samples} samples" if samples > 1 else f"batch {rows}"
    together = rows * beams * samples
    sides: dict[str, Callable[[], object]] = {
        "floor": floor(model, together),
        "transformers": theirs,
        "minigpt, plain model": ours(model),
        "minigpt": ours(fast(model, together)),
    }
    if compile_too:
        compiled = ours(fast(model, together, compiled=True))
        began = time.perf_counter()
        compiled()
        print(f"  first call with compilation: {time.perf_counter() - began:.0f} s")
        sides["minigpt, compiled"] = compiled
    if samples == 1:
        expected = theirs()[:, PROMPT:].tolist()
        for name, side in sides.items():
            if name.startswith("minigpt"):
                same = [one[0] for one in side()] == expected  # type: ignore[attr-defined]
                print(f"  {shape.name}, {what}: {name}'s tokens {'equal' if same else 'DIFFER FROM'} transformers'")
    tell(f"{shape.name}, {what}", rounds(sides, count), rows * samples * NEW)


def ragged(count: int) -> None:
    """Measure prompts of different lengths, each with a different number of new tokens."""
    model = SMALL.make()
    other = twin(model)
    chance = random.Random(2)
    prompts = prompts_of(32, SMALL.vocabulary, [chance.randint(16, 200) for _ in range(32)])
    wanted = [chance.randint(10, 300) for _ in prompts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    ends = torch.tensor([longest + room for room in wanted])

    class AllWritten(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            return input_ids.shape[1] >= ends

    def theirs() -> Tensor:
        with torch.no_grad():
            return other.generate(
                ids,
                attention_mask=(ids != 0).long(),
                max_new_tokens=max(wanted),
                pad_token_id=0,
                do_sample=False,
                stopping_criteria=[AllWritten()],
            )

    sampler = Sampler(fast(model, 32), Numbers(SMALL.vocabulary), SamplingConfig(temperature=0))  # type: ignore[arg-type]

    def ours() -> list[list[int]]:
        return [each[0].ids for each in sampler.generate(prompts, max_new_tokens=wanted)]

    rows = theirs()[:, longest:].tolist()
    same = [row[:room] for row, room in zip(rows, wanted, strict=True)] == ours()
    print(f"  ragged rows: minigpt's tokens {'equal' if same else 'DIFFER FROM'} transformers'")
    tell("small, 32 ragged prompts and ends", rounds({"transformers": theirs, "minigpt": ours}, count), sum(wanted))


TEN = {
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "no_repeat_ngram_size": 3,
    "dry_multiplier": 0.8,
    "logit_bias": {5: 0.5},
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.05,
}


def processors(count: int, gain: float) -> None:
    """Measure the time that ten processors add to a sampling step of GPT-2 at batch 8.

    With random weights the distribution is nearly flat: nine tenths of the mass lie on 38,000 tokens. A gain on the
    last norm makes it as narrow as a trained model's.
    """
    model = GPT2.make()
    with torch.no_grad():
        model.trunk.norm.weight.mul_(gain)
    prompts = prompts_of(8, GPT2.vocabulary)
    base = SamplingConfig(max_new_tokens=64, seed=1, temperature=1.0)
    sampler = Sampler(fast(model, 8), Numbers(GPT2.vocabulary), base)  # type: ignore[arg-type]
    without = {name: value for name, value in TEN.items() if name != "top_k"}
    sides: dict[str, Callable[[], object]] = {
        "plain sampling": lambda: sampler.generate(prompts),
        "ten processors": lambda: sampler.generate(prompts, **TEN),
        "without top-k": lambda: sampler.generate(prompts, **without),
    }
    times = rounds(sides, count)
    for name in ("ten processors", "without top-k"):
        added = [ours / plain - 1 for ours, plain in zip(times[name], times["plain sampling"], strict=True)]
        print(
            f"GPT-2, batch 8, gain {gain:g}, {name:24} add {statistics.median(added):6.1%} "
            f"({min(added):.1%}..{max(added):.1%})"
        )


def growth(count: int) -> None:
    """Print the time per token by the number of tokens before it; it should grow linearly."""
    model = SMALL.make()
    sampler = Sampler(model, Numbers(SMALL.vocabulary), SamplingConfig(temperature=0))  # type: ignore[arg-type]
    runs = []
    for _ in range(count + 2):
        marks = [time.perf_counter()]
        for _event in sampler.stream([prompts_of(1, SMALL.vocabulary)[0]], max_new_tokens=480):
            marks.append(time.perf_counter())
        runs.append([after - before for before, after in pairwise(marks[1:])])
    middle = torch.tensor(runs).double().median(0).values
    steps = torch.arange(len(middle)).double() + PROMPT
    for power in (1, 2):
        terms = torch.stack([steps**n for n in range(power + 1)], dim=1)
        fit = torch.linalg.lstsq(terms, middle.unsqueeze(1)).solution.squeeze(1)
        shape = " + ".join(f"{value * 1e6:.4g} S^{n}" for n, value in enumerate(fit.tolist()))
        print(f"small, batch 1: microseconds a token after S tokens = {shape}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only rows whose name contains this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    count, compile_too = arguments.rounds, arguments.compile
    rows: dict[str, Callable[[], None]] = {
        "small batch 1": lambda: decoding(SMALL, 1, count, compile_too),
        "small batch 32": lambda: decoding(SMALL, 32, count, compile_too),
        "small beams": lambda: decoding(SMALL, 1, count, compile_too, beams=5),
        "small samples": lambda: decoding(SMALL, 1, count, compile_too, samples=8),
        "gpt2 batch 1": lambda: decoding(GPT2, 1, max(2, count - 2), compile_too),
        "gpt2 batch 16": lambda: decoding(GPT2, 16, max(2, count - 2), compile_too),
        "ragged": lambda: ragged(count),
        "processors": lambda: (processors(count, 8.0), processors(count, 1.0)),
        "growth": lambda: growth(count),
    }
    print(f"{machine('float32')}, transformers {transformers.__version__}")
    for name, row in rows.items():
        if arguments.only in name:
            row()


if __name__ == "__main__":
    main()
