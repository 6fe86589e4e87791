"""Rows of many samples: written as they come, as text, as JSON, or to a file that a later command continues."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minigpt.cli.arguments import print_json
from minigpt.durable import json_text
from minigpt.errors import ConfigError, DiskError
from minigpt.terminal import notice

if TYPE_CHECKING:
    from minigpt.sampling.completion import Completion

KEYS = ("prompt", "prompt_index", "sample_index")


class Rows:
    """A file of results, one JSON object a line.

    Args:
        path: the file.
        prompts: the prompts of this command.
        continues: whether to keep the rows that the file has; else it must not exist.

    Raises:
        ConfigError: the file cannot be written, exists, or has rows of other prompts.
    """

    def __init__(self, path: str, prompts: Sequence[Any], continues: bool) -> None:
        self.path = Path(path)
        self.done: set[tuple[int, int]] = set()
        """Prompt and sample index of the rows that the file has."""
        flag = "--resume_from" if continues else "--output"
        try:
            if continues:
                whole = self._read(prompts)
            self.file: IO[str] = self.path.open("a" if continues else "x", encoding="utf-8", newline="\n")
            if continues:
                self.file.truncate(whole)  # a last row that was cut off
        except FileExistsError:
            raise ConfigError(
                f"--output {path}: exists; give another name, or --resume_from {path} to go on after its rows"
            ) from None
        except OSError as error:
            raise ConfigError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error

    def _read(self, prompts: Sequence[Any]) -> int:
        """Read the rows that the file has; return the number of bytes up to the last whole one."""
        whole = 0
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"--resume_from {self.path}: is not a file")
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    prompt, index, sample = (row[key] for key in KEYS)
                    same = index < len(prompts) and prompt == prompts[index]
                except (ValueError, LookupError, TypeError) as error:
                    raise ConfigError(
                        f"--resume_from {self.path}: line {number} is no row of minigpt sample ({error!r})"
                    ) from error
                if not same:
                    raise ConfigError(
                        f"--resume_from {self.path}: line {number} is of prompt {index}, which is another one in this "
                        "command; give the prompts and settings that the file was made with"
                    )
                self.done.add((index, sample))
                whole += len(line)
        return whole

    def write(self, prompt: Any, completion: Completion) -> None:
        """Append a row. Raises DiskError if it cannot be written."""
        try:
            self.file.write(json_text(row_of(prompt, completion), "utf-8", allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise DiskError(
                f"--output {self.path}: cannot be written ({error.strerror}); its rows stay, make room and go on with "
                f"--resume_from {self.path}"
            ) from error

    def left(self, prompts: Sequence[Any], samples: int) -> list[int]:
        """The indices of the prompts that lack a sample."""
        rows = [sum((index, sample) in self.done for sample in range(samples)) for index in range(len(prompts))]
        return [index for index, there in enumerate(rows) if there < samples]


def row_of(prompt: Any, completion: Completion) -> dict[str, Any]:
    """A sample as JSON: the prompt, its index, the sample's index, and all that a `Completion` has."""
    told = asdict(completion)
    return jsonable({"prompt": prompt, **{key: told.pop(key) for key in KEYS[1:]}, **told})


def print_row(prompt: Any, completion: Completion) -> None:
    """Print a sample as one line of JSON."""
    print_json(row_of(prompt, completion), allow_nan=False)


def heading(completion: Completion, prompts: int, samples: int) -> str:
    """The line above a sample: which prompt and sample it is, its seed, why it ended."""
    place = []
    if prompts > 1:
        place.append(f"prompt {completion.prompt_index + 1} of {prompts}")
    if samples > 1:
        place.append(f"sample {completion.sample_index + 1} of {samples}")
    told = [completion.finish_reason]
    if completion.seed is not None:
        told.append(f"seed {completion.seed}")
    if completion.score is not None:
        told.append(f"score {completion.score:.4f}")
    if completion.error:
        told.append(completion.error)
    return f"--- {', '.join(place) or 'sample'} ({', '.join(told)}) ---"


def tell_shortfalls(completions: Sequence[Completion], samples: int) -> None:
    """Notices of samples that beam search could not find, and of force_words that it could not keep."""
    for done in completions:
        if done.missing and not done.sample_index:
            notice(f"prompt {done.prompt_index + 1}: {samples - done.missing} samples found, {samples} asked for")
    if kept := sorted({done.prompt_index + 1 for done in completions if not done.complete and not done.error}):
        notice(f"force_words: not all appear in the text of prompt {', '.join(map(str, kept[:10]))}")


def jsonable(value: Any) -> Any:
    """Named tuples by their names; null for what JSON has no number for: log 0, the perplexity of nothing."""
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return bool(getattr(sys.stdout, "isatty", lambda: False)())
