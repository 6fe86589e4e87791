"""The command line: one verb per file; a verb imports what it needs when it runs, so that `--help` is fast."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from minigpt.cli.eval import evaluate
from minigpt.cli.info import info
from minigpt.cli.plan import plan
from minigpt.cli.prepare import prepare
from minigpt.cli.sample import sample
from minigpt.cli.study.dynamics import dynamics
from minigpt.cli.study.heads import heads
from minigpt.cli.study.inspect import inspect
from minigpt.cli.study.lens import lens
from minigpt.cli.study.patch import patch
from minigpt.cli.study.sae import sae
from minigpt.cli.train import train
from minigpt.errors import ConfigError, MinigptError, leave
from minigpt.terminal import show_what_can_be_shown, spelled

PROG = "minigpt"


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "sample": sample,
    "prepare": prepare,
    "eval": evaluate,
    "info": info,
    "plan": plan,
    "inspect": inspect,
    "lens": lens,
    "heads": heads,
    "patch": patch,
    "dynamics": dynamics,
    "sae": sae,
}


def usage() -> str:
    """What `minigpt --help` prints."""
    lines = [f"usage: {PROG} VERB ...   ({PROG} VERB --help lists its settings)", ""]
    for name, verb in VERBS.items():
        summary = re.sub(r"\s+", " ", verb.__doc__ or "").split(": ", 1)[0]
        lines.append(f"  {name:8} {summary}")
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> int:
    """Run one verb; returns the exit code (see errors.py). `--debug` shows the traceback of an error."""
    show_what_can_be_shown()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [item for item in arguments if item != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from minigpt import __version__

        print(f"{PROG} {__version__}")
        return 0
    try:
        verb = VERBS.get(arguments[0])
        if verb is None:
            near = get_close_matches(arguments[0], VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
            raise ConfigError(f"{arguments[0]}: no such verb; {hint}")
        verb(arguments[1:])
    except MinigptError as error:
        if debug:
            raise
        print(spelled(f"{PROG}: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\n{PROG}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has closed it (| head): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from minigpt.model.device import told

        found = None if debug or arguments[0] == "train" else told(error)
        if found is None:
            raise
        print(f"{PROG}: {found[0]}", file=sys.stderr)
        return found[1]
    return 0


def run(*arguments: str) -> None:
    """Run the verb and leave the process with its exit code: what the scripts do.

    Args:
        arguments: in place of the command line's, if there are any.
    """
    code = main(arguments or None)
    if "minigpt.training.processes.processes" in sys.modules:  # it may have been one of several, or have launched them
        leave(code)
    sys.exit(code)
