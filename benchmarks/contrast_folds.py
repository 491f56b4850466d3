"""Contrast agent on `siim_ct_100`, a frozen DINOv2-derived ViT-S/14 at 126 px, five patient-grouped folds.

What several benchmarks look into: cases that were judged by a model which never saw their patients.
"""

from __future__ import annotations

from pathlib import Path

from medvit import data, evaluation, io, training
from medvit.config import load_config
from medvit.inference import Judged


def judged_cases(shared: Path, folder: Path, *overrides: str) -> list[Judged]:
    """Train five folds; each held-out case with the model of its fold.

    Args:
        shared: holds data/ and weights/.
        folder: where the run goes; slices and features that are there already are used again.
        overrides: settings over those above.
    """
    source = shared / "data" / "siim_ct_100"
    weights = shared / "weights" / "vit_small_patch14_dinov2.safetensors"
    settings = [f"model.weights={weights}", "preprocessing.size=126", "data.folds=5", *overrides]
    config = load_config("frozen", settings)
    manifest = data.build_manifest(io.scan_folder(source), source / "manifest.csv", label_column="contrast")
    slices = data.SliceCache(folder / "cache", config.preprocessing)
    hashes, _ = slices.build(manifest.cases)
    readable = [case for case in manifest.cases if case.case_id in hashes]
    cases = data.group_cases(readable, {case.case_id: data.slice_prints(slices.load(case)) for case in readable}).cases
    judge = training.Judge(
        score=evaluation.macro_auroc,
        operating_point=lambda labels, probabilities: evaluation.operating_point(labels, probabilities[:, -1]),
        temperature=evaluation.fit_temperature,
    )
    experiment = training.Experiment(
        config, cases, manifest.classes, slices, folder / f"run{config.training.seed}", judge
    )
    judged = []
    for number, fold in enumerate(data.make_folds(cases, config.data, config.training.seed)):
        judged += experiment.run_fold(fold, number).judged
    return judged
