"""What is adapted in `adaptation.py`: digits of two kinds, a phantom hospital of three sites, CT of two makers.

A problem is cases of the source with labels, cases of the target that are trained on without, and cases of both that
are only judged on. Everything is a function of the problem's name and the seed; the choices are the constants below.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MethodType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import medvit.io
from medvit.config import AugmentConfig, ModelConfig
from medvit.data.intensity import apply_windows
from medvit.data.pipelines import prediction_transform, prepare_slices
from medvit.evaluation.metrics import auroc, macro_auroc
from medvit.io import phantom
from medvit.models.backbone import normalisation
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.records import Preprocessing

Values = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

DIGITS = {"source": 2000, "target": 1800, "judged": 2000}
"""Images, as in the usual protocol of this pair (2,000 MNIST, 1,800 USPS), and as many more that are only judged on."""

DIGIT_PX, DIGIT_PATCH = 28, 7

VARIANTS = 16
"""Of each digit that is trained on, turned, shifted and zoomed as much as medvit's augmentation does by default."""

PHANTOM = {"patients_per_source_site": 150, "target": 300, "judged": 200}
PHANTOM_PX, PHANTOM_PATCH, PHANTOM_SLICES, PHANTOM_DRAWS = 64, 8, 4, 2
PHANTOM_WINDOW = (-600.0, 1500.0)
"""The lung's: level and width, HU."""

TARGET_SITE = replace(phantom.SITES[2], name="Quay Hospital", hu_offset=180.0)
"""Hill University's scanner, out of calibration."""

PLACES = {
    "right back": phantom.FINDING_MM,
    "left back": (82.0, 28.0, 0.0),
    "right front": (-86.0, -36.0, 0.0),
    "left front": (92.0, -36.0, 0.0),
}
"""Where in the lungs the finding is, LPS mm: a class each, after the class of those who have none."""

SMALL = {"depth": 4, "embed_dim": 64, "num_heads": 4}
"""The ViT that is trained from scratch."""

CT_PX, CT_CUT = 126, 9
"""Pixels, and how many of twelve blocks are never trained: their tokens are computed once."""


@dataclass(frozen=True)
class Cases:
    """Cases side by side.

    Attributes:
        values: (N, S, C, H, W) what the model sees, or (N, S, T, D) tokens.
        labels: (N,) class index.
        sites: (N,) domain index.
        patients: (N,).
    """

    values: Values
    labels: Labels
    sites: Labels
    patients: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: npt.NDArray[Any]) -> Cases:
        """Some of them."""
        return Cases(self.values[chosen], self.labels[chosen], self.sites[chosen], self.patients[chosen])

    def scaled(self, mean: Values, std: Values) -> Cases:
        """With values (N, S, C, H, W) normalised per channel."""
        shape = (-1, 1, 1)
        return replace(self, values=(self.values - mean.reshape(shape)) / std.reshape(shape))


def together(*parts: Cases) -> Cases:
    """All cases of several."""
    return Cases(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("values", "labels", "sites", "patients"))
    )


@dataclass(frozen=True)
class Problem:
    """One way to go.

    Attributes:
        source: trained on with labels.
        source_judged: of the same sites, held out; empty where there are too few.
        target: trained on without labels.
        target_judged: judged once; the very cases of `target` where there are too few to hold any out.
        classes: K.
        draws: slices per case and step in training.
        shown: slices per case when judged, the first ones.
        build: an untrained classifier, from torch's current seed.
        score: (labels (N,), probabilities (N, K)) -> figure of merit.
    """

    source: Cases
    source_judged: Cases
    target: Cases
    target_judged: Cases
    classes: int
    draws: int
    shown: int
    build: Callable[[], CtClassifier]
    score: Callable[[Labels, Values], float]


def accuracy(labels: Labels, probabilities: Values) -> float:
    """Share of right classes."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def auroc_of_last(labels: Labels, probabilities: Values) -> float:
    """AUROC of the last class."""
    return auroc(labels == probabilities.shape[1] - 1, probabilities[:, -1])


def small_vit(size: int, patch: int, channels: int, classes: int, pooling: str) -> Callable[[], CtClassifier]:
    """A ViT from scratch."""
    options = SMALL | {"patch_size": patch}
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=options, pooling=pooling)
    return lambda: build_classifier(config, size=size, channels=channels, classes=classes)[0]


def normalised(source: Cases, *others: Cases) -> list[Cases]:
    """All by mean and std per channel of the source's training cases, and of no other."""
    mean, std = (statistic(source.values, axis=(0, 1, 3, 4)) for statistic in (np.mean, np.std))
    return [cases.scaled(mean, std) for cases in (source, *others)]


# ---- digits ---------------------------------------------------------------------------------------------------------


def digits(data: Path, direction: str, seed: int) -> Problem:
    """`MNIST to USPS` or `USPS to MNIST`; which images are trained on depends on the seed."""
    names = direction.split(" to ")
    pools = [_digit_pool(data / "digits", name, site) for site, name in enumerate(names)]
    rng = np.random.default_rng([seed, 7])
    source, target = (
        varied(train.take(rng.permutation(len(train))[: DIGITS[role]]), rng)
        for (train, _), role in zip(pools, ("source", "target"), strict=True)
    )
    held_out = [judged.take(np.arange(DIGITS["judged"])) for _, judged in pools]
    source, source_judged, target, target_judged = normalised(source, held_out[0], target, held_out[1])
    build = small_vit(DIGIT_PX, DIGIT_PATCH, 1, 10, "mean")
    return Problem(source, source_judged, target, target_judged, 10, 1, 1, build, accuracy)


def _digit_pool(folder: Path, name: str, site: int) -> tuple[Cases, Cases]:
    """Images to train on, and images to judge on: USPS has its own split, of MNIST a fixed 2,000 are kept apart."""
    if name == "MNIST":
        with np.load(folder / "mnist_10k.npz") as stored:
            order = np.random.default_rng(0).permutation(len(stored["labels"]))  # the file goes by class
            images, labels = stored["images"][order], stored["labels"][order]
        apart = DIGITS["judged"]
        pair = (images[apart:], labels[apart:]), (images[:apart], labels[:apart])
    else:
        with np.load(folder / "usps.npz") as stored:
            pair = tuple((stored[f"{part}_images"], stored[f"{part}_labels"]) for part in ("train", "test"))
    train, judged = (_digit_cases(images, labels, site) for images, labels in pair)
    return train, judged


def _digit_cases(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], site: int) -> Cases:
    sized = np.stack([cv2.resize(image, (DIGIT_PX, DIGIT_PX)) for image in images]).astype(np.float32) / 255
    return _cases(sized[:, None, None], labels.astype(np.int64), np.full(len(labels), site))


def varied(cases: Cases, rng: np.random.Generator) -> Cases:
    """Several variants of each image (N, 1, 1, H, W) in place of slices (N, S, 1, H, W): one is drawn in each epoch."""
    augment, middle = AugmentConfig(), (DIGIT_PX / 2 - 0.5, DIGIT_PX / 2 - 0.5)
    found = []
    for image in cases.values[:, 0, 0]:
        for _ in range(VARIANTS):
            degrees, zoom, *shift = rng.uniform(-1, 1, 4) * (augment.rotate_deg, augment.zoom, *[augment.shift] * 2)
            move = cv2.getRotationMatrix2D(middle, degrees, 1 + zoom)
            move[:, 2] += np.array(shift) * DIGIT_PX
            found.append(cv2.warpAffine(image, move, (DIGIT_PX, DIGIT_PX)))
    values = np.stack(found).reshape(len(cases), VARIANTS, 1, DIGIT_PX, DIGIT_PX)
    return replace(cases, values=values)


def _cases(values: Values, labels: Labels, sites: Labels) -> Cases:
    return Cases(values, labels, sites, np.array([f"p{number}" for number in range(len(labels))]))


# ---- phantom --------------------------------------------------------------------------------------------------------


def phantom_sites(seed: int) -> Problem:
    """Where is the finding, if anywhere? Two labelled sites of the phantom hospital and a third, others each seed."""
    near = (phantom.SITES[0], phantom.SITES[2])
    counts = (2 * PHANTOM["patients_per_source_site"], PHANTOM["judged"] // 2, PHANTOM["target"], PHANTOM["judged"])
    people = zip(counts, (near, near, (TARGET_SITE,), (TARGET_SITE,)), (0, 0, 2, 2), strict=True)
    rendered = []
    for number, (count, sites, first) in enumerate(people):
        patients, labels = placed(phantom.make_patients(count, 4 * seed + number, sites=sites), 4 * seed + number)
        rendered.append(replace(phantom_cases(patients, sites, first), labels=labels))
    classes = 1 + len(PLACES)
    build = small_vit(PHANTOM_PX, PHANTOM_PATCH, 1, classes, "mean")
    return Problem(*normalised(*rendered), classes, PHANTOM_DRAWS, PHANTOM_SLICES, build, macro_auroc)


def placed(
    patients: tuple[phantom.PhantomPatient, ...], seed: int
) -> tuple[tuple[phantom.PhantomPatient, ...], Labels]:
    """As many patients without a finding as with one in each of `PLACES`, and their class index."""
    rng = np.random.default_rng([seed, 5])
    labels = rng.permutation(len(patients)) % (1 + len(PLACES))
    anywhere = rng.integers(len(PLACES), size=len(patients))  # where those who have none have haze
    found = []
    for patient, label, other in zip(patients, labels, anywhere, strict=True):
        jitter = np.subtract(patient.finding_mm, phantom.FINDING_MM)
        x, y, z = np.add(list(PLACES.values())[label - 1 if label else other], jitter)
        found.append(replace(patient, finding=bool(label), finding_mm=(float(x), float(y), float(z))))
    return tuple(found), labels


def phantom_cases(
    patients: tuple[phantom.PhantomPatient, ...], sites: tuple[phantom.SitePhysics, ...], first: int
) -> Cases:
    """Slices (N, S, 1, H, W) through the lung's window; `first` is the number of the first site."""
    volumes = [phantom.render(patient, matrix=PHANTOM_PX, slices=PHANTOM_SLICES)[0] for patient in patients]
    values = apply_windows(np.stack(volumes), [PHANTOM_WINDOW]).astype(np.float32)  # (1, N, S, H, W)
    labels = np.array([patient.finding for patient in patients], np.int64)
    return _cases(np.moveaxis(values, 0, 2), labels, np.array([first + sites.index(p.site) for p in patients]))


# ---- real CT --------------------------------------------------------------------------------------------------------


def two_makers(data: Path, weights: Path) -> Problem:
    """Contrast agent on single slices: Siemens with labels, all of GE without, GE judged once (transductive)."""
    source, target = (ct_cases(data, weights, maker) for maker in ("SIEMENS", "GE MEDICAL SYSTEMS"))
    return Problem(
        source, source.take(np.arange(0)), target, target, 2, 1, 1, partial(_ct_classifier, weights), auroc_of_last
    )


def _ct_classifier(weights: Path) -> CtClassifier:
    """Takes the tokens that `ct_cases` keeps instead of slices."""
    classifier, _ = build_classifier(_ct_model(weights), size=CT_PX, channels=3, classes=2)
    vit = classifier.backbone.model
    vit.forward_features = MethodType(_upper, vit)  # which deepcopy binds anew
    return classifier


def _ct_model(weights: Path) -> ModelConfig:
    return ModelConfig(name="vit_small_patch14_dinov2.lvd142m", weights=str(weights))


@lru_cache
def ct_cases(data: Path, weights: Path, maker: str) -> Cases:
    """One slice each: tokens after the blocks that are never trained, (N, 1, T, D)."""
    backbone = build_classifier(_ct_model(weights), size=CT_PX, channels=3, classes=2)[0].backbone.eval()
    prep = Preprocessing(size=CT_PX)
    look = prediction_transform(prep, *normalisation(backbone, 3))
    tokens = []
    for row in _ct_rows(data, maker):
        hu = prepare_slices(medvit.io.read(data / "siim_ct_100" / row["path"]), prep)
        tokens.append(_lower(backbone.model, torch.as_tensor(look(hu.astype(np.float32))).as_subclass(Tensor)))
    labels, patients = ct_labels(data, maker)
    return Cases(np.stack(tokens), labels, np.full(len(labels), int(maker != "SIEMENS")), patients)


def ct_labels(data: Path, maker: str) -> tuple[Labels, npt.NDArray[np.str_]]:
    """Contrast agent (N,) and patient (N,) of a maker's slices, in the order of `ct_cases`."""
    rows = _ct_rows(data, maker)
    return np.array([int(row["contrast"]) for row in rows]), np.array([row["patient_id"] for row in rows])


def _ct_rows(data: Path, maker: str) -> list[dict[str, str]]:
    with (data / "siim_ct_100" / "manifest.csv").open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["manufacturer"] == maker]


def _upper(vit: Any, tokens: Tensor) -> Tensor:
    normed: Tensor = vit.norm(vit.blocks[CT_CUT:](tokens))
    return normed


def _lower(vit: Any, slices: Tensor) -> Values:
    with torch.inference_mode():
        *_, tokens = vit.forward_intermediates(
            slices, indices=[CT_CUT - 1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    patches, prefix = tokens
    found: Values = torch.cat([prefix, patches], dim=1).numpy()
    return found
