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
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import medvit
from medvit import deployment, io
from medvit.cli.console import Display, Parser, command
from medvit.cli.stopping import Stop, stopped_by_signals
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, ReasonCode, UsageError

if TYPE_CHECKING:  # torch takes seconds that -h need not wait for
    from medvit.deployment import BatchOptions, Summary
    from medvit.inference import Model
    from medvit.io import Finding

EPILOG = """
examples:
  medvit-predict /exports/tonight --model runs/first --output results/tonight
  medvit-predict /exports/tonight --model runs/first --output results/tonight --since 12h --limit 50
  medvit-predict /exports/inbox --model runs/first --output results/inbox --watch
  medvit-predict /exports/tonight --model runs/first --output results/tonight --retry OUT_OF_MEMORY
  medvit-predict --from dimse://PACS@10.0.0.5:104 --query StudyDate=20261127- --model runs/first \\
      --output results/tonight --send-to dicomweb+https://pacs.example/dicom-web
"""

STABLE_S = 60.0
"""With --watch: a study whose files have not changed for so long is complete. Orthanc's StableAge is the same."""

UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parser() -> Parser:
    """The arguments."""
    result = Parser("predict", __doc__ or "", EPILOG)
    result.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="export, searched with all subfolders")
    result.add_argument("--model", metavar="RUN_OR_BUNDLE", type=Path, required=True, help="from medvit-train")
    result.add_argument(
        "--output", metavar="OUT", type=Path, required=True, help="results, on a local disk; kept between runs"
    )
    pacs = result.add_argument_group(
        "from a PACS and back",
        "URL: dicomweb+http(s)://HOST:PORT/PATH or dimse://AE@HOST:PORT?aet=OURS. Credentials: MEDVIT_PACS_USER and "
        "MEDVIT_PACS_PASSWORD, or MEDVIT_PACS_TOKEN.",
    )
    pacs.add_argument("--from", dest="source", metavar="URL", help="fetch CT studies into OUT/received; predict those")
    pacs.add_argument(
        "--query",
        metavar="KEYWORD=VALUE",
        action="append",
        default=[],
        type=query,
        help="which, by DICOM keyword: StudyDate=20261127- or PatientID=123; may be repeated",
    )
    pacs.add_argument("--send-to", metavar="URL", help="store reports and pictures there, once")
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


def query(text: str) -> tuple[str, str]:
    """KEYWORD=VALUE."""
    keyword, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: give KEYWORD=VALUE, such as StudyDate=20261127-")
    return keyword, value


def since(text: str) -> datetime:
    """A time, or a span before now."""
    try:
        if span := re.fullmatch(r"(\d+)([mhd])", text):
            return datetime.now(UTC) - timedelta(**{UNITS[span[2]]: int(span[1])})
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
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
    longest = (16, 16, 64)  # SH, SH and LO (PS3.3 8.8, PS3.5 6.2)
    if not equals or len(parts) != 3 or not all(0 < len(p) <= most for p, most in zip(parts, longest, strict=True)):
        raise argparse.ArgumentTypeError(f"{text!r}: give CLASS=SCHEME:VALUE:MEANING")
    return name, io.Finding(value=parts[1], scheme=parts[0], meaning=parts[2])


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    _check_places(arguments)
    model = medvit.load_bundle(arguments.model)
    options = options_of(arguments)
    _check_findings(options, model.info.classes)
    with stopped_by_signals() as stop:
        status = EXIT_DONE
        while True:
            try:
                status = _look(arguments, model, options, stop)
            except (io.PacsError, deployment.NothingThereError) as error:
                if arguments.watch is None or isinstance(error, io.PacsRefusedError):
                    raise
                print(f"{error}", file=sys.stderr, flush=True)  # perhaps the next time
            if arguments.watch is None or stop.wait(arguments.watch):
                return status


def _look(arguments: argparse.Namespace, model: Model, options: BatchOptions, stop: Stop) -> int:
    """Fetch, predict and send what there is now; the exit code."""
    folder, failed = arguments.folder, 0
    with Display() as display:
        if arguments.source:
            folder, failed = _receive(arguments, options, stop, display)
        status = _predict(folder, arguments, model, options, stop, display)
        if arguments.send_to and not stop():
            failed += _send(arguments, model, options, display)
    return 128 + stop.signal if stop() and (failed or arguments.send_to) else EXIT_QUARANTINE if failed else status


def _predict(
    folder: Path, arguments: argparse.Namespace, model: Model, options: BatchOptions, stop: Stop, display: Display
) -> int:
    """The exit code; a PACS that has nothing new is no fault, and results may wait to be sent."""
    try:
        done = deployment.predict_folder(
            folder, model, arguments.output, options, stop=stop, start=display.start, step=display.step
        )
    except deployment.NothingThereError as error:
        if not arguments.source:
            raise
        display.say(str(error))
        return EXIT_DONE
    _tell(done, arguments)
    return _exit_code(done, stop)


def _send(arguments: argparse.Namespace, model: Model, options: BatchOptions, display: Display) -> int:
    """How many results the PACS refused."""
    ended = deployment.send_results(
        io.open_pacs(arguments.send_to), arguments.output, model, options, start=display.start, step=display.step
    )
    refused = {code: count for code, count in ended.items() if code}
    display.say(", ".join([f"{ended['']} files stored", *(f"{n} refused ({code})" for code, n in refused.items())]))
    return sum(refused.values())


def _receive(arguments: argparse.Namespace, options: BatchOptions, stop: Stop, display: Display) -> tuple[Path, int]:
    """Where the studies from a PACS are now, and how many could not be fetched."""
    got = deployment.receive(
        io.open_pacs(arguments.source),
        dict(arguments.query),
        arguments.output,
        options.wanted,
        stop=stop,
        start=display.start,
        step=display.step,
    )
    display.say(f"{got.fetched} studies fetched, {got.known} here already, {got.failed} failed {got.why}".rstrip())
    return got.folder, got.failed


def _check_places(arguments: argparse.Namespace) -> None:
    """Addresses before an hour of work, and one source."""
    if (arguments.folder is None) == (arguments.source is None):
        raise UsageError("give either FOLDER or --from URL.")
    if arguments.query and not arguments.source:
        raise UsageError("--query says what to fetch: it goes with --from.")
    if arguments.send_to and arguments.no_dicom:
        raise UsageError("--send-to has nothing to send with --no-dicom.")
    for url in filter(None, (arguments.source, arguments.send_to)):
        io.open_pacs(url)


def options_of(arguments: argparse.Namespace) -> BatchOptions:
    """What the arguments ask for."""
    settled = arguments.settled
    if settled is None:
        settled = 0.0 if arguments.watch is None else STABLE_S
    return deployment.BatchOptions(
        wanted=deployment.Wanted(
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
