"""The front door: text or token ids in, completions or a stream of events out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt.errors import ConfigError, MinigptError
from minigpt.sampling.config import SamplingConfig
from minigpt.sampling.decodable import Decodable
from minigpt.sampling.loop import Event, check_prompts, stream_rows
from minigpt.sampling.processors import AllowedVocabulary, Temperature, TopK, TopP
from minigpt.sampling.stopping import Criterion, TextReader

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer

PER_PROMPT = ("temperature", "top_k", "top_p", "seed")

Prompt = str | Sequence[int]


class Usage(NamedTuple):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """One sample: what a prompt was continued with."""

    prompt_ids: list[int]
    """The prompt's tokens; for an empty prompt, the token it was started from."""
    ids: list[int]
    """The written tokens, with the end token or stop string that ended them."""
    text: str
    """Their text, without the end token and (but for include_stop) the stop string."""
    finish_reason: str
    """end, stop, length, context, error or a criterion's own: see `Event.finish_reason`."""
    seed: int
    """The prompt's seed: with it the sample can be written again."""
    log_probs: list[float]
    """The model's own log-probability of each written token, before any processor (nats)."""
    usage: Usage
    error: str | None = None
    """Why, where the reason is error."""


class Sampler:
    """Writes on from prompts. The same prompt, seed and settings give the same text in any company.

    Policies:
        - An empty prompt starts from the tokenizer's end-of-text, or else from a newline; neither shows in the text.
        - Special tokens named in a prompt's text are ordinary text.
        - Longer than the model's context: see `SamplingConfig.overflow`, and `minigpt.sampling.batch` on the window.
        - max_new_tokens = 0 gives empty completions with the reason "length".
        - A sample with no token left to choose ends with the reason "error" and says why; the others go on.
        - Ids that the model has and the tokenizer has not are never written.

    Args:
        model: what predicts; its mode and its gradients are left as they were.
        tokenizer: turns text into the model's tokens and back.
        config: settings for every call; a call can override each of them.
        processors: applied to the logits before temperature, top-k and top-p, in this order.
        criteria: endings beyond those of the config.

    Raises:
        ConfigError: a field of the config holds a value that it does not accept.
    """

    def __init__(
        self,
        model: Decodable,
        tokenizer: Tokenizer,
        config: SamplingConfig | None = None,
        processors: Sequence[Callable] = (),
        criteria: Sequence[Criterion] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or SamplingConfig()
        self.config.validate()
        self.processors = tuple(processors)
        self.criteria = tuple(criteria)

    def generate(self, prompts: Prompt | Sequence[Prompt], **overrides: Any) -> list[list[Completion]]:
        """Continue one prompt or several: result[prompt][sample]. Arguments as for `stream`, which it collects."""
        ids = self._encode(prompts)
        collected: dict[tuple[int, int], list[Event]] = {}
        for event in self.stream(ids, **overrides):
            collected.setdefault((event.prompt, event.sample), []).append(event)
        result: list[list[Completion]] = [[] for _ in ids]
        for (prompt, _), events in sorted(collected.items()):
            result[prompt].append(_completion(ids[prompt], events))
        return result

    def stream(self, prompts: Prompt | Sequence[Prompt], **overrides: Any) -> Iterator[Event]:
        """Continue one prompt or several and tell each token as it is chosen.

        Args:
            prompts: a text, token ids, or a list of such.
            overrides: fields of `SamplingConfig` for this call; temperature, top_k, top_p and seed may be lists of one
                value for each prompt.

        Raises:
            ConfigError: at once, not at the first event: an unknown or ill-valued field, a prompt that cannot be used.
        """
        ids = self._encode(prompts)
        common, configs = self._configs(len(ids), overrides)
        return stream_rows(
            self.model,
            ids,
            max_new_tokens=int(common.max_new_tokens),
            processors=[*self._vocabulary(), *self.processors, *shaping(configs)],
            samples=int(common.num_return_sequences),
            seeds=[config.seed for config in configs],
            end_ids=() if common.ignore_eos else self._end_ids(common),
            overflow=common.overflow,
            readers=lambda number: self._reader(ids[number], common),
            criteria=self.criteria,
        )

    def _configs(self, count: int, overrides: dict[str, Any]) -> tuple[SamplingConfig, list[SamplingConfig]]:
        """The settings that all of `count` prompts share, and those of each."""
        names = [spec.name for spec in fields(SamplingConfig)]
        several = {}
        for name, value in overrides.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(names)}"
                raise ConfigError(f"sampling: there is no field '{name}'; {hint}")
            values = _plain(value)
            if name in PER_PROMPT and isinstance(values, (list, tuple)):
                if len(values) != count:
                    raise ConfigError(
                        f"sampling: {name} has {len(values)} values for {count} prompts; give one for each"
                    )
                several[name] = values
        common = replace(self.config, **{name: value for name, value in overrides.items() if name not in several})
        configs = [replace(common, **{name: values[i] for name, values in several.items()}) for i in range(count)]
        for config in (common, *configs) if several else (common,):
            config.validate()
        return common, configs

    def _encode(self, prompts: Any) -> list[list[int]]:
        """The prompts' token ids, each at least one."""
        prompts = _plain(prompts)
        if isinstance(prompts, str) or (len(prompts) and _is_id(prompts[0])):
            prompts = [prompts]
        encoded = []
        for number, prompt in enumerate(map(_plain, prompts)):
            if isinstance(prompt, str):
                ids = list(self.tokenizer.encode(prompt))
            elif isinstance(prompt, Sequence) and all(map(_is_id, prompt)):
                ids = [int(token) for token in prompt]
            else:
                raise ConfigError(f"prompt {number} is {str(prompt)[:80]}; expected a text or a list of token ids")
            encoded.append(ids or self._start())
        check_prompts(encoded, min(self.model.vocab_size, self.tokenizer.vocab_size))
        return encoded

    def _start(self) -> list[int]:
        """What an empty prompt starts from."""
        if self.tokenizer.eot is not None:
            return [self.tokenizer.eot]
        try:
            newline = list(self.tokenizer.encode("\n"))
        except MinigptError:
            newline = []
        if not newline:
            raise ConfigError(
                "the prompt is empty, and the tokenizer has neither an end-of-text token nor a newline to start from; "
                "give a prompt of at least one character"
            )
        return newline

    def _reader(self, prompt: Sequence[int], config: SamplingConfig) -> TextReader:
        """What turns the tokens after the prompt into text that continues the prompt's."""
        decoder = self.tokenizer.stream_decoder()
        tail = list(prompt[-8:])  # more bytes than a character has
        if self.tokenizer.eot in tail:
            tail = tail[len(tail) - tail[::-1].index(self.tokenizer.eot) :]
        # Some vocabularies drop a space at the start of a text, which a continuation is not: the decoder has to have
        # seen a token. Half a character at the prompt's end stays with the prompt, so then it has not.
        if not self.tokenizer.decode(tail).endswith("\ufffd"):
            for token in tail:
                decoder.push(token)
        return TextReader(decoder, config.stop, config.include_stop)

    def _end_ids(self, config: SamplingConfig) -> list[int]:
        given = _plain(self.tokenizer.eot if config.eos_token_id is None else config.eos_token_id)
        end_ids = [] if given is None else [given] if isinstance(given, int) else list(given)
        if end_ids and max(end_ids) >= self.model.vocab_size:
            raise ConfigError(
                f"sampling: eos_token_id is {max(end_ids)}; "
                f"expected one of the model's tokens, 0 to {self.model.vocab_size - 1}"
            )
        return end_ids

    def _vocabulary(self) -> list[AllowedVocabulary]:
        size = self.tokenizer.vocab_size
        return [AllowedVocabulary(size)] if size < self.model.vocab_size else []


def shaping(configs: Sequence[SamplingConfig]) -> list[Temperature | TopK | TopP]:
    """Temperature, top-k and top-p in transformers' order, for one config a prompt; what is off for all is left out."""
    everything = 2**31  # a top-k that keeps every token, beside prompts that have one
    temperature = [float(config.temperature) for config in configs]
    top_k = [int(config.top_k or everything) for config in configs]
    top_p = [1.0 if config.top_p is None else float(config.top_p) for config in configs]
    steps = ((Temperature, temperature, 1.0), (TopK, top_k, everything), (TopP, top_p, 1.0))
    return [
        make(values[0] if len(set(values)) == 1 else tuple(values))
        for make, values, off in steps
        if set(values) - {off}
    ]


def _completion(prompt_ids: list[int], events: list[Event]) -> Completion:
    ids = [event.token for event in events if event.token is not None]
    return Completion(
        prompt_ids=prompt_ids,
        ids=ids,
        text="".join(event.text for event in events),
        finish_reason=str(events[-1].finish_reason),
        seed=events[-1].seed,
        log_probs=[event.log_prob for event in events if event.log_prob is not None],
        usage=Usage(len(prompt_ids), len(ids)),
        error=events[-1].error,
    )


def _plain(value: Any) -> Any:
    """Tensors and arrays as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
