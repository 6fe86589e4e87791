"""docs/interop.md: every key of its tables, set in a folder of its own, does what the table says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

import minigpt
from minigpt.checkpoint import foreign
from minigpt.errors import CheckpointError
from minigpt.sampling.settings import unheard
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.tokenizer import folder as beside
from tokenizer_files import byte_level, sentencepiece, template
from toys import needs_transformers

pytestmark = needs_transformers(">=5.24", "folders are read as this version reads them")

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
TEXTS = ["the cat sat", "the the at", ""]
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT-2": {
        "model_type": "gpt2", "vocab_size": 300, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2,
    },
    "Llama": {
        "model_type": "llama", "vocab_size": 300, "max_position_embeddings": 24, "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    },
}  # fmt: skip
RECORD = {"format": 2, **minigpt.GPTConfig(preset="gpt2", vocab_size=300, n_layer=9).to_dict()}


def rows() -> Iterator[tuple[str, str, str]]:
    """(file, key, what minigpt does) of every key in the page's tables."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] not in ("file", "---"):
            for key in re.findall(r"`([^`]+)`", cells[1]):
                yield cells[0], key, cells[2]


ROWS = list(rows())
ANYTHING = {"x": 1}  # of a key without effect


def of(file: str, outcome: str) -> list[Any]:
    return [
        pytest.param(name, key, id=f"{name} {key}")
        for name, key, does in ROWS
        if (does, name.split(" (")[0]) == (outcome, file)
    ]


# A value that is not the default; a function changes the file in its own way.
GENERATED: dict[str, Any] = {
    "eos_token_id": [5, 6], "do_sample": False, "max_new_tokens": 7, "min_length": 3, "min_new_tokens": 2,
    "early_stopping": True, "max_time": 3.5, "stop_strings": ["the"], "num_beams": 3, "num_return_sequences": 2,
    "temperature": 0.3, "top_k": 4, "top_p": 0.7, "min_p": 0.1, "top_h": 0.4, "typical_p": 0.8, "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02, "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2, "length_penalty": 0.5,
    "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[4, 5]], "renormalize_logits": True,
    "forced_bos_token_id": 4, "forced_eos_token_id": 6, "exponential_decay_length_penalty": [3, 1.1],
    "suppress_tokens": [7], "begin_suppress_tokens": [8], "sequence_bias": [[[4], 2.0]], "num_beam_groups": 1,
    "diversity_penalty": 0.0, "force_words_ids": [[4, 5]], "max_length": 9, "guidance_scale": 1.5,
    "token_healing": True, "watermarking_config": {"bias": 2.0}, "penalty_alpha": 0.6, "dola_layers": "low",
    "constraints": [1], "assistant_ensemble_weight": 0.5, "some_key_that_nobody_knows": 3,
}  # fmt: skip
SEVERAL = {  # what a value needs beside it
    "num_return_sequences": {"num_beams": 3}, "early_stopping": {"num_beams": 3}, "length_penalty": {"num_beams": 3},
    "num_beam_groups": {"num_beams": 3}, "diversity_penalty": {"num_beams": 3}, "force_words_ids": {"num_beams": 3},
}  # fmt: skip
CONFIGURED: dict[str, Any] = {
    "model_type": "mistral", "minigpt": RECORD, "vocab_size": 310, "tie_word_embeddings": None,
    "quantization_config": {"bits": 4}, "per_layer_config": {"0": {}}, "is_encoder_decoder": True,
    "auto_map": {"AutoModel": "code.Model"}, "dtype": "bfloat16", "torch_dtype": "float16",
    "some_key_that_nobody_knows": 3,
    # GPT-2
    "n_positions": 30, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "activation_function": "gelu",
    "layer_norm_epsilon": 0.1, "resid_pdrop": 0.3, "attn_pdrop": 0.4, "embd_pdrop": 0.2, "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True, "pruned_heads": {"0": [1]},
    # both, or Llama
    "max_position_embeddings": 30, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 0.1, "rope_theta": 77.0,
    "rope_parameters": lambda values: values.update(
        rope_parameters={"rope_type": "default", "rope_theta": 55.0}, rope_theta=77.0
    ),
    "rope_scaling": lambda values: values.update(
        rope_scaling={"type": "default", "rope_theta": 33.0}, rope_parameters={"rope_type": "linear", "factor": 2.0}
    ),
    "rope_parameters.rope_type": lambda values: values.update(rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "rope_scaling.rope_type": lambda values: values.update(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "rope_scaling.partial_rotary_factor": lambda values: values.update(rope_scaling={"partial_rotary_factor": 0.5}),
    "partial_rotary_factor": 0.5, "attention_bias": lambda values: values.update(attention_bias=True, mlp_bias=True),
    "mlp_bias": True, "attention_dropout": 0.4, "hidden_act": "gelu", "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"], "attention_chunk_size": 8,
    **{key: GENERATED[key] for key in GENERATED if key in foreign.GENERATION},
}  # fmt: skip


def change(values: dict[str, Any], key: str, table: dict[str, Any]) -> None:
    value = table.get(key, ANYTHING)
    if key == "tie_word_embeddings":
        value = values["model_type"] == "llama"
    if callable(value):
        value(values)
    else:
        values[key] = value


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def make(folder: Path, config: dict[str, Any], tokenizer: Any = None, weights: dict[str, Any] | None = None) -> Path:
    """A folder with this config, random weights that fit it (or fit another), and a tokenizer."""
    folder.mkdir()
    clean = {key: value for key, value in (weights or config).items() if key not in foreign.GENERATION}
    write(folder / "config.json", clean)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    write(folder / "config.json", config)
    (tokenizer or template(sentencepiece())).save(str(folder / "tokenizer.json"))
    return folder


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


IDS = torch.arange(40).reshape(2, 20)


def kinds(file: str) -> list[str]:
    found = [kind for kind in CONFIGS if f"({kind})" in file]
    return found or list(CONFIGS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, minigpt.Run]:
    """A folder of each kind, loaded."""
    root = tmp_path_factory.mktemp("plain")
    return {kind: minigpt.load(make(root / kind, config)) for kind, config in CONFIGS.items()}


DROPOUTS = {"resid_pdrop": "dropout", "attn_pdrop": "attn_dropout", "attention_dropout": "attn_dropout"}


@pytest.mark.parametrize(("file", "key"), of("config.json", "obeyed"))
def test_an_obeyed_key_of_the_config(file: str, key: str, tmp_path: Path, plain: dict) -> None:
    for kind in kinds(file):
        config = dict(CONFIGS[kind])
        change(config, key, CONFIGURED)
        if key in foreign.GENERATION:
            config |= SEVERAL.get(key, {})
        folder = make(tmp_path / kind, config)
        run = minigpt.load(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(run.model, IDS), logits(theirs, IDS), rtol=1e-4, atol=1e-4)
        if key in foreign.GENERATION:
            assert_same_default(run.stored_sampling, theirs.generation_config, key)
        elif key in DROPOUTS:
            assert getattr(run.model.config, DROPOUTS[key]) == getattr(theirs.config, key) == config[key]
        else:
            assert run.model.config != plain[kind].model.config


def assert_same_default(stored: dict[str, Any], theirs: Any, key: str) -> None:
    ours = SamplingConfig.from_dict(stored)
    if key == "do_sample":
        assert (ours.temperature == 0) == (not theirs.do_sample)
        return
    found, wanted = getattr(ours, "stop" if key == "stop_strings" else key), getattr(theirs, key)
    assert json.dumps(found) == json.dumps(wanted)
    assert found == GENERATED[key] or isinstance(GENERATED[key], list)


@pytest.mark.parametrize(("file", "key"), of("config.json", "refused"))
def test_a_refused_key_of_the_config(file: str, key: str, tmp_path: Path) -> None:
    for kind in kinds(file):
        config = dict(CONFIGS[kind])
        change(config, key, CONFIGURED)
        folder = make(tmp_path / kind, config, weights=CONFIGS[kind])
        with pytest.raises(CheckpointError) as refusal:
            minigpt.load(folder)
        for part in key.split("."):
            assert part in str(refusal.value)


@pytest.mark.parametrize(("file", "key"), of("config.json", "noticed"))
def test_a_noticed_key_of_the_config(file: str, key: str, tmp_path: Path, plain: dict, capsys: Any) -> None:
    for kind in kinds(file):
        config = dict(CONFIGS[kind])
        change(config, key, CONFIGURED)
        folder = make(tmp_path / kind, config, weights=CONFIGS[kind])
        capsys.readouterr()
        run = minigpt.load(folder)
        said = capsys.readouterr().err
        assert key in said
        assert said.count("\n") == 1
        assert torch.equal(logits(run.model, IDS), logits(plain[kind].model, IDS))


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_of_the_config_without_effect(kind: str, tmp_path: Path, plain: dict, capsys: Any) -> None:
    """All of them together: what none does alone."""
    keys = [key for file, key, does in ROWS if does == "no effect" and file in ("config.json", f"config.json ({kind})")]
    config = {**CONFIGS[kind], **{key: CONFIGURED.get(key, ANYTHING) for key in keys}, "tokenizer_class": "NoSuch"}
    folder = make(tmp_path / "folder", config, weights=CONFIGS[kind])
    capsys.readouterr()
    run = minigpt.load(folder)
    assert capsys.readouterr().err == ""
    assert torch.equal(logits(run.model, IDS), logits(plain[kind].model, IDS))
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert (run.stored_sampling, run.tokenizer.hash) == ({}, plain[kind].tokenizer.hash)


# The tokenizer's files.

SENTENCEPIECE = {"tokenizer_class": "PreTrainedTokenizerFast"}


def tokenizers_of(folder: Path, files: dict[str, Any], tokenizer: Any = None) -> Path:
    folder.mkdir()
    write(folder / "config.json", CONFIGS["Llama"])
    (tokenizer or template(sentencepiece())).save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        if callable(values):
            record = json.loads((folder / name).read_text())
            values(record)
            values = record
        write(folder / name, values)
    return folder


def with_model(change: Callable[[dict], None]) -> Callable[[dict], None]:
    return lambda record: change(record["model"])


def added(record: dict) -> None:
    record["added_tokens"].append({**record["added_tokens"][0], "id": 290, "content": "cat", "special": False})


TEMPLATE_AFTER = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
SPLIT = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
TOKENIZED: dict[tuple[str, str], Any] = {
    ("tokenizer.json", "model"): with_model(lambda model: model.update(merges=model["merges"][:1])),
    ("tokenizer.json", "normalizer"): lambda record: record["normalizer"]["normalizers"].insert(
        0, {"type": "Replace", "pattern": {"String": "h"}, "content": "a"}
    ),
    ("tokenizer.json", "pre_tokenizer"): lambda record: record.update(pre_tokenizer=SPLIT),
    ("tokenizer.json", "decoder"): lambda record: record["decoder"]["decoders"].pop(),
    ("tokenizer.json", "added_tokens"): added,
    ("tokenizer.json", "post_processor"): lambda record: record["post_processor"]["single"].insert(
        0, {"SpecialToken": {"id": "<s>", "type_id": 0}}
    ),
    ("tokenizer.json", "post_processor.after"): lambda record: record.update(
        post_processor={"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1],
                        "trim_offsets": True, "add_prefix_space": False}
    ),
    ("tokenizer.json", "model.dropout"): with_model(lambda model: model.update(dropout=0.5)),
    ("tokenizer.json", "truncation"): lambda record: record.update(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    ),
    ("tokenizer.json", "padding"): lambda record: record.update(
        padding={"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<unk>"}
    ),
    ("tokenizer_config.json", "eos_token"): {"eos_token": "<unk>"},
    ("tokenizer_config.json", "add_prefix_space"): {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"},
    ("tokenizer_config.json", "add_bos_token"): {"add_bos_token": False},
    ("tokenizer_config.json", "add_eos_token"): {"add_eos_token": True},
    ("tokenizer_config.json", "added_tokens_decoder"): {
        "added_tokens_decoder": {"1": {"content": "<s>", "lstrip": True}}
    },
    ("tokenizer_config.json", "additional_special_tokens"): {"additional_special_tokens": ["<tool>"]},
    ("tokenizer_config.json", "extra_special_tokens"): {"extra_special_tokens": {"tool_token": "<tool>"}},
    ("tokenizer_config.json", "auto_map"): {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}},
    ("tokenizer_config.json", "tokenizer_class"): {"tokenizer_class": "LlamaTokenizerFast"},
    ("tokenizer_config.json", "some_key_that_nobody_knows"): {"some_key_that_nobody_knows": 1},
    ("special_tokens_map.json", "eos_token"): {"eos_token": "<unk>"},
    ("special_tokens_map.json", "additional_special_tokens"): {"additional_special_tokens": ["<tool>"]},
}  # fmt: skip


def files_for(file: str, key: str) -> dict[str, Any]:
    values = TOKENIZED.get((file, key))
    if values is None:
        values = {key: "<unk>" if key.endswith("_token") else ANYTHING}
    files: dict[str, Any] = {"tokenizer_config.json": {**SENTENCEPIECE, "eos_token": "</s>"}}
    if file == "tokenizer_config.json":
        values = {**files[file], **values}
    return {**files, file: values}


def read(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.prompt_ids(text) for text in TEXTS]


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def tokenizer_rows(outcome: str) -> list[Any]:
    return [row for file in TOKENIZER_FILES for row in of(file, outcome)]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("usual") / "folder"
    return minigpt.tokenizer.build.load_tokenizer(tokenizers_of(folder, files_for("tokenizer_config.json", "none")))


@pytest.mark.parametrize(("file", "key"), tokenizer_rows("obeyed"))
def test_an_obeyed_key_of_the_tokenizer(file: str, key: str, tmp_path: Path, usual: Any) -> None:
    folder = tokenizers_of(tmp_path / "folder", files_for(file, key))
    ours = minigpt.tokenizer.build.load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert read(ours) == [theirs.encode(text) for text in TEXTS]
    written = ours.encode("the cat")
    assert ours.decode(written) == theirs.decode(written)
    if theirs.eos_token_id is not None:
        assert ours.eot == theirs.eos_token_id
    same = (read(ours), ours.eot) == (read(usual), usual.eot)
    assert not same or ours.decode(written) != usual.decode(written)


def test_the_prefix_space_of_gpt2s_class(tmp_path: Path) -> None:
    for said in (True, False):
        files = {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": said}}
        folder = tokenizers_of(tmp_path / str(said), files, byte_level())
        ours = minigpt.tokenizer.build.load_tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert read(ours) == [theirs.encode(text) for text in TEXTS]


@pytest.mark.parametrize(("file", "key"), tokenizer_rows("noticed"))
def test_a_noticed_key_of_the_tokenizer(file: str, key: str, tmp_path: Path, usual: Any, capsys: Any) -> None:
    folder = tokenizers_of(tmp_path / "folder", files_for(file, key))
    ours = minigpt.tokenizer.build.load_tokenizer(folder)
    said = capsys.readouterr().err
    assert key.rpartition(".")[2] in said
    assert said.count("\n") == 1
    assert (read(ours), ours.eot) == (read(usual), usual.eot)


@pytest.mark.parametrize(("file", "key"), tokenizer_rows("no effect"))
def test_a_key_of_the_tokenizer_without_effect(file: str, key: str, tmp_path: Path, usual: Any, capsys: Any) -> None:
    folder = tokenizers_of(tmp_path / "folder", files_for(file, key))
    ours = minigpt.tokenizer.build.load_tokenizer(folder)
    assert capsys.readouterr().err == ""
    assert (read(ours), ours.eot) == (read(usual), usual.eot)


# Sampling defaults.


@pytest.mark.parametrize(("file", "key"), of("generation_config.json", "obeyed"))
def test_an_obeyed_key_of_generation(file: str, key: str, tmp_path: Path) -> None:
    values = {**SEVERAL.get(key, {}), key: GENERATED[key]}
    write(tmp_path / file, values)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert_same_default(foreign.sampling_from_huggingface(CONFIGS["Llama"], values, 300, ""), theirs, key)


@pytest.mark.parametrize(("file", "key"), of("generation_config.json", "noticed"))
def test_a_noticed_key_of_generation(file: str, key: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("minigpt.terminal._told", set())
    assert SamplingConfig.from_dict({key: GENERATED[key]}) == SamplingConfig()
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(("file", "key"), of("generation_config.json", "no effect"))
def test_a_key_of_generation_without_effect(file: str, key: str, capsys: Any) -> None:
    assert SamplingConfig.from_dict({key: ANYTHING}) == SamplingConfig()
    assert capsys.readouterr().err == ""


# The page and the code name the same keys.


def test_every_key_that_the_code_knows_is_on_the_page() -> None:
    on_page: dict[str, set[str]] = {}
    for file, key, _ in ROWS:
        for kind in kinds(file) if file.startswith("config.json") else [""]:
            on_page.setdefault(f"{file.split(' (')[0]} {kind}".strip(), set()).add(key)
    sampling = on_page["generation_config.json"]
    assert foreign.KNOWN["gpt2"] - on_page["config.json GPT-2"] - sampling == set()
    assert foreign.KNOWN["llama"] - on_page["config.json Llama"] - sampling == set()
    assert beside.HARMLESS - on_page["tokenizer_config.json"] == set()
    assert unheard.HARMLESS - sampling == set()
    theirs = set(transformers.GenerationConfig().to_dict()) | {"watermarking_config", "constraints"}
    assert theirs - sampling == set()


def test_every_key_of_transformers_configs_is_on_the_page() -> None:
    for kind, config in (("GPT-2", transformers.GPT2Config()), ("Llama", transformers.LlamaConfig())):
        on_page = {key for file, key, _ in ROWS if file in ("config.json", f"config.json ({kind})")}
        assert set(config.to_dict()) - on_page == set()
