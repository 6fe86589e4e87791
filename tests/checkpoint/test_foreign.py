"""Folders that transformers wrote or changed: both lm_heads, our record gone stale, text that begins with <s>."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import minigpt
from minigpt.checkpoint.filling import filled_model
from minigpt.checkpoint.saving import save_checkpoint, state_of
from minigpt.checkpoint.weights import to_huggingface
from minigpt.data.config import DataConfig
from minigpt.errors import CheckpointError
from minigpt.evaluation.text import evaluate_run
from minigpt.tokenizer.build import load_tokenizer, save_tokenizer
from minigpt.tokenizer.huggingface import HuggingFaceTokenizer
from minigpt.tokenizer.plain import ByteTokenizer
from tokenizer_files import byte_level, sentencepiece, template
from toys import needs_transformers, random_ids, random_model, tiny_config

pytestmark = needs_transformers(">=5.24", "folders are read as this version reads them")

ROOT = Path(__file__).parents[2]
IDS = random_ids(2, 20)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def same_logits(folder: Path, ids: torch.Tensor = IDS) -> minigpt.Run:
    """Load a folder in minigpt and in transformers, and compare."""
    run = minigpt.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(run.model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    return run


def folder_of(path: Path, config: minigpt.GPTConfig) -> Path:
    """A Hugging Face folder with random weights, without minigpt's record."""
    path.mkdir()
    layout = to_huggingface(config, state_of(random_model(config)))
    assert layout is not None
    (path / "config.json").write_text(json.dumps(layout[0]))
    save_file(layout[1], path / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(ByteTokenizer(), path)
    return path


# A config that says tied, and a file that holds both.


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_a_tied_config_and_an_lm_head_of_its_own_use_both(preset: str, tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "folder", tiny_config(preset, tie_embeddings=False))
    edit(folder / "config.json", tie_word_embeddings=True)
    run = same_logits(folder)
    assert not run.model.config.tie_embeddings
    assert "tie_word_embeddings is true, but the weights hold an lm_head" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
@pytest.mark.parametrize("held", ["both, equal", "lm_head alone"])
def test_a_tied_model_shares_what_its_file_holds(preset: str, held: str, tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "folder", tiny_config(preset, tie_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[preset]
    tensors["lm_head.weight"] = tensors[name].clone() if held == "both, equal" else tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    run = same_logits(folder)
    assert run.model.unembed.weight is run.model.trunk.embed.weight
    assert "lm_head" not in capsys.readouterr().err


def test_a_base_models_file_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", tiny_config("llama", tie_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    same_logits(folder)


# Our record, after another program changed what is beside it.


def saved_again(tmp_path: Path, preset: str, change: Any = None, **config: Any) -> Path:
    """A checkpoint of ours, opened, changed and saved by transformers."""
    checkpoint = save_checkpoint(tmp_path / "step-00000001", random_model(tiny_config(preset)), ByteTokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **config)
    if change:
        change(model)
    model.save_pretrained(tmp_path / "again")
    save_tokenizer(ByteTokenizer(), tmp_path / "again")
    assert "minigpt" in json.loads((tmp_path / "again" / "config.json").read_text())
    return tmp_path / "again"


def cut_a_layer(model: Any) -> None:
    layers = model.model.layers if model.config.model_type == "llama" else model.transformer.h
    del layers[1:]
    model.config.num_hidden_layers = 1


def test_a_checkpoint_that_transformers_saved_again_is_the_same(tmp_path: Path, capsys: Any) -> None:
    run = same_logits(saved_again(tmp_path, "llama"))
    assert run.model.config == tiny_config("llama")
    assert "was changed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "change", "config", "named"),
    [
        ("llama", lambda model: model.resize_token_embeddings(70), {}, "vocab_size 70 (then 61)"),
        ("gpt2", lambda model: model.resize_token_embeddings(50), {}, "vocab_size 50 (then 61)"),
        ("llama", cut_a_layer, {}, "n_layer 1 (then 2)"),
        ("gpt2", cut_a_layer, {}, "n_layer 1 (then 2)"),
        ("llama", None, {"rms_norm_eps": 0.1}, "norm_eps 0.1 (then 1e-05)"),
        ("gpt2", None, {"layer_norm_epsilon": 0.1}, "norm_eps 0.1 (then 1e-05)"),
        (
            "llama",
            None,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            "rope_theta 500000.0 (then 10000.0)",
        ),
        ("gpt2", None, {"resid_pdrop": 0.25, "embd_pdrop": 0.25}, "dropout 0.25 (then 0.0)"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else None,
)
def test_fields_that_were_changed_win_over_our_record(
    preset: str, change: Any, config: dict, named: str, tmp_path: Path, capsys: Any
) -> None:
    again = saved_again(tmp_path, preset, change, **config)
    capsys.readouterr()
    same_logits(again, random_ids(2, 20, vocab_size=50))
    said = [line for line in capsys.readouterr().err.splitlines() if "was changed since minigpt wrote it" in line]
    assert len(said) == 1
    assert named in said[0]


def test_a_change_that_we_have_no_counterpart_for_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match="rope_type is 'linear', which minigpt has no counterpart for"):
        minigpt.load(saved_again(tmp_path, "llama", rope_parameters=rope))


# What a tokenizer puts in front of a text.


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> minigpt.Run:
    """A Llama whose tokenizer puts <s> in front, as transformers saves it."""
    folder = tmp_path_factory.mktemp("begun") / "folder"
    config = tiny_config("llama", vocab_size=280, block_size=64)
    folder_of(folder, config)
    (folder / "minigpt_tokenizer.json").unlink()
    library = template(sentencepiece())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return minigpt.load(folder)


def theirs_of(run: minigpt.Run) -> Any:
    return transformers.AutoTokenizer.from_pretrained(run.path)


def test_every_door_begins_a_text_as_its_tokenizer_does(begun: minigpt.Run) -> None:
    theirs, sampler = theirs_of(begun), minigpt.Sampler(begun.model, begun.tokenizer)
    study = minigpt.Study.of(begun.model, begun.tokenizer)
    for text in ("the cat", "the", ""):
        ids = theirs.encode(text)
        assert ids[0] == 1
        assert sampler.generate(text, max_new_tokens=1)[0][0].prompt_ids == ids
        assert sampler.replay(text, "the", top_logprobs=1)[0].prompt_ids == ids
        assert sampler.score(text)[0].ids == ids
        assert study.ids(text).tolist() == [ids]
    assert sampler.replay("the", "the cat")[0].ids == theirs.encode("the cat", add_special_tokens=False)
    # Ids are as given; a score that says where it begins is left alone.
    assert sampler.generate([270], max_new_tokens=0)[0][0].prompt_ids == [270]
    assert [score.ids for score in sampler.score([[270], [1, 270]])] == [[1, 270], [1, 270]]


def test_scores_are_those_of_transformers_after_the_beginning(begun: minigpt.Run) -> None:
    ids = torch.tensor([theirs_of(begun).encode("the cat sat")])
    model = transformers.AutoModelForCausalLM.from_pretrained(begun.path).eval()
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    [score] = minigpt.Sampler(begun.model, begun.tokenizer).score("the cat sat")
    assert score.log_probs[0] is None
    assert -score.total / score.count == pytest.approx(float(loss), abs=1e-5)


def test_what_follows_an_empty_prompt_reads_as_the_beginning_of_a_text(begun: minigpt.Run) -> None:
    sampler = minigpt.Sampler(begun.model, begun.tokenizer)
    [[done]] = sampler.generate("", max_new_tokens=2, allowed_token_ids=[begun.tokenizer.encode("the")[0]])
    assert done.text == theirs_of(begun).decode([1, *done.ids], skip_special_tokens=True) == "the the"
    [[stopped]] = sampler.generate("", max_new_tokens=2, allowed_token_ids=[done.ids[0]], stop=[" the"], num_beams=2)
    assert stopped.text == "the"


def test_each_evaluated_document_begins_as_a_text_does(begun: minigpt.Run, tmp_path: Path) -> None:
    texts = ["the cat", "sat the"]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found, _ = evaluate_run(begun, DataConfig(source=str(tmp_path / "two.jsonl"), folder=str(tmp_path / "data")))
    theirs = theirs_of(begun)
    ids = torch.tensor([[id for text in texts for id in [*theirs.encode(text), theirs.eos_token_id]]])
    model = transformers.AutoModelForCausalLM.from_pretrained(begun.path).eval()
    with torch.no_grad():
        nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    predicted = ids[0, 1:] != 1  # nobody has to predict <s>
    assert found.tokens == int(predicted.sum())
    assert found.nats == pytest.approx(float(nats[predicted].sum()), abs=1e-3)


def test_the_end_of_text_between_documents_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = template(byte_level(), "</s>")
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer")
    (end,) = ours.prefix_ids
    assert ours.eot == end
    from minigpt.data.prepare import prepare
    from minigpt.tokenizer.config import TokenizerConfig

    (tmp_path / "two.jsonl").write_text('{"text": "the"}\n{"text": "cat"}\n')
    data = DataConfig(source=str(tmp_path / "two.jsonl"), folder=str(tmp_path / "data"), val_fraction=0.0)
    corpus = prepare(data, TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer")), show=False)
    read = corpus.train.read(np.array([0]), len(corpus.train))[0].tolist()
    assert read == [end, *ours.encode("the"), end, *ours.encode("cat"), end]


def test_a_tokenizer_that_puts_nothing_in_front_is_stored_as_before() -> None:
    plain = HuggingFaceTokenizer(sentencepiece().to_str(), eot=2)
    assert plain.to_dict() == {"kind": "file", "tokenizer_json": plain.content, "eot": 2}
    begun = HuggingFaceTokenizer(plain.content, eot=2, prefix_ids=[1])
    assert HuggingFaceTokenizer.from_dict(begun.to_dict()).prefix_ids == (1,)
    assert ByteTokenizer().prompt_ids("a") == ByteTokenizer().encode("a")


def test_a_tokenizer_with_more_ids_than_the_model_is_named(tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "folder", tiny_config("llama"))
    minigpt.load(folder)
    assert "its tokenizer has 257 ids and its model 61" in capsys.readouterr().err


def test_an_end_that_the_model_does_not_have_is_named(tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "folder", tiny_config("gpt2"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [50256, 5]}')
    assert minigpt.load(folder).stored_sampling == {"eos_token_id": [5]}
    assert "eos_token_id [50256] is beyond the model's 61 tokens" in capsys.readouterr().err


def test_an_adapter_is_named(tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "folder", tiny_config("gpt2"))
    (folder / "adapter_config.json").write_text("{}")
    minigpt.load(folder)
    assert "adapter_config.json" in capsys.readouterr().err


# What loading makes.


class Heard(TorchDispatchMode):
    """Keeps the names of the operations that run, those on tensors without memory included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names = {*getattr(self, "names", ()), func.__name__.partition(".")[0]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["gpt2", "llama", "modern"])
def test_nothing_is_filled_that_is_then_overwritten(preset: str) -> None:
    model = random_model(tiny_config(preset))
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    with Heard() as heard:
        loaded = filled_model(model.config, state, "", dtype=torch.float32, device="cpu").eval()
    assert not heard.names & {"normal_", "uniform_", "fill_", "zero_", "copy_", "clone"}
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in loaded.named_parameters())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("preset", ["gpt2", "llama", "modern"])
def test_a_loaded_model_is_trained_as_any_other_and_its_file_stays(preset: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(preset))
    folder = save_checkpoint(tmp_path / "step-00000001", model, ByteTokenizer())
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    loaded = minigpt.load(folder).model
    for parameter in loaded.parameters():
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.is_contiguous()
    for trained in (model, loaded):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01, foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(trained(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
            optimizer.step()
    for name, tensor in state_of(model).items():
        torch.testing.assert_close(state_of(loaded)[name], tensor, rtol=1e-4, atol=1e-5)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == before


def test_loading_imports_no_symbolic_mathematics(tmp_path: Path) -> None:
    """Which torch does for some operations on tensors without memory, and takes longer for than the load."""
    folder = save_checkpoint(tmp_path / "step-00000001", random_model(tiny_config("llama")), ByteTokenizer())
    code = f"import sys, minigpt; minigpt.load({str(folder)!r}); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_a_model_is_loaded_in_another_dtype(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "step-00000001", random_model(tiny_config("llama")), ByteTokenizer())
    single, double = minigpt.load(folder).model, minigpt.load(folder, dtype=torch.float64).model
    with torch.no_grad():
        torch.testing.assert_close(single(IDS).double(), double(IDS), rtol=1e-4, atol=1e-4)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert math.isfinite(double(IDS).sum().item())


@pytest.mark.parametrize("changes", [{"rope_theta": 5000.0}, {"norm_weight": True}, {}])
def test_an_untouched_checkpoint_of_ours_was_not_changed(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also where a field is set that GPT-2 has no use for, and its layout no word."""
    model = random_model(tiny_config("gpt2", vocab_size=257, **changes))
    save_checkpoint(tmp_path / "ours", model, ByteTokenizer())
    assert minigpt.load(tmp_path / "ours").model.config == model.config
    assert "was changed" not in capsys.readouterr().err
