"""Models made ready for decoding: the same numbers as the model, other layouts."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.model import fast as home
from minigpt.model.fast import Compiled, PackedLinear, RelaidGPT, fast
from minigpt.sampling.loop.loop import stream_rows
from toys import PRESETS, random_ids, random_model, tiny_config

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9]]


def texts(model, prompts=PROMPTS, **options):
    events = stream_rows(model, prompts, max_new_tokens=12, seeds=[1] * len(prompts), **options)
    return [(event.prompt, event.token) for event in events]


def logits_of(model, rows: int) -> list[torch.Tensor]:
    """Logits after a prompt of 5 and after each of 4 further tokens."""
    ids = random_ids(rows, 9)
    cache = model.new_cache(rows, 9)
    with torch.no_grad():
        first = model.next_logits(ids[:, :5], cache)
        return [first, *[model.next_logits(ids[:, place : place + 1], cache) for place in range(5, 9)]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("large", [0, 2**20])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_relaid_model_gives_the_models_logits(preset: str, large: int, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(home, "LARGE", large)
    model = random_model(tiny_config(preset))
    ready = fast(model, rows)
    assert isinstance(ready, RelaidGPT)
    packed = sum(isinstance(module, PackedLinear) for module in ready.modules())
    assert packed == (0 if rows == 1 and large else len(home._linears(model)))
    for mine, its in zip(logits_of(ready, rows), logits_of(model, rows), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    assert texts(ready) == texts(model)


def test_the_model_itself_is_left_as_it_was() -> None:
    model = random_model(tiny_config("llama")).train()
    before = {name: (parameter.clone(), parameter.stride()) for name, parameter in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    texts(fast(model, 1)), texts(fast(model, 4))
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.stride() == before[name][1]
        assert parameter.requires_grad
    model(random_ids(2, 5)).sum().backward()  # gradients flow as ever


def test_float64_is_decoded_as_it_is() -> None:
    model = random_model(tiny_config("gpt2")).double()
    assert fast(model, 2) is model


def changed(model) -> None:
    """Change every tensor of a model in place, as an optimizer or load_state_dict does, and its buffers too."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(1.3).add_(0.1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("large", [0, 2**20])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_copy_and_its_model_share_nothing(preset: str, large: int, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(home, "LARGE", large)
    model = random_model(tiny_config(preset))
    ready = fast(model, rows)
    before, own = logits_of(ready, rows), logits_of(model, rows)
    changed(ready)
    assert all(map(torch.equal, logits_of(model, rows), own)), "the copy's tensors are its own"
    ready = fast(model, rows)
    changed(model)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the copy has no hook"))
    assert all(map(torch.equal, logits_of(ready, rows), before)), "wholly the model as it was"
    model.to(torch.bfloat16)
    assert all(map(torch.equal, logits_of(ready, rows), before))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("large", [0, 2**20])
def test_a_copy_refuses_what_would_change_it_or_reach_its_model(large: int, compiled: bool, monkeypatch) -> None:
    monkeypatch.setattr(home, "LARGE", large)
    monkeypatch.setattr(torch, "compile", lambda function, **named: function)
    model = random_model(tiny_config("gpt2"))
    ready, before = fast(model, 4, compiled=compiled), copy.deepcopy(model.state_dict())
    for forbidden in (
        lambda: ready.load_state_dict(before),
        lambda: ready.to(torch.bfloat16),
        lambda: ready.half(),
        lambda: ready.share_memory(),
        lambda: ready.state_dict(),
        lambda: copy.deepcopy(ready),
        lambda: pickle.dumps(ready),
    ):
        with pytest.raises(ConfigError, match=r"call minigpt\.fast again"):
            forbidden()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not tensor.is_shared() for tensor in model.parameters())


@pytest.mark.parametrize("change", [changed, lambda model: model.to(torch.float64), lambda model: model.tie()])
def test_a_compiled_model_with_packed_copies_refuses_to_decode_once_its_source_has_changed(change, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **named: function)
    model = random_model(tiny_config("gpt2", tie_embeddings=False))
    ready = fast(model, 4, compiled=True)
    texts(ready)
    change(model)
    with pytest.raises(ConfigError, match=r"since it was compiled; call minigpt\.fast again"):
        texts(ready)


class InductorError(Exception):
    """Named and placed as the compiler's errors are."""


InductorError.__module__ = "torch._inductor.exc"


def test_without_a_compiler_decoding_goes_on_with_one_line_of_notice(monkeypatch, capsys) -> None:
    model = random_model(tiny_config("modern"))

    def broken(*arguments: object, **named: object):
        raise InductorError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **named: broken)
    ready = fast(model, 4, compiled=True)
    assert isinstance(ready, Compiled)
    assert texts(ready) == texts(model)
    assert capsys.readouterr().err.count("torch.compile does not work here") == 1


@pytest.mark.parametrize("rows", [1, 4])
def test_the_compiled_steps_own_cache_is_that_of_the_model(rows: int, monkeypatch) -> None:
    """The step as it is given to the compiler, run uncompiled: even and uneven rows, rows that leave."""
    monkeypatch.setattr(torch, "compile", lambda function, **named: function)
    for preset in PRESETS:
        model = random_model(tiny_config(preset)).double()
        ready = fast(model, rows, compiled=True)
        assert texts(ready, PROMPTS[:rows]) == texts(model, PROMPTS[:rows])
        assert texts(ready, PROMPTS[:rows], end_ids=(7, 20)) == texts(model, PROMPTS[:rows], end_ids=(7, 20))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_compiled_model_writes_what_the_model_writes() -> None:
    model = random_model(tiny_config("gpt2", n_layer=1))
    ready = fast(model, 1, compiled=True)
    assert texts(ready, [[1, 2, 3]]) == texts(model, [[1, 2, 3]])
    assert isinstance(ready, Compiled) and not ready.broken
