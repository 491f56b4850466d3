"""medvit-demo: the whole job on a synthetic hospital, in a few minutes: write, inspect, train, judge, predict.

Writes to DIR: hospital/ (DICOM of three invented sites, with junk and damage), labels.csv, run/ (model and report),
report/, export/ (DICOM of patients not seen in training) and results/. Nobody's images, every fault known: the command
returns 0 when exactly the faults that it planted were set aside.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from medvit import io
from medvit.cli import evaluate, predict, train
from medvit.cli.console import Display, Parser, command, tables
from medvit.io import phantom
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, EXIT_UNEXPECTED, UsageError

PATIENTS, EXPORTED = 120, 24
SEED = 2026


def parser() -> Parser:
    """The arguments."""
    result = Parser("demo", __doc__ or "")
    result.add_argument("--output", metavar="DIR", type=Path, default=Path("demo"), help="new folder (default: demo)")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over configs/demo.yaml")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_intermixed_args(argv)
    output: Path = arguments.output
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output}: not empty. Give another --output, or remove it.")
    with Display() as display:
        display.start(f"writing {PATIENTS + EXPORTED} synthetic patients", 0)
        patients = phantom.make_patients(PATIENTS + EXPORTED, SEED)
        hospital = phantom.write_hospital(output / "hospital", patients[:PATIENTS], seed=SEED + 1)
        export = phantom.write_hospital(
            output / "export", patients[PATIENTS:], seed=SEED + 2, labels=output / "export_labels.csv"
        )
    status = max(
        run(
            "train",
            [
                str(hospital.folder),
                "--labels",
                str(hospital.labels),
                "--config",
                "demo",
                "--output",
                str(output / "run"),
                *arguments.overrides,
            ],
        ),
        run("evaluate", [str(output / "run"), "--output", str(output / "report")]),
        run("predict", [str(export.folder), "--model", str(output / "run"), "--output", str(output / "results")]),
    )
    if status:
        return status
    right = [show_faults(hospital), show_faults(export)]
    show_results(output)
    if not all(right):
        print("the faults set aside are not the faults planted: please report this")
        return EXIT_UNEXPECTED
    return EXIT_DONE


def run(name: str, argv: list[str]) -> int:
    """Run another command as a person would; set-aside input is expected here."""
    print(f"\n$ medvit-{name} {' '.join(argv)}", flush=True)
    status = {"train": train, "evaluate": evaluate, "predict": predict}[name].main(argv)
    return EXIT_DONE if status == EXIT_QUARANTINE else status


def show_faults(hospital: phantom.Hospital) -> bool:
    """What was planted in a folder, and what became of it; true when that is all that was set aside."""
    found = io.scan_folder(hospital.folder)
    codes: dict[str, str] = {}
    for entry in found.files:
        if not entry.outcome.used:
            codes[entry.series_uid if entry.series_uid in hospital.planted else entry.path] = str(entry.code)
    console = tables()
    console.print(_fault_table(hospital.planted, codes, hospital.folder.name))
    counts = found.counts()
    used = counts["ok"] + counts["flag"]
    total = used + counts["quarantine"] + counts["reject"] + counts["skip"]
    console.print(
        f"{used} used + {counts['quarantine']} quarantined + {counts['reject']} rejected + {counts['skip']} skipped = "
        f"{total} of {len(found.files)} files seen\n"
    )
    return codes == {name: str(code) for name, code in hospital.planted.items()} and total == len(found.files)


def _fault_table(planted: Mapping[str, str], found: Mapping[str, str], folder: str) -> Table:
    table = Table(title=f"faults planted in {folder}/ and what became of them", title_justify="left")
    for name in ("file or series", "planted", "set aside as", ""):
        table.add_column(name, overflow="fold")
    for name in sorted({*planted, *found}):
        expected, seen = str(planted.get(name, "nothing")), found.get(name, "not set aside")
        table.add_row(name, expected, seen, "ok" if expected == seen else "DIFFERENT")
    return table


def show_results(output: Path) -> None:
    """How the export was judged, against the truth that only the demo knows; and where everything is."""
    with (output / "export_labels.csv").open(encoding="utf-8", newline="") as stream:
        positives = sum(row["label"] == "1" for row in csv.DictReader(stream))
    with (output / "results" / "predictions.csv").open(encoding="utf-8-sig", newline="") as stream:
        called = [row["predicted"] for row in csv.DictReader(stream)]
    print(f"export: {len(called)} studies predicted, {called.count('1')} called positive ({positives} of all are)\n")
    places = {
        "hospital/": "synthetic DICOM for training, with junk and damage",
        "labels.csv": "its labels",
        "run/": "config, cases, metrics, model (bundle/), predictions",
        "report/report.html": "the report: open it in a browser",
        "export/": "DICOM of patients not seen in training",
        "results/": "summary.txt, predictions.csv, reports and pictures as DICOM (sr/, sc/)",
    }
    for place, what in places.items():
        print(f"  {output / place!s:32} {what}")
    shutil.rmtree(output / "run" / "cache", ignore_errors=True)
