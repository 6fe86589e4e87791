"""The verb sae: train, show and evaluate sparse autoencoders on a model's activations."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.cli.arguments import parse, print_json, split_positional
from minigpt.cli.study.opening import open_study, show, study_parser
from minigpt.errors import ConfigError, Interrupted
from minigpt.terminal import notice

if TYPE_CHECKING:
    from minigpt.internals.features.autoencoder import Autoencoder
    from minigpt.internals.features.neurons import Contexts
    from minigpt.internals.study import Study

ACTIONS = ("train", "show", "eval")
FOLDER = "autoencoders"
SHOWN = 6  # features that show picks by itself
FIGURES_ON = 16384  # tokens on which the figures after training are measured


def sae(argv: list[str]) -> None:
    """Train, show or evaluate a sparse autoencoder: minigpt sae RUN train --at resid_post --layer 1, then minigpt
    sae RUN show or eval. Files are kept in RUN/autoencoders/. With --target, train makes a transcoder.
    """
    from minigpt.data.reading import read_text
    from minigpt.internals.features.autoencoder_config import AutoencoderConfig

    path, rest = split_positional(argv)
    action, rest = split_positional(rest)
    if path in ACTIONS and action not in ACTIONS:  # sae train, sae train RUN
        path, action = action, path
    parser = study_parser("sae", sae, "[RUN] train|show|eval")
    parser.add_argument("--at", type=str, default="resid_post", help="train: activation to encode")
    parser.add_argument("--target", type=str | None, default=None, help="train: activation to predict (transcoder)")
    parser.add_argument(
        "--layer", type=int | None, default=None, help="train: block of the activation; null: part of --at"
    )
    parser.add_argument(
        "--autoencoder", type=str | None, default=None, help="show, eval: name or folder; null: the one trained last"
    )
    parser.add_argument(
        "--feature", type=int | None, default=None, help="show: feature to show; null: a few of the strongest"
    )
    parser.add_argument("--contexts", type=int, default=8, help="show: contexts per feature")
    parser.add_argument("--tokens", type=int | None, default=None, help="show, eval: tokens of text to read; null: all")
    parser.add_argument(
        "--text", type=str | None, default=None, help="text file in place of the run's own text; '-': standard input"
    )
    parser.add_class_arguments(AutoencoderConfig)
    values = parse(parser, rest)
    if action not in ACTIONS:
        raise ConfigError(f"sae: {action or 'no action'}; expected minigpt sae RUN train, show or eval")
    if values.autoencoder == "":
        raise ConfigError("--autoencoder is empty; give a name or a folder, or leave it out")
    for name in ("tokens", "contexts"):
        if (value := getattr(values, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: expected 1 or more")
    if (name := values.autoencoder) is not None and name.encode("utf-8", "replace").decode() != name:
        raise ConfigError(f"--autoencoder {name}: is not UTF-8; choose another name")
    config = AutoencoderConfig(**{field.name: getattr(values, field.name) for field in fields(AutoencoderConfig)})
    study = open_study(path, values)
    text = None if values.text is None else read_text("--text", values.text)
    if action == "train":
        _train(study, config, values, text)
        return
    autoencoder = _find(study, values.autoencoder).to(study.model.device)
    if action == "eval":
        show(values, *study.judge_autoencoder(autoencoder, text=text, limit=values.tokens))
    else:
        _show(study, autoencoder, values, text)


def _home(study: Study) -> Path:
    """Where a run keeps its autoencoders: beside its checkpoints, which are sealed."""
    assert study.run is not None
    checkpoint = study.run.path.absolute()
    return (checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint) / FOLDER


def _find(study: Study, name: str | None) -> Autoencoder:
    from minigpt.internals.features.autoencoder import CONFIG, Autoencoder

    home = _home(study)
    made = sorted(home.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
    there = ", ".join(file.parent.name for file in made) or "none; train one with minigpt sae RUN train"
    if name is None:
        if not made:
            raise ConfigError(f"{home}: holds no autoencoder; train one with minigpt sae RUN train")
        folder = made[-1].parent
    else:
        folder = next((folder for folder in (home / name, Path(name)) if (folder / CONFIG).is_file()), Path())
        if folder == Path():
            raise ConfigError(f"--autoencoder {name}: there is no such; {home} holds {there}")
    found = Autoencoder.load(folder)
    missing = [site for site in (found.site, found.target) if site not in study.table]
    if missing:
        raise ConfigError(f"{folder}: is made for {missing[0]}, which this model does not have")
    assert study.run is not None
    if found.notes.get("checkpoint") not in (None, study.run.path.name):
        notice(f"{folder}: was trained on {found.notes['checkpoint']}, but this is {study.run.path.name}")
    return found


def _train(study: Study, config: Any, values: Any, text: str | None) -> None:
    from minigpt.internals.access.corpus import site_of
    from minigpt.internals.access.names import select
    from minigpt.internals.features.autoencoder import CONFIG

    def site(name: str | None) -> Any:
        if name is not None and values.layer is None and (count := len(select(study.config, name))) > 1:
            raise ConfigError(f"{name}: there is one per block; add --layer, from 0 to {count - 1}")
        return name if name is None or values.layer is None else (name, values.layer)

    at, target = site(values.at), site(values.target)
    reads, written = site_of(study, at), site_of(study, at if target is None else target)
    name = values.autoencoder or f"{'' if reads == written else f'{_short(reads)}-to-'}{_short(written)}-{config.kind}"
    folder = _home(study) / name
    if (folder / CONFIG).is_file():
        notice(f"{folder}: holds an autoencoder, which this one is to replace; --autoencoder NAME keeps both")
    made = study.train_autoencoder(at, target, config=config, text=text)
    assert study.run is not None
    made.notes |= {"checkpoint": study.run.path.name}
    made.save(folder)
    if made.notes["steps"] < config.steps:
        raise Interrupted(f"stopped at step {made.notes['steps']} of {config.steps}; saved in {folder}")
    figures, _ = study.judge_autoencoder(made, text=text, limit=values.tokens or FIGURES_ON)
    if values.json:
        print_json({"folder": str(folder), **figures.to_dict()})
    else:
        print(f"{figures}\nsaved in {folder}")


def _short(name: str) -> str:
    """blocks.1.attn.hook_z -> 1.attn.z"""
    return name.removeprefix("blocks.").replace("hook_", "")


def _different(found: Contexts) -> list[int]:
    """The features that are most active of all, each at another token, a few of them."""
    chosen: dict[int, int] = {}
    for feature in (-found.values[:, 0]).argsort(kind="stable").tolist():
        chosen.setdefault(int(found.places[feature, 0]), feature)
    return list(chosen.values())[:SHOWN]


def _show(study: Study, autoencoder: Autoencoder, values: Any, text: str | None) -> None:
    from minigpt.internals.access.names import STREAM

    found = study.feature_contexts(autoencoder, values.contexts, text=text, limit=values.tokens)
    if values.feature is None:
        strongest = _different(found)
    elif 0 <= values.feature < autoencoder.d_sae:
        strongest = [values.feature]
    else:
        raise ConfigError(f"--feature {values.feature}: there are 0 .. {autoencoder.d_sae - 1}")
    told = []
    for feature in strongest:
        contexts = [
            {"activation": float(found.values[feature, rank]), "text": found.context(feature, rank)}
            for rank in range(found.values.shape[1])
            if found.places[feature, rank] >= 0 and found.values[feature, rank] > 0
        ]
        said: dict[str, Any] = {"feature": feature, "contexts": contexts}
        if study.table[autoencoder.target].axes == STREAM:
            effect = study.feature_effect(autoencoder, feature)
            said["raises"] = [labels[0] for labels, _ in effect.top(8)]
            said["lowers"] = [labels[0] for labels, _ in effect.top(8, smallest=True)]
        told.append(said)
        if not values.json:
            raises = [repr(label.partition(" ")[2]) for label in said.get("raises", [])]
            lowers = [repr(label.partition(" ")[2]) for label in said.get("lowers", [])]
            print(found.show(feature))
            if raises:
                print(f"  raises {' '.join(raises)}\n  lowers {' '.join(lowers)}")
            print()
    if values.json:
        print_json(told)
