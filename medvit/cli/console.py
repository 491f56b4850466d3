"""What all commands share: arguments that teach, errors in plain words, progress bars or plain lines.

Results go to stdout, everything else to stderr. No message carries identity: errors of libraries, whose text may hold
header values, are shown by kind only unless MEDVIT_DEBUG is set; their logs and warnings never (`medvit.cli.logs`).
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from medvit.cli.logs import identity_withheld
from medvit.records import EXIT_UNEXPECTED, EXIT_USAGE, MedvitError

PLAIN_WIDTH = 150
"""Columns of a table that goes to a file or pipe."""

PLAIN_SECONDS = 15.0
"""Without a terminal: a line at most this often."""

EXIT_CODES = """exit codes: 0 done; 1 unexpected error; 2 wrong usage, configuration or labels; 3 done, and some input
was quarantined or rejected (listed); 4 refused by a gate (leakage, fairness tolerance, self-test, audit)"""


class Parser(argparse.ArgumentParser):
    """Keeps the layout of its texts, and ends with 2 on wrong usage."""

    def __init__(self, name: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"medvit-{name}",
            description=description,
            epilog=f"{epilog.strip()}\n\n{EXIT_CODES}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def command(run: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Turn a command's errors into messages and exit codes."""

    @functools.wraps(run)
    def guarded(argv: list[str] | None = None) -> int:
        # third-party chatter is not for operators; what matters is said by us
        logging.getLogger("timm").setLevel(logging.ERROR)
        logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
        try:
            with identity_withheld():
                return run(argv)
        except MedvitError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept", file=sys.stderr)
            return 130
        except SystemExit as end:  # argparse
            return end.code if isinstance(end.code, int) else EXIT_USAGE
        except BrokenPipeError:
            return EXIT_UNEXPECTED
        except Exception as error:
            if os.environ.get("MEDVIT_DEBUG"):
                raise
            print(f"unexpected error: {type(error).__name__}. MEDVIT_DEBUG=1 shows where.", file=sys.stderr)
            return EXIT_UNEXPECTED

    return guarded


def tables() -> Console:
    """Where results are shown: stdout, wide enough for a table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


class Display:
    """Progress of one command: a bar on a terminal, a line now and then elsewhere. Use as a context manager.

    Args:
        quiet: show nothing: another process of the same run does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console, self.quiet = Console(stderr=True, quiet=quiet), quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task: TaskID | None = None
        self.what, self.total, self.done, self.told = "", 0, 0, 0.0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def start(self, what: str, total: int) -> None:
        """Begin a new piece of work; 0 means that its length is not known."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(what, total=total or None)
        self.what, self.total, self.done, self.told = what, total, 0, time.monotonic()
        if not self.console.is_terminal and not self.quiet:
            print(f"{what}{f' ({total})' if total else ''}", file=sys.stderr, flush=True)

    def step(self, text: str = "") -> None:
        """One unit is done."""
        self.done += 1
        if self.task is not None:
            self.bar.update(self.task, advance=1, description=f"{self.what}  {text}" if text else self.what)
        if not self.console.is_terminal and not self.quiet and time.monotonic() - self.told > PLAIN_SECONDS:
            self.told = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            print(f"{self.what} {self.done}{of} {text}".rstrip(), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
