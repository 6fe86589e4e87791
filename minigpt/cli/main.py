"""The command line: one verb per file; a verb imports what it needs when it runs, so that `--help` is fast."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial

from minigpt.choices import Row, Table
from minigpt.cli.plugins import take_plugins
from minigpt.cli.study.analysis import analyse
from minigpt.errors import ConfigError, DiskError, MinigptError, leave
from minigpt.plugins import loaded, table
from minigpt.terminal import show_what_can_be_shown, spelled

PROG = "minigpt"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


VERBS = Table(
    "verb",
    "minigpt",
    {  # the help of a verb is its docstring up to the first colon
        "train": Row("minigpt.cli.train:train", ""),
        "sample": Row("minigpt.cli.sample:sample", ""),
        "prepare": Row("minigpt.cli.prepare:prepare", ""),
        "eval": Row("minigpt.cli.eval:evaluate", ""),
        "info": Row("minigpt.cli.info:info", ""),
        "plan": Row("minigpt.cli.plan:plan", ""),
        "inspect": Row("minigpt.cli.study.inspect:inspect", ""),
        "lens": Row("minigpt.cli.study.lens:lens", ""),
        "heads": Row("minigpt.cli.study.heads:heads", ""),
        "patch": Row("minigpt.cli.study.patch:patch", ""),
        "dynamics": Row("minigpt.cli.study.dynamics:dynamics", ""),
        "sae": Row("minigpt.cli.study.sae:sae", ""),
    },
)


def usage() -> str:
    """What `minigpt --help` prints."""
    lines = [f"usage: {PROG} VERB ...   ({PROG} VERB --help lists its settings)", ""]
    for name, verb in VERBS.items():
        summary = VERBS.rows[name].help or re.sub(r"\s+", " ", verb.__doc__ or "").split(": ", 1)[0]
        lines.append(f"  {name:8} {summary}")
    if loaded():
        lines += [f"  {name:8} {row.help}" for name, row in table("analysis").rows.items()]
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> int:
    """Run one verb; returns the exit code (see errors.py). `--debug` shows the traceback of an error."""
    show_what_can_be_shown()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [item for item in arguments if item != "--debug"]
    try:
        arguments = take_plugins(arguments)
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return 0
        if arguments[0] == "--version":
            from minigpt import __version__

            print(f"{PROG} {__version__}")
            return 0
        verb = VERBS.get(arguments[0])
        if verb is None and loaded() and arguments[0] in table("analysis"):
            verb = partial(analyse, table("analysis"), arguments[0])
        if verb is None:
            near = get_close_matches(arguments[0], VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
            raise ConfigError(f"{arguments[0]}: no such verb; {hint}")
        verb(arguments[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
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
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{PROG}: the output cannot be written ({error.strerror})", file=sys.stderr)
        return DiskError.exit_code
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
