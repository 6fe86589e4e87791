"""The Sampler: text or token ids in; completions, a stream of events, or scores out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from minigpt.checkpoint.checkpoint import Loaded, load
from minigpt.errors import ConfigError
from minigpt.model.fast import fast as laid_out
from minigpt.sampling.beams import end_ids, search
from minigpt.sampling.completion import Completion, completion_of, in_order, refusals
from minigpt.sampling.draws.decodable import Decodable, as_decodable
from minigpt.sampling.loop.criteria import criteria_of
from minigpt.sampling.loop.loop import Event, check_forced, check_prompts, stream_rows
from minigpt.sampling.loop.prompts import (
    Prompt,
    as_list,
    encode_all,
    encode_prompts,
    hidden_tokens,
    text_reader,
)
from minigpt.sampling.loop.stopping import Criterion
from minigpt.sampling.recipe import cook
from minigpt.sampling.scoring import Score, score_ids, with_bytes
from minigpt.sampling.settings.calls import Call, Settings, as_config, groups, settings_of
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.settings.conflicts import switched_on
from minigpt.sampling.settings.needs import name_without_effect
from minigpt.sampling.settings.orders import Order
from minigpt.sampling.stored import stored_settings
from minigpt.terminal import notice_once
from minigpt.tokenizer.given import as_tokenizer

WINDOW = 1024  # prompts that `iterate` sorts by length and splits into batches at once


class Sampler:
    """Generates text from prompts. The same prompt, seed and settings give the same text alone or in any batch.

    Rules:
        - A text prompt starts with the tokenizer's prefix (`Tokenizer.prefix_ids`), unless `add_special_tokens` is
          False; token ids are used as given.
        - An empty prompt starts from the prefix, otherwise from end-of-text, otherwise from a newline; none of them is
          part of the text.
        - Special tokens in a prompt's text are ordinary text, unless `parse_special` is True.
        - Special tokens that are generated are not part of the text, unless `skip_special_tokens` is False.
        - Beyond the context length, see `SamplingConfig.overflow` and batch.py.
        - max_new_tokens = 0 gives empty completions with finish_reason "length".
        - A sample with no possible token ends with finish_reason "error" and a message; the others continue.
        - Ids that the tokenizer does not have are never generated.
        - One seed s for several prompts is s + i for prompt i; `Completion.seed` tells.
        - A batch has at most as many rows as fit in memory.

    Args:
        model: a GPT or any `Decodable`; its mode and gradients are not changed. Or what `minigpt.load` returns or
            takes, with its tokenizer and its own settings.
        tokenizer: one of minigpt's, one of transformers', or any object with encode, decode and vocab_size.
        config: settings for every call, as a SamplingConfig or a dict of its fields; a call can override each of them.
        processors: additional processors, applied at the step "processors" of `config.order`.
        criteria: additional stopping criteria.

    Raises:
        ConfigError: an unusable model or tokenizer, a field of the config with an invalid value, or fields that
            contradict each other.
    """

    def __init__(
        self,
        model: Decodable | Loaded | str | Path,
        tokenizer: Any = None,
        config: SamplingConfig | dict[str, Any] | None = None,
        processors: Callable | Sequence[Callable] = (),
        criteria: Criterion | Sequence[Criterion] = (),
    ) -> None:
        own = None
        if isinstance(model, (str, Path)):
            model = load(model)
        if isinstance(model, Loaded):
            own = stored_settings(model)
            tokenizer = model.tokenizer if tokenizer is None else tokenizer
            model = model.model
        self.model = as_decodable(model)
        if tokenizer is None:
            raise ConfigError(
                "Sampler: no tokenizer; give Sampler(model, tokenizer), or a run: Sampler(minigpt.load(...))"
            )
        self.tokenizer = as_tokenizer(tokenizer)
        self.config = own or SamplingConfig() if config is None else as_config(config, own)
        self.config.validate()
        name_without_effect(self.config, switched_on(self.config))
        self.processors = _several(processors)
        self.criteria = _several(criteria)

    @classmethod
    def of(cls, run: Loaded | str | Path, config: Any = None, *, fast: bool = True, **overrides: Any) -> Sampler:
        """The sampler of a run, checkpoint or Hugging Face folder, with its own settings.

        Args:
            run: what `minigpt.load` returns or takes.
            config: settings in place of the checkpoint's; a dict replaces only the fields that it has.
            fast: decode with a copy of the model that is laid out for it (see `minigpt.fast`); later changes of the
                model do not reach the copy.
            overrides: fields of `SamplingConfig`.
        """
        loaded = run if isinstance(run, Loaded) else load(run)
        own = stored_settings(loaded) if config is None else as_config(config, stored_settings(loaded))
        model = laid_out(loaded.model) if fast else loaded.model
        return cls(model, loaded.tokenizer, as_config(overrides, own))

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        config: Settings = None,
        *,
        show_work: int = 0,
        **overrides: Any,
    ) -> list[list[Completion]]:
        """Generate completions of one or several prompts: result[prompt][sample], for beam search the best first.

        Arguments as for `stream`.
        """
        ids, call = self._open(prompts, config, overrides)
        result: list[list[Completion]] = [[] for _ in ids]
        for done in self._complete(ids, call, show_work):
            result[done.prompt_index].append(done)
        return [sorted(samples, key=lambda done: done.sample_index) for samples in result]

    def iterate(
        self,
        prompts: Iterable[Prompt],
        config: Settings = None,
        *,
        show_work: int = 0,
        unordered: bool = False,
        **overrides: Any,
    ) -> Iterator[Completion]:
        """Generate completions of many prompts and yield each when it is finished, in the order of the prompts.

        Prompts are read as they are needed, a window of them at a time, so they may be an endless iterator; a window is
        sorted by length and split into batches that fit in memory. A prompt longer than the context with overflow
        "stop" gives completions with an error.

        Args:
            prompts: texts or lists of token ids.
            config: as for `stream`; a list needs prompts whose number is known.
            show_work: as for `stream`.
            unordered: yield each completion at once, not after those of earlier prompts.
            overrides: as for `stream`; lists need prompts whose number is known.

        Raises:
            ConfigError: as `stream`, for the first window immediately.
            MemoryExceeded: a single row does not fit.
        """
        several = as_list(prompts) if isinstance(prompts, str) or hasattr(prompts, "__len__") else None
        if several is None and (
            isinstance(config, (list, tuple)) or any(isinstance(v, list) for v in overrides.values())
        ):
            several = list(prompts)
        source = iter(prompts if several is None else several)
        if several is not None:
            whole = self._settings(len(several), config, overrides)

        def windows() -> Iterator[tuple[list[list[int]], Call]]:
            start = 0
            while window := list(islice(source, WINDOW)):
                if several is None:
                    window = as_list(window)
                    call = self._settings(len(window), config, overrides, start)
                else:
                    call = whole.part(start, start + len(window))
                yield self._encode(window, call), call
                start += len(window)

        opened = windows()
        begun = next(opened, None)

        def completions() -> Iterator[Completion]:
            window = begun
            while window is not None:
                done = self._complete(*window, show_work, self._too_long(*window))
                yield from done if unordered else in_order(done, window[1])
                window = next(opened, None)

        return completions()

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        config: Settings = None,
        *,
        show_work: int = 0,
        **overrides: Any,
    ) -> Iterator[Event]:
        """Generate from one or several prompts and yield an event for each token.

        Args:
            prompts: a text, token ids, or several of either.
            config: settings for this call in place of the sampler's: a SamplingConfig, a dict of the fields to replace,
                or a list of these with one per prompt.
            show_work: number of top candidates to report in `Event.work` after each processor; 0: none.
            overrides: fields of `SamplingConfig` for this call; those in `config.PER_PROMPT`, and stop, may be lists
                with one value per prompt.

        Raises:
            ConfigError: immediately, not at the first event: an unknown field, an invalid value, an unusable prompt, or
                beam search, which cannot be streamed.
            MemoryExceeded: while iterating, if memory runs out.
        """
        ids, call = self._open(prompts, config, overrides)
        for common in (call.common, *call.configs):
            if common.num_beams > 1:
                raise ConfigError(
                    f"sampling: num_beams is {common.num_beams}, but beam search has no result before its end and "
                    "cannot be streamed; use generate, or num_beams 1"
                )
        return self._stream(ids, call, show=show_work)

    def replay(self, prompts: Any, continuations: Any, *, show_work: int = 0, **overrides: Any) -> list[Completion]:
        """Report for given continuations what `stream` would report if their tokens had been generated.

        Args:
            prompts: as for `stream`.
            continuations: one per prompt, as text or token ids.
            show_work: as for `stream`.
            overrides: as for `stream`; settings for several texts have no effect.
        """
        ids, call = self._open(prompts, None, {"top_logprobs": 0, **overrides, **_ONE_TEXT})
        forced = encode_all(self.tokenizer, continuations, "continuation", bare=True)
        check_forced(forced, min(self.model.vocab_size, self.tokenizer.vocab_size))
        if len(forced) != len(ids):
            raise ConfigError(f"there are {len(ids)} prompts and {len(forced)} continuations; give one per prompt")
        collected: list[list[Event]] = [[] for _ in ids]
        for event in self._stream(ids, call, forced, show_work):
            collected[event.prompt].append(event)
        return [completion_of(prompt, events) for prompt, events in zip(ids, collected, strict=True)]

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

    def processors_for(self, config: Settings = None, **overrides: Any) -> tuple[list[Any], Order]:
        """The processors of a call with these settings, in order, and the order itself."""
        call = self._settings(1, config, overrides)
        return cook(call.configs, self.tokenizer, self.model.vocab_size, self.processors)

    def _settings(self, count: int, config: Settings, overrides: dict[str, Any], first: int = 0) -> Call:
        return settings_of(self.config, count, config, overrides, first)

    def _encode(self, prompts: list[Any], call: Call) -> list[list[int]]:
        """The prompts' ids; a notice if one is longer than the model's context."""
        ids = encode_prompts(self.tokenizer, prompts, call.configs, self.model.vocab_size, call.first)
        context = self.model.max_context
        if any(
            len(one) > context and config.overflow == "slide" for one, config in zip(ids, call.configs, strict=True)
        ):
            notice_once(
                f"a prompt is longer than the model's context of {context} tokens; the model sees only its end "
                "(overflow 'slide')"
            )
        return ids

    def _open(self, prompts: Any, config: Settings, overrides: dict[str, Any]) -> tuple[list[list[int]], Call]:
        """The ids of the prompts, and their settings."""
        several = as_list(prompts)
        call = self._settings(len(several), config, overrides)
        return self._encode(several, call), call

    def _too_long(self, ids: list[list[int]], call: Call) -> set[int]:
        """The prompts that do not fit in the context, which they may not leave."""
        context = self.model.max_context
        return {
            n
            for n, (one, own) in enumerate(zip(ids, call.configs, strict=True))
            if own.overflow == "stop" and len(one) > context
        }

    def _complete(
        self, ids: list[list[int]], call: Call, show: int, refused: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Completions as they are finished, those of beam search prompt by prompt; an error for refused prompts."""
        searched = {n for n, config in enumerate(call.configs) if config.num_beams > 1}
        if searched or call.common.num_beams > 1:
            if show:
                raise ConfigError("show_work: does not work with beam search; remove num_beams")
            if self.criteria:
                raise ConfigError("sampling: criteria do not work with num_beams; remove one of them")
        events = self._stream(ids, call, show=show, leave=searched.union(refused))
        errors = refusals(ids, call, refused, self.model.max_context)
        return chain(errors, self._completions(ids, call, events, searched.difference(refused)))

    def _completions(
        self, ids: list[list[int]], call: Call, events: Iterator[Event], searched: Collection[int]
    ) -> Iterator[Completion]:
        open_rows: dict[tuple[int, int], list[Event]] = {}
        for event in events:
            row = open_rows.setdefault((event.prompt, event.sample), [])
            row.append(event)
            if event.finish_reason is not None:
                yield completion_of(ids[event.prompt - call.first], open_rows.pop((event.prompt, event.sample)))
        for numbers in groups(call.configs):
            if here := [n for n in numbers if n in searched]:
                yield from search(self.model, self.tokenizer, here, ids, call, self.cooked)

    def _stream(
        self,
        ids: list[list[int]],
        call: Call,
        forced: Sequence[Sequence[int]] | None = None,
        show: int = 0,
        leave: Collection[int] = (),
    ) -> Iterator[Event]:
        """Events of all prompts but those in `leave`, group by group."""
        if isinstance(show, bool) or not isinstance(show, int) or show < 0:
            raise ConfigError(f"show_work is {show!r}; expected the number of tokens to show, 0 for none")
        kinds = ([n for n in numbers if n not in leave] for numbers in groups(call.configs))
        return chain.from_iterable([self._stream_group(here, ids, call, forced, show) for here in kinds if here])

    def _stream_group(
        self,
        numbers: list[int],
        ids: list[list[int]],
        call: Call,
        forced: Sequence[Sequence[int]] | None,
        show: int,
    ) -> Iterator[Event]:
        common = call.configs[numbers[0]]
        configs, first = call.configs, call.first
        hidden = hidden_tokens(self.tokenizer, common.skip_special_tokens)
        return stream_rows(
            self.model,
            [ids[n] for n in numbers],
            numbers=[first + n for n in numbers],
            max_new_tokens=[int(configs[n].max_new_tokens) for n in numbers],
            processors=self.cooked(numbers, call)[0],
            samples=int(common.num_return_sequences),
            seeds=[call.seeds[n] for n in numbers],
            end_ids=end_ids(self.model, self.tokenizer, common),
            overflow=common.overflow,
            readers=lambda number: text_reader(
                self.tokenizer,
                ids[number - first],
                configs[number - first].stop if forced is None else (),
                common.include_stop,
                hidden,
            ),
            criteria=[*criteria_of(common), *self.criteria] if forced is None else (),
            forced=None if forced is None else [forced[n] for n in numbers],
            top=common.top_logprobs,
            show=show,
            max_rows=common.max_rows,
            max_tokens=common.max_batch_tokens,
        )

    def cooked(self, numbers: list[int], call: Call, keep: int = 1) -> tuple[list[Any], Order]:
        """The processors of a group. Parameters that differ have a place for every prompt of the call."""
        here, first = set(numbers), call.configs[numbers[0]]
        if all(call.configs[n] is first for n in numbers):
            configs = [first]
        else:
            own = [config if n in here else first for n, config in enumerate(call.configs)]
            configs = [first] * call.first + own
        return cook(configs, self.tokenizer, self.model.vocab_size, self.processors, keep)


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


def _several(functions: Any) -> tuple[Any, ...]:
    """One function or several, as a tuple."""
    return (functions,) if callable(functions) and not isinstance(functions, (list, tuple)) else tuple(functions)
