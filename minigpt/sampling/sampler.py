"""The Sampler: text or token ids in; completions, a stream of events, or scores out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minigpt.errors import ConfigError
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.loop.batch import Row
from minigpt.sampling.loop.criteria import MaxTime, Repeats, StopSequences
from minigpt.sampling.loop.loop import Event, check_forced, check_prompts, divide, stream_rows
from minigpt.sampling.loop.prompts import (
    Prompt,
    as_list,
    encode_all,
    encode_prompts,
    holds_stop,
    plain,
    read_all,
    text_reader,
)
from minigpt.sampling.loop.stopping import Criterion
from minigpt.sampling.loop.turn import Details, Stage
from minigpt.sampling.recipe import cook, spellings
from minigpt.sampling.scoring import Score, score_ids, with_bytes
from minigpt.sampling.search.search import SearchSettings, search_rows
from minigpt.sampling.settings.config import FIELDS, PER_PROMPT, SamplingConfig
from minigpt.sampling.settings.orders import Order
from minigpt.sampling.settings.shape import OWN
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.given import as_tokenizer


class Usage(NamedTuple):
    """Token counts of a sample."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """One sample: the continuation of a prompt."""

    prompt_ids: list[int]
    """Token ids of the prompt; for an empty prompt, the token it starts from."""
    ids: list[int]
    """Generated token ids, including the end token or stop string."""
    text: str
    """The generated text, without the end token and (unless include_stop) without the stop string."""
    finish_reason: str
    """end, stop, length, context, time, repetition, error, or a criterion's own reason; see `Event.finish_reason`."""
    seed: int | None
    """Seed of the prompt, which reproduces the sample; None if nothing was drawn."""
    log_probs: list[float]
    """Log-probability of each generated token under the model, before any processor (nats)."""
    usage: Usage
    error: str | None = None
    """The error message, if finish_reason is error."""
    score: float | None = None
    """Beam search: the score that texts are ranked by; see `search.Hypothesis.score`."""
    complete: bool = True
    """Beam search: whether all of force_words appear."""
    missing: int = 0
    """Beam search: how many of num_return_sequences were not found for the prompt."""
    details: list[Details] | None = None
    """With top_logprobs: rank and alternatives of each token."""
    work: list[tuple[Stage, ...]] | None = None
    """With show_work: the candidates after each processor, for each token."""


class Sampler:
    """Generates text from prompts. The same prompt, seed and settings give the same text alone or in any batch.

    Rules:
        - A text prompt starts with the tokenizer's prefix (`Tokenizer.prefix_ids`); token ids are used as given.
        - An empty prompt starts from the prefix, otherwise from end-of-text, otherwise from a newline; none of them is
          part of the text.
        - Special tokens in a prompt's text are ordinary text.
        - Beyond the context length, see `SamplingConfig.overflow` and batch.py.
        - max_new_tokens = 0 gives empty completions with finish_reason "length".
        - A sample with no possible token ends with finish_reason "error" and a message; the others continue.
        - Ids that the tokenizer does not have are never generated.

    Args:
        model: a GPT or any `Decodable`; its mode and gradients are not changed.
        tokenizer: one of minigpt's, or any object with encode, decode and vocab_size.
        config: settings for every call; a call can override each of them.
        processors: additional processors, applied at the step "processors" of `config.order`.
        criteria: additional stopping criteria.

    Raises:
        ConfigError: a field of the config has an invalid value, or fields contradict each other.
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
        self.tokenizer = as_tokenizer(tokenizer)
        self.config = config or SamplingConfig()
        self.config.validate()
        self.processors = tuple(processors)
        self.criteria = tuple(criteria)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, show_work: int = 0, **overrides: Any
    ) -> list[list[Completion]]:
        """Generate completions of one or several prompts: result[prompt][sample], for beam search the best first.

        Arguments as for `stream`.
        """
        ids = self._encode(prompts)
        common, configs = self._configs(len(ids), overrides)
        if common.num_beams > 1:
            if show_work:
                raise ConfigError("show_work: does not work with beam search; remove num_beams")
            return self._search(ids, common, configs)
        collected: dict[tuple[int, int], list[Event]] = {}
        for event in self._stream(ids, common, configs, show=show_work):
            collected.setdefault((event.prompt, event.sample), []).append(event)
        result: list[list[Completion]] = [[] for _ in ids]
        for (prompt, _), events in sorted(collected.items()):
            result[prompt].append(_completion(ids[prompt], events))
        return result

    def stream(self, prompts: Prompt | Sequence[Prompt], *, show_work: int = 0, **overrides: Any) -> Iterator[Event]:
        """Generate from one or several prompts and yield an event for each token.

        Args:
            prompts: a text, token ids, or a list of either.
            show_work: number of top candidates to report in `Event.work` after each processor; 0: none.
            overrides: fields of `SamplingConfig` for this call; those in `config.PER_PROMPT`, and stop, may be lists
                with one value per prompt.

        Raises:
            ConfigError: immediately, not at the first event: an unknown field, an invalid value, an unusable prompt, or
                beam search, which cannot be streamed.
        """
        ids = self._encode(prompts)
        common, configs = self._configs(len(ids), overrides)
        if common.num_beams > 1:
            raise ConfigError(
                f"sampling: num_beams is {common.num_beams}, but beam search has no result before its end and cannot "
                "be streamed; use generate, or num_beams 1"
            )
        return self._stream(ids, common, configs, show=show_work)

    def replay(self, prompts: Any, continuations: Any, *, show_work: int = 0, **overrides: Any) -> list[Completion]:
        """Report for given continuations what `stream` would report if their tokens had been generated.

        Args:
            prompts: as for `stream`.
            continuations: one per prompt, as text or token ids.
            show_work: as for `stream`.
            overrides: as for `stream`; settings for several texts have no effect.
        """
        ids = self._encode(prompts)
        forced = encode_all(self.tokenizer, continuations, "continuation", bare=True)
        check_forced(forced, min(self.model.vocab_size, self.tokenizer.vocab_size))
        if len(forced) != len(ids):
            raise ConfigError(f"there are {len(ids)} prompts and {len(forced)} continuations; give one per prompt")
        common, configs = self._configs(len(ids), {"top_logprobs": 0, **overrides, **_ONE_TEXT})
        collected: list[list[Event]] = [[] for _ in ids]
        for event in self._stream(ids, common, configs, forced, show_work):
            collected[event.prompt].append(event)
        return [_completion(prompt, events) for prompt, events in zip(ids, collected, strict=True)]

    def score(self, texts: Any, *, stride: int | None = None, top: int = 0, show: bool = False) -> list[Score]:
        """Log-probability of each token of one or several given texts; see `scoring.score_ids`.

        A text is scored as the start of a document: after the tokenizer's prefix, otherwise after end-of-text, which
        predicts the first token. If the tokenizer has neither, the first token has no score. Token ids get the same
        prefix unless they start with it. The prefix itself is not scored.
        """
        prefix = list(self.tokenizer.prefix_ids)
        start = prefix if prefix or self.tokenizer.eot is None else [self.tokenizer.eot]
        texts = as_list(texts, "text")
        encoded = encode_all(self.tokenizer, texts, "text")
        encoded = [ids if start and ids[: len(start)] == start else [*start, *ids] for ids in encoded]
        given = [max(1, min(len(start), len(ids))) for ids in encoded]
        check_prompts(encoded, min(self.model.vocab_size, self.tokenizer.vocab_size))
        return with_bytes(
            score_ids(self.model, encoded, context=given, stride=stride, top=top, show=show), texts, self.tokenizer
        )

    def processors_for(self, **overrides: Any) -> tuple[list[Any], Order]:
        """The processors of a call with these overrides, in order, and the order itself."""
        _, configs = self._configs(1, overrides)
        return cook(configs, self.tokenizer, self.model.vocab_size, self.processors)

    def _stream(
        self,
        ids: list[list[int]],
        common: SamplingConfig,
        configs: list[SamplingConfig],
        forced: Sequence[Sequence[int]] | None = None,
        show: int = 0,
    ) -> Iterator[Event]:
        if isinstance(show, bool) or not isinstance(show, int) or show < 0:
            raise ConfigError(f"show_work is {show!r}; expected the number of tokens to show, 0 for none")
        processors, _ = cook(configs or [common], self.tokenizer, self.model.vocab_size, self.processors)
        return stream_rows(
            self.model,
            ids,
            max_new_tokens=[int(config.max_new_tokens) for config in configs],
            processors=processors,
            samples=int(common.num_return_sequences),
            seeds=[config.seed for config in configs],
            end_ids=self._end_ids(common),
            overflow=common.overflow,
            readers=lambda n: text_reader(
                self.tokenizer, ids[n], configs[n].stop if forced is None else (), common.include_stop
            ),
            criteria=[*_criteria(common), *self.criteria] if forced is None else (),
            forced=forced,
            top=common.top_logprobs,
            show=show,
            max_rows=common.max_rows,
            max_tokens=common.max_batch_tokens,
        )

    def _search(
        self, ids: list[list[int]], common: SamplingConfig, configs: list[SamplingConfig]
    ) -> list[list[Completion]]:
        """Run the beam search, in several batches of prompts if max_rows or max_batch_tokens requires it."""
        if self.criteria:
            raise ConfigError("sampling: criteria do not work with num_beams; remove one of them")
        beams = int(common.num_beams)
        rows = [Row(n, 0, 0, prompt, int(configs[n].max_new_tokens)) for n, prompt in enumerate(ids)]
        limits = [limit and max(1, int(limit) // beams) for limit in (common.max_rows, common.max_batch_tokens)]
        found: dict[int, list[Completion]] = {}
        for part in divide(rows, self.model, *limits):
            numbers = [row.prompt for row in part]
            done = self._search_together(numbers, ids, common, configs)
            found.update(zip(numbers, done, strict=True))
        return [found[n] for n in range(len(ids))]

    def _search_together(
        self, numbers: list[int], ids: list[list[int]], common: SamplingConfig, configs: list[SamplingConfig]
    ) -> list[list[Completion]]:
        """Run the beam search for the prompts with these indices, in one batch."""
        end_ids = self._end_ids(common)
        draws = common.beam_method != "beam"
        # As in transformers: filters keep enough tokens to sample several continuations, one of which may be an end.
        keep = max(2, len(end_ids) + 1) if draws else 1
        processors, order = cook(configs, self.tokenizer, self.model.vocab_size, self.processors, keep)
        words = [[spellings(self.tokenizer, text) for text in _alternatives(word)] for word in common.force_words]
        constraints = [[ids for spelled in word for ids in spelled] for word in words]
        constraints += [[one] if isinstance(one[0], int) else list(one) for one in common.force_words_ids]
        found = search_rows(
            self.model,
            [ids[n] for n in numbers],
            SearchSettings(
                num_beams=common.num_beams,
                num_return_sequences=common.num_return_sequences,
                length_penalty=common.length_penalty,
                early_stopping=common.early_stopping,
                method=common.beam_method,
                num_beam_groups=common.num_beam_groups,
                diversity_penalty=common.diversity_penalty,
            ),
            max_new_tokens=[int(configs[n].max_new_tokens) for n in numbers],
            processors=processors,
            feed=order.feed,
            seeds=[configs[n].seed for n in numbers],
            end_ids=end_ids,
            overflow=common.overflow,
            stopped=self._stopped(ids, configs) if any(config.stop for config in configs) else None,
            constraints=[constraints] * len(numbers) if constraints else (),
            numbers=numbers,
        )
        return [
            [
                Completion(
                    prompt_ids=ids[n],
                    ids=best.tokens,
                    text=read_all(
                        text_reader(self.tokenizer, ids[n], configs[n].stop, common.include_stop), best.tokens, end_ids
                    ),
                    finish_reason=best.finish_reason,
                    seed=best.seed if draws else None,
                    log_probs=best.log_probs,
                    usage=Usage(len(ids[n]), len(best.tokens)),
                    error=best.error,
                    score=best.score,
                    complete=best.complete,
                    missing=int(common.num_return_sequences) - sum(not other.error for other in hypotheses),
                )
                for best in hypotheses
            ]
            for n, hypotheses in zip(numbers, found, strict=True)
        ]

    def _stopped(self, ids: list[list[int]], configs: list[SamplingConfig]) -> Callable[[int, list[int]], bool]:
        return lambda n, written: holds_stop(self.tokenizer, ids[n], written, configs[n].stop)

    def _configs(self, count: int, overrides: dict[str, Any]) -> tuple[SamplingConfig, list[SamplingConfig]]:
        """Apply the overrides: the settings shared by all `count` prompts, and the settings of each prompt."""
        several = {}
        own = {name: value for name, value in overrides.items() if name in OWN}
        overrides = {name: value for name, value in overrides.items() if name not in own}
        if own:
            overrides["extra"] = {**self.config.extra, **overrides.get("extra", {}), **own}
        for name, value in overrides.items():
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(FIELDS)}"
                raise ConfigError(f"sampling: unknown field '{name}'; {hint}")
            values = plain(value)
            listed = isinstance(values, (list, tuple))
            if (name in PER_PROMPT and listed) or (name == "stop" and listed and any(map(_is_list, values))):
                if len(values) != count:
                    raise ConfigError(
                        f"sampling: {name} has {len(values)} values for {count} prompts; give one per prompt"
                    )
                several[name] = values
        common = replace(self.config, **{name: value for name, value in overrides.items() if name not in several})
        configs = [replace(common, **{name: values[i] for name, values in several.items()}) for i in range(count)]
        for config in configs if several else (common,):
            config.validate()
        return common, configs

    def _encode(self, prompts: Any) -> list[list[int]]:
        return encode_prompts(self.tokenizer, prompts, self.model.vocab_size)

    def _end_ids(self, config: SamplingConfig) -> list[int]:
        if config.ignore_eos:
            return []
        given = plain(self.tokenizer.eot if config.eos_token_id is None else config.eos_token_id)
        end_ids = [] if given is None else [given] if isinstance(given, int) else list(given)
        if end_ids and max(end_ids) >= self.model.vocab_size:
            raise ConfigError(
                f"sampling: eos_token_id is {max(end_ids)}; "
                f"expected a token id of the model, 0 to {self.model.vocab_size - 1}"
            )
        return end_ids


# A replay generates one text per prompt, so it overrides the settings for several samples and for beam search.
_ONE_TEXT: dict[str, Any] = {
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "beam_method": "beam",
    "force_words": [],
    "force_words_ids": [],
}


def _criteria(config: SamplingConfig) -> list[Criterion]:
    criteria: list[Criterion] = []
    if config.stop_sequences:
        criteria.append(StopSequences(config.stop_sequences))
    if config.repetition_stop is not None:
        criteria.append(Repeats(config.repetition_stop, config.repetition_stop_length))
    if config.max_time is not None:
        criteria.append(MaxTime(config.max_time))
    return criteria


def _completion(prompt_ids: list[int], events: list[Event]) -> Completion:
    told = [event for event in events if event.token is not None]
    return Completion(
        prompt_ids=prompt_ids,
        ids=[event.token for event in told],  # type: ignore[misc]
        text="".join(event.text for event in events),
        finish_reason=str(events[-1].finish_reason),
        seed=events[-1].seed,
        log_probs=[event.log_prob for event in told],  # type: ignore[misc]
        usage=Usage(len(prompt_ids), len(told)),
        error=events[-1].error,
        details=[event.details for event in told] if told and told[0].details else None,  # type: ignore[misc]
        work=[event.work for event in told] if told and told[0].work else None,
    )


def _alternatives(word: str | Sequence[str]) -> Sequence[str]:
    return [word] if isinstance(word, str) else word


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
