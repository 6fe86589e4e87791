"""Where the verbs run: on a GPU where there is one, and as a line on standard error says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.checkpoint import checkpoint
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.errors import ConfigError
from minigpt.model.device import pick_device
from minigpt.tokenizer.plain import ByteTokenizer
from toys import random_model, tiny_config


def here(patched: pytest.MonkeyPatch, *kinds: str) -> None:
    patched.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
    patched.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)


@pytest.mark.parametrize(
    ("kinds", "float64", "expected"),
    [
        ((), False, "cpu"),
        (("cuda",), False, "cuda"),
        (("mps",), False, "mps"),
        (("mps",), True, "cpu"),
        (("cuda", "mps"), True, "cuda"),
    ],
)
def test_auto_is_the_best_that_is_here_and_can_do_it(kinds, float64, expected, monkeypatch, capsys):
    here(monkeypatch, *kinds)
    assert pick_device("auto", float64) == pick_device(float64=float64) == expected
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == (0 if expected == "cpu" else 2)
    assert expected == "cpu" or f"running on {expected}; use --device cpu" in said.err


def test_a_device_that_is_named_is_taken_or_refused(monkeypatch, capsys):
    here(monkeypatch, "cuda", "mps")
    assert [pick_device(name) for name in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "cuda", "cuda:1", "mps"]
    capsys.readouterr()
    pick_device("mps", float64=True)
    assert "does not support float64" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--device tpu: not available; available: cuda, mps, cpu"):
        pick_device("tpu")
    here(monkeypatch)
    with pytest.raises(ConfigError, match="--device cuda: not available; available: cpu"):
        pick_device("cuda")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("device")
    save_checkpoint(folder / "model", random_model(tiny_config("modern", vocab_size=257)), ByteTokenizer())
    return str(folder / "model")


VERBS = {
    "sample": ["--prompt", "a", "--max_new_tokens", "2"],
    "eval": ["--data.source", "TEXT"],
    "inspect": ["the cat", "--json"],
    "lens": ["the cat"],
    "heads": [],
    "patch": ["--clean", "ab", "--corrupted", "xb", "--answer", "c"],
    "sae": ["show"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("flags", "expected"), [([], "cuda"), (["--device", "cpu"], "cpu"), (["--device", "auto"], "cuda")]
)
def test_every_verb_goes_where_the_flag_says_and_by_itself_to_the_gpu(
    verb, flags, expected, run, tmp_path, monkeypatch, capsys
):
    """The way to a GPU that is not there is followed up to where a model would be sent to it."""
    here(monkeypatch, "cuda")
    sent = []

    def send(self, device=None, *args, **kwargs):
        sent.append(str(device))
        raise ConfigError(f"sent to {device}")

    monkeypatch.setattr(checkpoint, "filled_model", lambda *a, device, **k: send(None, device))
    if verb == "sample":
        monkeypatch.setattr(torch.nn.Module, "to", send)
        monkeypatch.setattr("minigpt.sampling.run.load", lambda *a, device: FakeRun(device))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat")
    arguments = ["text.txt" if word == "TEXT" else word for word in VERBS[verb]]
    assert main([verb, run, *arguments, *flags]) == 2
    assert sent == [expected]
    err = capsys.readouterr().err
    assert ("running on cuda" in err) is (expected == "cuda")


class FakeRun:
    """A loaded run whose model tells where it is sent."""

    def __init__(self, device: str) -> None:
        assert device == "cpu", "the file is read by the processor"
        self.model, self.tokenizer, self.sampling = torch.nn.Linear(1, 1), ByteTokenizer(), {}


def test_loading_stays_on_the_processor_unless_asked(run, monkeypatch):
    here(monkeypatch, "mps")
    assert minigpt.load(run).model.device.type == "cpu"
    asked = []
    monkeypatch.setattr(
        checkpoint, "filled_model", lambda *a, device, **k: asked.append(device) or random_model(tiny_config("gpt2"))
    )
    monkeypatch.setattr(checkpoint, "check_logits", lambda model, folder: None)  # the model is another one
    minigpt.load(run, device="auto")
    minigpt.load(run, device=torch.device("cpu"))
    assert asked == ["mps", torch.device("cpu")]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."),
            2,
            "does not support float64",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            9,
            "out of device memory (CUDA out of memory); use --device",
        ),
    ],
)
def test_what_the_device_cannot_do_is_one_line(error, code, line, run, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("minigpt.sampling.sampler.Sampler.stream", fail)
    assert main(["sample", run, "--prompt", "a", "--device", "cpu"]) == code
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    with pytest.raises(type(error)):
        main(["sample", run, "--prompt", "a", "--device", "cpu", "--debug"])
    monkeypatch.undo()
    monkeypatch.setattr("minigpt.sampling.sampler.Sampler.stream", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["sample", run, "--prompt", "a", "--device", "cpu"])
