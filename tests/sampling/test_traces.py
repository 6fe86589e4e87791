"""What sampling leaves behind: nothing."""

from __future__ import annotations

import gc
import math
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from threading import Event as Event_

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.model.modes import evaluating
from minigpt.sampling.loop.loop import Event, stream_rows
from table_model import TableLM, TableModule, run
from toys import random_ids, random_model, tiny_config


def modes(module: TableModule) -> list[bool]:
    return [part.training for part in module.modules()]


def test_each_modules_mode_comes_back_after_the_end_an_error_and_an_early_close():
    module = TableModule(TableLM()).train()
    module.frozen.eval()
    before = modes(module)
    assert before == [True, True, False]

    events = stream_rows(module, [[1]], max_new_tokens=5, seeds=[1])
    assert modes(module) == before, "nothing happens before the first event"
    tokens = [next(events).token]
    assert modes(module) == before, "borrowed for the step alone"
    tokens += [event.token for event in events]
    assert modes(module) == before
    assert tokens == run(module.table, [[1]], 5, seeds=[1])[0, 0][0], "no dropout"

    closed = stream_rows(module, [[1]], max_new_tokens=5)
    next(closed)
    closed.close()
    assert modes(module) == before

    module.fail_after = 2
    with pytest.raises(RuntimeError, match="the model broke"):
        list(stream_rows(module, [[1]], max_new_tokens=5))
    assert modes(module) == before


def test_gradients_are_neither_recorded_nor_switched_off_for_the_caller():
    module = TableModule(TableLM())
    seen = []

    def spy(context, logits):
        seen.append((torch.is_grad_enabled(), logits.requires_grad))
        return logits

    for _ in stream_rows(module, [[1]], max_new_tokens=3, processors=[spy]):
        assert torch.is_grad_enabled()
    assert seen == [(False, False)] * 3
    with torch.no_grad():
        for _ in stream_rows(module, [[1]], max_new_tokens=3):
            assert not torch.is_grad_enabled()
    module.all_logits(torch.tensor([[1, 2]])).sum().backward()
    assert module.gain.grad is not None


def test_a_model_that_is_sampled_while_it_trains_still_trains():
    model = random_model(tiny_config("modern")).train()
    run(model, [[1, 2, 3]], 5)
    model(random_ids(2, 8)).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_global_random_state_is_neither_read_nor_changed():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    module = TableModule(TableLM()).train()
    before = state()
    first = run(module, [[1, 2]], 10, samples=2)
    list(stream_rows(module, [[1]], max_new_tokens=2))
    module.fail_after = 1
    with pytest.raises(RuntimeError):
        list(stream_rows(module, [[1]], max_new_tokens=5))
    assert state() == before
    module.fail_after = math.inf
    torch.manual_seed(12345)
    assert run(module, [[1, 2]], 10, samples=2) == first


def test_closing_early_frees_the_cache():
    model = TableLM()
    caches = []

    def new_cache(rows, capacity):
        cache = TableLM.new_cache(model, rows, capacity)
        caches.append(weakref.ref(cache))
        return cache

    model.new_cache = new_cache
    events = stream_rows(model, [[1], [2]], max_new_tokens=9)
    assert isinstance(next(events), Event)
    assert caches[-1]() is not None
    events.close()
    gc.collect()
    assert caches[-1]() is None


def test_a_slide_holds_one_cache_at_a_time():
    model = TableLM(max_context=4, order=None)
    alive: list[weakref.ref] = []

    def new_cache(rows, capacity):
        assert all(cache() is None for cache in alive)
        cache = TableLM.new_cache(model, rows, capacity)
        alive.append(weakref.ref(cache))
        return cache

    model.new_cache = new_cache
    run(model, [[1, 2]], 20)
    assert len(alive) > 5


def test_two_open_streams_share_the_evaluation_mode_until_the_last_one_ends():
    module = TableModule(TableLM()).train()
    module.frozen.eval()
    expected = run(module.table, [[1]], 6, seeds=[1])[0, 0][0]
    first = stream_rows(module, [[1]], max_new_tokens=2, seeds=[1])
    second = stream_rows(module, [[1]], max_new_tokens=6, seeds=[1])
    next(first)
    tokens = [next(second).token]
    list(first)
    tokens += [event.token for event in second]
    assert tokens == expected, "no dropout in either"
    assert modes(module) == [True, True, False], "each module's own mode"


@pytest.mark.parametrize("ending", ["dropped", "closed", "ended"])
@pytest.mark.parametrize("training", [True, False])
def test_a_stream_never_changes_a_mode_that_was_set_since(training, ending):
    module = TableModule(TableLM()).train(not training)
    events = stream_rows(module, [[1]], max_new_tokens=3, seeds=[1])
    tokens = [next(events).token]
    module.train(training)
    if ending == "ended":
        tokens += [event.token for event in events]
        assert tokens == run(module.table, [[1]], 3, seeds=[1])[0, 0][0], "no dropout, whatever the mode between steps"
    elif ending == "closed":
        events.close()
    del events
    gc.collect()
    assert modes(module) == [training] * 3


def test_threads_that_compute_at_once_give_each_module_its_mode_back():
    module = TableModule(TableLM()).train()
    module.frozen.eval()
    inside, leave = Event_(), Event_()

    def stay():
        with evaluating(module):
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=stay)
    other.start()
    assert inside.wait(10)
    with evaluating(module):
        assert modes(module) == [False] * 3
    assert modes(module) == [False] * 3, "the other thread still computes"
    leave.set()
    other.join()
    assert modes(module) == [True, True, False]


def test_a_model_that_holds_its_own_open_stream_is_freed():
    module = TableModule(TableLM()).train()
    module.open = stream_rows(module, [[1]], max_new_tokens=3)
    next(module.open)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_an_open_stream_at_the_end_of_a_program_says_nothing(tmp_path):
    program = """
import torch
from table_model import TableLM, TableModule
from minigpt.sampling.loop.loop import stream_rows

class Holder: pass
holder, module = Holder(), TableModule(TableLM()).train()
holder.open = stream_rows(module, [[1]], max_new_tokens=3)
next(holder.open)
holder.itself = holder
"""
    paths = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_criterion_that_does_not_answer_for_every_row_is_named():
    def one_reason(context):
        return ["enough"]

    with pytest.raises(ConfigError, match=r"criterion .*one_reason.* returned .*each of 2 rows"):
        list(stream_rows(TableLM(), [[1], [2]], max_new_tokens=2, criteria=[one_reason]))
