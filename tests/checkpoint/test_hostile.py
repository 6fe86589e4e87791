"""No file can run code, fill the memory or take for ever: a corpus of hostile files, read under an audit hook."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minigpt.checkpoint.saving import save_checkpoint
from minigpt.durable import canonical_json, parse_json, sealed, sha256_of, to_json
from minigpt.tokenizer.plain import ByteTokenizer
from toys import random_model, tiny_config


class Bomb:
    """A pickle that, loaded, makes a file and says so."""

    def __reduce__(self) -> tuple:
        return __import__("os").system, ("echo code ran; touch CODE_RAN",)


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: 8 bytes of length, JSON, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change a JSON file in place."""

    def apply(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))

    return apply


def ours(**values: Any) -> Callable[[Path], None]:
    """Other values in config.json's own section."""
    return edit("config.json", lambda record: (record.update(model_type="minigpt"), record["minigpt"].update(values)))


def huge_llama(folder: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 2**31, "hidden_size": 2**30, "num_hidden_layers": 2**31,
        "num_attention_heads": 2**20, "max_position_embeddings": 2**31, "intermediate_size": 2**31,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Replace a file."""
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def pickled_zip(folder: Path) -> None:
    torch.save({"weight": Bomb()}, folder / "model.safetensors")


def zip_bomb(folder: Path) -> None:
    with (
        zipfile.ZipFile(folder / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("data", "w") as out,
    ):
        for _ in range(64):
            out.write(bytes(1 << 20))


def index(table: Any) -> Callable[[Path], None]:
    """Shards in place of one file of weights."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))

    return apply


def tokenizer(description: Any) -> Callable[[Path], None]:
    """A tokenizer file that is sealed as it should be, and describes this."""
    record = {"format": 1, "hash": sha256_of(description), "tokenizer": description}
    return write("minigpt_tokenizer.json", canonical_json(record))


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A manifest that was changed and sealed again."""

    def apply(folder: Path) -> None:
        record = {"format": 2, "files": {"config.json": {"bytes": 1, "sha256": "0"}}}
        change(record)
        (folder / "manifest.json").write_text(to_json(sealed(record)))

    return apply


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DEEP = "[" * 200_000
HOSTILE: dict[str, Callable[[Path], None]] = {
    "pickle as weights": write("model.safetensors", pickle.dumps(Bomb())),
    "pickle in torch's zip as weights": pickled_zip,
    "zip bomb as weights": zip_bomb,
    "pickle as tokenizer": write("minigpt_tokenizer.json", pickle.dumps(Bomb())),
    "pickle as config": write("config.json", pickle.dumps(Bomb())),
    "pickle as training config": write("train_config.yaml", pickle.dumps(Bomb(), protocol=0)),
    "YAML tag that calls": write("train_config.yaml", "seed: !!python/object/apply:os.system ['touch CODE_RAN']"),
    "YAML tag that makes": write("train_config.yaml", "!!python/object/new:subprocess.Popen [['touch', 'CODE_RAN']]"),
    "YAML of a billion laughs": write(
        "train_config.yaml",
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghij")),
    ),
    "YAML nested deeply": write("train_config.yaml", DEEP),
    "header longer than the file": write("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "header of 99 MB that is not there": write("model.safetensors", struct.pack("<Q", 99_000_000) + b"{}"),
    "header that is no JSON": write("model.safetensors", safetensors_file(b"\x00" * 64)),
    "header nested deeply": write("model.safetensors", safetensors_file(DEEP.encode())),
    "overlapping offsets": write("model.safetensors", safetensors_file({"a": F32, "b": F32}, bytes(8))),
    "offsets behind the end": write(
        "model.safetensors", safetensors_file({"a": {**F32, "data_offsets": [0, 2**40], "shape": [2**38]}}, bytes(8))
    ),
    "a shape that overflows": write(
        "model.safetensors", safetensors_file({"a": {**F32, "shape": [2**40, 2**40]}}, bytes(8))
    ),
    "whole numbers as weights": lambda folder: None,  # made below, once there are weights to convert
    "index that leads outside": index({"weight_map": {"a": "../outside.safetensors"}}),
    "index with an absolute path": index({"weight_map": {"a": "/etc/passwd"}}),
    "index of wrong types": index({"weight_map": ["model.safetensors"]}),
    "index of numbers": index({"weight_map": {"a": 7}}),
    "manifest that leads outside": manifest(
        lambda m: m["files"].update({"../../outside": {"bytes": 1, "sha256": "0"}})
    ),
    "manifest of wrong types": manifest(lambda m: m.update(files=["config.json"])),
    "manifest with entries of wrong types": manifest(lambda m: m.update(files={"config.json": 7})),
    "manifest with a format of wrong type": manifest(lambda m: m.update(format="2")),
    "manifest nested deeply": write("manifest.json", DEEP),
    "config nested deeply": write("config.json", DEEP),
    "config with a key twice": write("config.json", '{"model_type": "gpt2", "model_type": "llama"}'),
    "config with NaN": write("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}'),
    "config that is a list": write("config.json", "[1, 2]"),
    "config section of wrong type": edit("config.json", lambda record: record.update(minigpt=[1])),
    "two billion layers": ours(n_layer=2**31),
    "two billion layers of Hugging Face's": huge_llama,
    "a vocabulary of two billion": ours(vocab_size=2**31),
    "width of two billion": ours(n_embd=2**31, n_head=1, n_kv_head=1, head_dim=2**31, n_inner=2**31),
    "positions without end": ours(block_size=2**31, position="rope"),
    "1e400 layers": write("config.json", '{"model_type": "llama", "num_hidden_layers": 1e400, "vocab_size": 9}'),
    "a string for a number": ours(n_layer="2"),
    "a list for a name": ours(preset=["llama"]),
    "true for a number": ours(n_head=True),
    "an unknown field": ours(run_this="touch CODE_RAN"),
    "dropout of a list": ours(dropout=[0.1]),
    "custom code as in auto_map": edit(
        "config.json", lambda r: (r.clear(), r.update(model_type="evil", auto_map={"AutoModel": "evil.Evil"}))
    ),
    "a tokenizer of wrong types": tokenizer({"kind": "char", "characters": 5, "unknown": "error"}),
    "a tokenizer without fields": tokenizer({"kind": "char"}),
    "a tokenizer of unhashable kind": tokenizer({"kind": ["char"]}),
    "a tokenizer that is a number": tokenizer(7),
    "a tokenizer nested deeply": write("minigpt_tokenizer.json", DEEP),
    "sampling defaults of a list": write("generation_config.json", "[]"),
    "sampling defaults with a key twice": write("generation_config.json", '{"top_k": 1, "top_k": 2}'),
}

READER = """
import json, resource, sys, time
import torch, yaml, safetensors.torch, tokenizers
import minigpt.checkpoint.checkpoint, minigpt.tokenizer.bpe, minigpt.tokenizer.huggingface, minigpt.tokenizer.published
from minigpt.checkpoint.checkpoint import load, read_training_state, read_training_tensors
from minigpt.errors import MinigptError

torch.set_num_threads(1)
load(sys.argv[1])  # what is imported late is imported now
heard = []
def hook(event, details):
    if event in ("compile", "exec", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
                 "subprocess.Popen", "pickle.find_class", "import", "ctypes.dlopen", "socket.connect",
                 "socket.getaddrinfo", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
        heard.append([event, repr(details)[:80]])
    if event == "open" and isinstance(details[1], str) and set(details[1]) & set("wax+"):
        heard.append([event, repr(details)[:80]])
sys.addaudithook(hook)
for folder in sys.argv[2:]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    heard.clear()
    try:
        load(folder)
        said = ["loaded", ""]
    except MinigptError as error:
        said = [type(error).__name__, str(error)]
    except BaseException as error:
        said = ["CRASH " + type(error).__name__, str(error)[:200]]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([folder, *said, list(heard), time.process_time() - began, grown / 1024]), flush=True)
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What became of each hostile file: [error, its text, audited events, CPU seconds, MB that the memory grew by]."""
    root = tmp_path_factory.mktemp("hostile")
    whole = save_checkpoint(
        root / "whole", random_model(tiny_config("llama")), ByteTokenizer(), train_config={"seed": 1}, sampling={}
    )
    (whole / "manifest.json").unlink()  # else the hashes would stop everything
    names = {}
    for number, (what, make) in enumerate(HOSTILE.items()):
        folder = root / f"case-{number}" / "folder"
        shutil.copytree(whole, folder)
        make(folder)
        names[str(folder)] = what
        if what == "whole numbers as weights":
            import safetensors.torch

            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            whole_numbers = {name: tensor.long() for name, tensor in tensors.items()}
            safetensors.torch.save_file(whole_numbers, folder / "model.safetensors")
    command = [sys.executable, "-c", READER, str(whole), *names]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    found = {names[row[0]]: row[1:] for row in map(json.loads, done.stdout.splitlines())}
    found["code"] = [path.name for path in root.rglob("CODE_RAN")]
    return found


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_with_one_line_and_runs_nothing(what: str, read: dict[str, list]) -> None:
    error, text, heard, seconds, grown = read[what]
    assert error in ("CheckpointError", "DataError"), (error, text)
    assert "\n" not in text and len(text) < 1000
    assert not heard
    assert seconds < 20 and grown < 300
    assert not read["code"]


def test_the_corpus_would_run_code_in_an_unsafe_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bombs are real: without this the tests above could not fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "CODE_RAN").is_file()
    (tmp_path / "CODE_RAN").unlink()
    yaml.unsafe_load("seed: !!python/object/apply:os.system ['touch CODE_RAN']")
    assert (tmp_path / "CODE_RAN").is_file()


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "NaN", "[Infinity]", "[" * 10**6, "{", ""])
def test_json_is_read_strictly(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has another text
        parse_json(text)


def test_training_counters_of_wrong_types_are_named(tmp_path: Path) -> None:
    from minigpt.checkpoint.checkpoint import read_training_state
    from minigpt.errors import CheckpointError

    for record in (
        {"step": "5"}, {"step": True}, {"step": -1}, {"step": 1, "seconds": "long"}, {"step": 1, "environment": []},
        {"format": "x", "step": 1}, {},
    ):  # fmt: skip
        (tmp_path / "training_state.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=r"training_state\.json: "):
            read_training_state(tmp_path)
