"""What `recipe.py` trains and judges on: sets of labelled cases, their rounds of patients, and few of them."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from recipe_contenders import SIZE, configured
from safetensors.torch import save_file

from medvit import data, evaluation, io, training
from medvit.config import DataConfig
from medvit.io.phantom import SITES, PhantomPatient, make_patients, write_hospital
from medvit.records import Case

Indices = npt.NDArray[np.intp]

WINDOWS = {"preprocessing.windows": [[40, 120], [40, 80], [60, 60]]}
"""Of the head: brain, subdural, and 60/60; [level, width]."""

NEGATIVES = 3
"""Slices without haemorrhage of each patient, drawn once."""

PHANTOM = {
    "model.name": "test_vit.r160_in1k",
    "preprocessing.size": 96,
    "data.augment": "null",
    "training.batch_size": 4,
}
"""As in the demo."""

ROUNDS = 3

STEP = 16
"""Slices in a step of training, whatever a scan has."""


JUDGE = training.Judge(score=evaluation.macro_auroc, operating_point=lambda *_: 0.5, temperature=lambda *_: 1.0)
"""Never asked: the last epoch is kept, and no threshold is reported."""


@dataclass(frozen=True)
class Cases:
    """A set made ready: who is trained on and who is judged, in rounds that share no judged patient.

    Attributes:
        cases: labelled.
        classes: names in order.
        cache: folder of prepared slices, of all sizes.
        settings: config key -> value, particular to the set.
        rounds: (train, test) indices.
        faster: how many times as fast its backbone learns.
    """

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    cache: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[tuple[Indices, Indices], ...] = ()
    faster: float = 1.0


def phantom(scratch: Path, _: Path | None) -> Cases:
    """A model of one hospital goes to the next: three draws of 24 patients to learn from and 96 to be judged on.

    The model is timm's smallest, for a ViT-S learns nothing here in a minute; its weights were trained on 96 patients
    of another hospital. Eight slices about the finding.
    """
    old, new = SITES[0], SITES[1]
    first = written(scratch / "first", make_patients(96, seed=7, sites=(old,)), PHANTOM)
    found = written(scratch / "next", make_patients(120 * ROUNDS, seed=8, sites=(new,)), PHANTOM)
    parts = [fold.test for fold in data.make_folds(found.cases, DataConfig(folds=5 * ROUNDS), seed=0)]
    draws = [parts[start : start + 5] for start in range(0, len(parts), 5)]
    rounds = tuple((train, np.sort(np.concatenate(test))) for train, *test in draws)
    return replace(found, settings=PHANTOM | pretrained(first, scratch), rounds=rounds, faster=10.0)


def written(scratch: Path, patients: tuple[PhantomPatient, ...], settings: Mapping[str, Any]) -> Cases:
    """Phantom patients as a set."""
    hospital = write_hospital(scratch / "hospital", patients, faults=False, slices=8)
    return prepared(hospital.folder, hospital.labels, "label", scratch, settings)


def pretrained(found: Cases, scratch: Path) -> dict[str, Any]:
    """Settings that name the weights of a backbone trained on all cases of a set, and the statistics of its input."""
    config = configured("demo", {**found.settings, "data.folds": 0, "training.threads": 1})
    slices = data.SliceCache(found.cache, config.preprocessing)
    experiment = training.Experiment(config, found.cases, found.classes, slices, scratch / "first" / "run", JUDGE)
    model = experiment.refit(sum(stage.epochs for stage in config.training.stages))
    path, encoder = scratch / "first.safetensors", model.encoder
    save_file(encoder.classifier.backbone.model.state_dict(), path)
    return {
        "model.weights": path,
        "preprocessing.mean": list(encoder.mean),
        "preprocessing.std": list(encoder.std),
        "data.normalise": "backbone",
    }


def head_slices(scratch: Path, real: Path | None) -> Cases:
    """Slices of head CT: every one with haemorrhage, and of each patient a few without."""
    folder = _real(real) / "ct_ich"
    with (folder / "slice_labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    scratch.mkdir(parents=True, exist_ok=True)
    labels = scratch / "labels.csv"
    with labels.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(some_slices(rows))
    return folded(prepared(folder / "hospital", labels, "hemorrhage", scratch, WINDOWS | {"training.batch_size": STEP}))


def some_slices(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Rows of all positive slices, and `NEGATIVES` others of each patient."""
    rng, kept = np.random.default_rng(0), []
    others: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if row["hemorrhage"] == "1":
            kept.append(row)
        else:
            others.setdefault(row["patient_id"], []).append(row)
    for name in sorted(others):
        chosen = rng.permutation(len(others[name]))[:NEGATIVES]
        kept += [others[name][index] for index in sorted(chosen)]
    return kept


def head_studies(scratch: Path, real: Path | None) -> Cases:
    """Head CT by study: 82, of which 36 with haemorrhage."""
    folder = _real(real) / "ct_ich"
    settings = WINDOWS | {"training.batch_size": STEP // 8}
    return folded(prepared(folder / "hospital", folder / "labels.csv", "hemorrhage", scratch, settings))


def contrast(scratch: Path, real: Path | None) -> Cases:
    """100 slices of chest CT: contrast medium or none."""
    folder = _real(real) / "siim_ct_100"
    return folded(
        prepared(folder / "dicom_dir", folder / "manifest.csv", "contrast", scratch, {"training.batch_size": STEP})
    )


SETS: Mapping[str, Callable[[Path, Path | None], Cases]] = {
    "phantom": phantom,
    "ct_ich by slice": head_slices,
    "ct_ich by study": head_studies,
    "siim_ct_100": contrast,
}
"""Name -> (scratch folder, folder of real data) -> cases."""


def prepared(folder: Path, labels: Path, column: str, scratch: Path, settings: Mapping[str, Any]) -> Cases:
    """List, join, and group by patient, as medvit-train does."""
    manifest = data.build_manifest(io.scan_folder(folder), labels, label_column=column)
    cache = scratch / "cache"
    labelled = [case for case in manifest.cases if case.label is not None]
    slices = prepare_at(SIZE, labelled, cache, settings)
    prints = {case.case_id: data.slice_prints(slices.load(case)) for case in labelled}
    return Cases(data.group_cases(labelled, prints).cases, manifest.classes, cache, settings)


def prepare_at(size: int, cases: Sequence[Case], cache: Path, settings: Mapping[str, Any]) -> data.SliceCache:
    """Decode all cases at a size, px."""
    slices = data.SliceCache(cache, configured("frozen", {"preprocessing.size": size, **settings}).preprocessing)
    _, failures = slices.build(cases)
    if failures:
        raise SystemExit(f"{len(failures)} cases cannot be read: {failures[0].error}")
    return slices


def folded(found: Cases, folds: int = ROUNDS) -> Cases:
    """Patient-grouped folds; nothing is chosen on validation cases, so those are trained on as well."""
    parts = data.make_folds(found.cases, DataConfig(folds=folds), seed=0)
    rounds = tuple((np.sort(np.concatenate([fold.train, fold.val])), fold.test) for fold in parts)
    return replace(found, rounds=rounds)


def of_patients(cases: Sequence[Case], train: Indices, patients: int) -> Indices:
    """Those of `train` that belong to the first few patients; the share with a finding stays, more contain fewer."""
    last = max(str(case.label) for case in cases)
    positive = {cases[index].group for index in train if cases[index].label == last}
    rng, rank = np.random.default_rng(0), {}
    for kind in (positive, {cases[index].group for index in train} - positive):
        names = rng.permutation(sorted(kind))
        rank |= {str(name): (place + 0.5) / len(names) for place, name in enumerate(names)}
    chosen = set(sorted(rank, key=lambda name: rank[name])[:patients])
    return np.array([index for index in train if cases[index].group in chosen], np.intp)


def _real(real: Path | None) -> Path:
    if real is None:
        raise SystemExit("this set needs --data or MEDVIT_REAL_DATA")
    return real
