"""One thin module per command: read the arguments and the configuration, wire the layers, call them.

`medvit NAME ...` and `medvit-NAME ...` are the same. Each command imports only what it needs, so `-h` is quick.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "inspect": "list the CT series of a folder, and every file that is not used, with its reason",
    "rank": "rank pretrained weights before anything is trained",
    "schedule": "find out how much of a slice may be left out early in a training",
    "train": "train a classifier on a folder and a table of labels",
    "evaluate": "write the report of a run, or of anybody's predictions",
    "predict": "run a trained model over an export folder",
    "demo": "do all of it on a synthetic hospital, in a few minutes",
    "doctor": "say what will work on this machine and what will not",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch `medvit NAME ...`."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: medvit COMMAND [...]      medvit COMMAND -h explains each\n")
        print("\n".join(f"  {name:9} {what}" for name, what in COMMANDS.items()))
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"medvit: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # the dispatch: a command costs only its own imports
    status: int = importlib.import_module(f"medvit.cli.{name}").main(rest)
    return status
