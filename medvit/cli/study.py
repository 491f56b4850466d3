"""A labelled folder made ready: scanned, joined with its labels, decoded into the cache, and shown to the person.

Shared by medvit-train, medvit-rank and medvit-evaluate.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from medvit import data, io
from medvit.cli.console import Display
from medvit.records import REASONS, Case, Preprocessing, ReasonCode, UsageError

SHOWN = 20
"""How many of a kind are listed."""


@dataclass(frozen=True)
class Study:
    """A folder made ready for training: its cases, who belongs together, their cache, and what was set aside."""

    inventory: io.Inventory
    manifest: data.Manifest
    grouping: data.Grouping
    cache: data.SliceCache
    failures: tuple[data.Failure, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases that could be read: labelled, or of a target site."""
        return self.grouping.cases


def add_label_arguments(result: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Arguments that name a labelled folder."""
    count = "?" if optional else None
    result.add_argument("folder", metavar="FOLDER", nargs=count, help="DICOM or NIfTI, searched with all subfolders")
    result.add_argument("--labels", metavar="CSV", type=Path, help="table of labels, see below")
    result.add_argument("--label-column", default="label", metavar="COLUMN", help="its class column (default: label)")
    result.add_argument("--site-column", metavar="COLUMN", help="its site column (default: site, else DICOM headers)")
    result.add_argument("--assume-hu", action="store_true", help="take values without rescale tags for HU, flagged")


def prepare(
    arguments: argparse.Namespace,
    cache_dir: Path,
    preprocessing: Preprocessing,
    display: Display,
    target_sites: Sequence[str] = (),
    *,
    unlabelled: bool = False,
) -> Study:
    """Scan, join labels, decode into the cache.

    Args:
        arguments: of `add_label_arguments`.
        cache_dir: where decoded slices go.
        preprocessing: what they are decoded for.
        display: where progress goes.
        target_sites: their unlabelled scans are cases too.
        unlabelled: every scan is a case, and labels need not be given.

    Raises:
        UsageError: folder, labels or classes do not allow training.
    """
    if arguments.labels is None and not unlabelled:
        raise UsageError(
            "--labels is missing: it takes a CSV with a key column and a label column (see -h). Nothing but "
            "--config pretrain_simclr (mocov3, dino, mae) learns without."
        )
    display.start("reading headers", 0)
    folder = Path(arguments.folder)
    inventory = io.scan_folder(
        folder, assume_hu=arguments.assume_hu, index=data.index_path(folder), progress=lambda _: display.step()
    )
    if not inventory.series:
        raise UsageError(f"{arguments.folder}: no CT among {len(inventory.files)} files. Run medvit-inspect on it.")
    manifest = None
    if arguments.labels is not None:
        manifest = data.build_manifest(
            inventory,
            arguments.labels,
            label_column=arguments.label_column,
            site_column=arguments.site_column,
            target_sites=target_sites,
        )
    if manifest is None or unlabelled:
        manifest = data.everything(inventory, manifest)
    cache = data.SliceCache(cache_dir, preprocessing, assume_hu=arguments.assume_hu)
    wanted = [
        case
        for case in manifest.cases
        if unlabelled or case.label is not None or case.site in target_sites or case.split == "target"
    ]
    display.start("decoding", len(wanted))
    hashes, failures = cache.build(wanted, display.step)
    readable = [case for case in wanted if case.case_id in hashes]
    if len({case.label for case in readable} - {None}) < len(manifest.classes):
        raise UsageError(f"after reading, not every class is left: {len(failures)} cases failed. Run medvit-inspect.")
    display.start("looking for copies", len(readable))
    prints = {}
    for case in readable:
        prints[case.case_id] = data.slice_prints(cache.load(case))
        display.step()
    return Study(inventory, manifest, data.group_cases(readable, prints), cache, tuple(failures))


def set_aside(study: Study) -> bool:
    """Whether input was quarantined or rejected."""
    return bool(study.failures) or any(entry.outcome.bad for entry in study.inventory.files)


def show_study(study: Study, folds: Sequence[data.Fold], display: Display) -> None:
    """Cases, what was left out, class by site, and the splits."""
    manifest, cases = study.manifest, study.cases
    patients = len({case.patient_id for case in cases})
    groups = len({case.group for case in cases})
    say = display.say
    labelled = sum(case.label is not None for case in cases)
    what, key = ("labelled cases", manifest.key) if labelled else ("cases without labels", "study")
    say(f"{labelled or len(cases)} {what} of {patients} patients ({groups} groups that stay together), by {key}")
    if len(cases) > labelled > 0:
        of = " of target sites" if any(len(fold.target) for fold in folds) else ""
        say(f"  {len(cases) - labelled} unlabelled cases{of}")
    used = {case.case_id for case in cases}
    unlabelled = sum(case.label is None and case.case_id not in used for case in manifest.cases)
    _show_rows(manifest, display)
    notes = {
        "usable scans have no row": manifest.without_row,
        "cases have no label": unlabelled,
    }
    for what, count in notes.items():
        if count:
            say(f"  {count} {what}")
    if manifest.without_patient:
        say(
            f"  {manifest.without_patient} cases have no patient id: each study, or file without one, counts as a "
            "patient of its own. Where that is wrong, add a patient_id column"
        )
    if manifest.attributes.left_out:
        columns = ", ".join(manifest.attributes.left_out)
        say(
            f"  left out of all results, since they may name people, or have a value for each: columns {columns}. To "
            "keep one that names nobody, rename it, or group its values"
        )
    for column, name in manifest.attributes.renamed.items():
        say(f"  column {column} is called {name} in predictions and report, which have a column of that name")
    for why, count in Counter(other.detail.partition(" (")[0] for other in manifest.not_selected).items():
        say(f"  {count} not selected: {why}")
    for failure in study.failures:
        say(f"  set aside {failure.case.case_id}: {failure.error.code} {failure.error.detail}")
    for code, count in Counter(e.code for e in study.inventory.files if e.code is not None).items():
        say(f"  {count} files {code}: {REASONS[code].remedy}")
    show_grouping(study.grouping, display)
    display.console.print(_class_by_site(study))
    for number, fold in enumerate(folds):
        sizes = ", ".join(f"{len(part)} {name}" for name, part in fold.sides().items() if len(part))
        say(f"fold {number + 1}: {sizes}" if len(folds) > 1 else f"split: {sizes}")


def _show_rows(manifest: data.Manifest, display: Display) -> None:
    """Which rows of the table mean no case: an export may be missing, or its images are no good."""
    rows = {
        "match no file": manifest.unmatched_rows,
        "mean scans that were set aside": manifest.set_aside_rows,
    }
    for what, lines in rows.items():
        if lines:
            shown = ", ".join(map(str, lines[:SHOWN])) + (", ..." if len(lines) > SHOWN else "")
            display.say(f"  {len(lines)} rows of the table {what}: lines {shown}")


def show_grouping(grouping: data.Grouping, display: Display) -> None:
    """Which patients stay together under several ids, and why; as hashes."""
    if copies := sum(ReasonCode.DUP_IDENTICAL in case.codes for case in grouping.cases):
        display.say(f"  {copies} cases show the same slices as another case: flagged {ReasonCode.DUP_IDENTICAL}")
    for reason in dict.fromkeys(bond.reason for bond in grouping.bonds):
        patients = {name for bond in grouping.bonds if bond.reason == reason for name in bond.patients}
        display.say(f"  joined by {reason}: {len(patients)} patient ids")
    for bond in grouping.bonds[:SHOWN]:
        display.say(f"    {bond.reason}: {', '.join(bond.patients)}")
    for bond in grouping.unused[:SHOWN]:
        display.say(
            f"  not used: one {bond.reason} stands with {len(bond.patients)} patient ids, so it names nobody; "
            "if these are one patient, give them one id"
        )


def _class_by_site(study: Study) -> Table:
    classes = study.manifest.classes
    sources = ", ".join(sorted({case.site_source for case in study.cases if case.site_source}))
    table = Table(title=f"cases by site ({sources or 'no site known'}) and label", title_justify="left")
    table.add_column("site")
    columns: dict[str | None, str] = {name: name for name in classes}
    if any(case.label is None for case in study.cases):
        columns |= {None: "(no label)"}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    counts = Counter((case.site, case.label) for case in study.cases)
    for site in sorted({case.site for case in study.cases}):
        table.add_row(site or "(not given)", *(str(counts[site, name]) for name in columns))
    return table
