"""medvit-predict: run a trained model over an export folder; running it again continues.

One prediction per study, from its best series. OUT gets predictions.csv and results.json, quarantine.csv (what was set
aside, and why), summary.txt, a DICOM report (sr/) and a picture of the slice that decided (sc/) for each study, and
ledger.sqlite, the memory of the run. New or changed studies are predicted again and their results replaced, finished
ones are not. SIGTERM or Ctrl-C stops after the studies under way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import medvit
from medvit import deployment
from medvit.cli.console import Display, Parser, command
from medvit.cli.stopping import Stop, stopped_by_signals
from medvit.deployment import BatchOptions, Summary, Wanted
from medvit.io import Finding
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, ReasonCode, UsageError

EPILOG = """
examples:
  medvit-predict /exports/tonight --model runs/first --output results/tonight
  medvit-predict /exports/tonight --model runs/first --output results/tonight --since 12h --limit 50
  medvit-predict /exports/inbox --model runs/first --output results/inbox --watch
  medvit-predict /exports/tonight --model runs/first --output results/tonight --retry OUT_OF_MEMORY
"""

STABLE_S = 60.0
"""With --watch: a study whose files have not changed for so long is complete. Orthanc's StableAge is the same."""

UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parser() -> Parser:
    """The arguments."""
    result = Parser("predict", __doc__ or "", EPILOG)
    result.add_argument("folder", metavar="FOLDER", type=Path, help="export, searched with all subfolders")
    result.add_argument("--model", metavar="RUN_OR_BUNDLE", type=Path, required=True, help="from medvit-train")
    result.add_argument(
        "--output", metavar="OUT", type=Path, required=True, help="results, on a local disk; kept between runs"
    )
    which = result.add_argument_group("which studies")
    which.add_argument(
        "--since",
        metavar="WHEN",
        type=since,
        help="with a file changed since: 2026-11-27, 2026-11-27T20:00, 12h, 3d",
    )
    which.add_argument("--limit", metavar="N", type=positive, help="at most N studies in this run")
    which.add_argument("--study", metavar="UID", action="append", default=[], help="this study alone; may be repeated")
    which.add_argument(
        "--retry",
        metavar="CODE",
        action="append",
        default=[],
        type=ReasonCode,
        help="again what was set aside for this reason though nothing has changed; may be repeated",
    )
    which.add_argument(
        "--shard", metavar="I/N", type=shard, default=(1, 1), help="the I-th of N parts, each with an OUT of its own"
    )
    when = result.add_argument_group("when")
    when.add_argument(
        "--settled",
        metavar="SECONDS",
        type=float,
        help=f"leave series with a file that changed within so many seconds for later (default: 0; {STABLE_S:g} with "
        "--watch)",
    )
    when.add_argument(
        "--watch",
        metavar="SECONDS",
        type=float,
        nargs="?",
        const=30.0,
        help="go on until stopped, looking for new files at this interval (30)",
    )
    what = result.add_argument_group("what is written")
    what.add_argument("--no-dicom", action="store_true", help="no reports and pictures: tables only")
    what.add_argument(
        "--deidentify", action="store_true", help="nothing that tells who a patient is, in DICOM results neither"
    )
    what.add_argument(
        "--finding",
        metavar="CLASS=SCHEME:VALUE:MEANING",
        action="append",
        default=[],
        type=finding,
        help="code of a class in reports, such as 1=SCT:50960005:Hemorrhage; may be repeated",
    )
    what.add_argument("--json", action="store_true", help="one JSON document about the run on stdout")
    result.add_argument("--assume-hu", action="store_true", help="take values without rescale tags for HU, flagged")
    result.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to compute: here or on a Ray cluster",
    )
    return result


def since(text: str) -> datetime:
    """A time, or a span before now."""
    if span := re.fullmatch(r"(\d+)([mhd])", text):
        return datetime.now(UTC) - timedelta(**{UNITS[span[2]]: int(span[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a date, date and time, or a span such as 12h") from None


def positive(text: str) -> int:
    """A number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 1")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """I/N."""
    part, slash, count = text.partition("/")
    if not slash or not part.isdecimal() or not count.isdecimal() or not 1 <= int(part) <= int(count):
        raise argparse.ArgumentTypeError(f"{text!r}: give I/N, such as 1/4, with I from 1 to N")
    return int(part), int(count)


def finding(text: str) -> tuple[str, Finding]:
    """CLASS=SCHEME:VALUE:MEANING."""
    name, equals, code = text.partition("=")
    parts = code.split(":", 2)
    if not equals or len(parts) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give CLASS=SCHEME:VALUE:MEANING")
    return name, Finding(value=parts[1], scheme=parts[0], meaning=parts[2])


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    model = medvit.load_bundle(arguments.model)
    options = options_of(arguments)
    _check_findings(options, model.info.classes)
    with stopped_by_signals() as stop:
        while True:
            with Display() as display:
                done = deployment.predict_folder(
                    arguments.folder,
                    model,
                    arguments.output,
                    options,
                    stop=stop,
                    start=display.start,
                    step=display.step,
                )
            _tell(done, arguments)
            if arguments.watch is None or stop.wait(arguments.watch):
                return _exit_code(done, stop)


def options_of(arguments: argparse.Namespace) -> BatchOptions:
    """What the arguments ask for."""
    settled = arguments.settled
    if settled is None:
        settled = 0.0 if arguments.watch is None else STABLE_S
    return BatchOptions(
        wanted=Wanted(
            since=arguments.since,
            limit=arguments.limit,
            studies=frozenset(arguments.study),
            retry=frozenset(map(str, arguments.retry)),
            shard=arguments.shard,
        ),
        settled_s=settled,
        assume_hu=arguments.assume_hu,
        dicom=not arguments.no_dicom,
        deidentify=arguments.deidentify,
        findings=dict(arguments.finding),
        engine=arguments.engine,
    )


def _check_findings(options: BatchOptions, classes: Iterable[str]) -> None:
    if unknown := sorted(set(options.findings) - set(classes)):
        raise UsageError(f"--finding {unknown[0]}: the model knows the classes {', '.join(classes)}.")


def _tell(done: Summary, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(dataclasses.asdict(done)), flush=True)
        return
    print(
        f"{done.predicted} studies predicted, {done.kept} already done, {done.failed} set aside while reading"
        + (f", {done.waiting} waiting" if done.waiting else "")
        + f"\n{done.text}results   {arguments.output}\naudit     {done.audit}",
        flush=True,
    )


def _exit_code(done: Summary, stop: Stop) -> int:
    if done.stopped and done.waiting:
        return 128 + stop.signal
    return EXIT_QUARANTINE if done.quarantined or done.rejected else EXIT_DONE
