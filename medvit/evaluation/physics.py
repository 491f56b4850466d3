"""What scanners and patients do to a picture, as functions on HU: dose, kernel, drift, thickness, metal, motion.

A severity is a physical number, and severity 0 changes nothing. All severities of a case use the same draws, so that a
curve shows the severity and not the luck. What happens in the rays (dose, metal, motion) is projected, spoilt, and
reconstructed as a difference: noise is streaked along long paths, metal is dark between its parts, motion is ghosted.

The size of a pixel is not known any more when a picture has the model's size: pictures are taken to be `FIELD_MM` wide.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medvit.evaluation.projections import project, reconstruct, view_angles
from medvit.records import AIR_HU, Window, resolve_window

Floats = npt.NDArray[np.float32]
Slices = npt.NDArray[np.int16]

HIGHEST_HU = 3071.0
"""What 12-bit CT can hold, from `AIR_HU`."""

WATER_PER_MM = 0.019
"""Linear attenuation of water at 70 keV, the mean energy of a 120 kVp beam, 1/mm (NIST XCOM)."""

FIELD_MM = 400.0
"""Taken for the side of every picture: a body's field of view. A head's is smaller, its noise more even than here."""

BODY_HU = -300.0
"""What is denser belongs to the body (or the table), lungs left out."""

METAL_HU = 8000.0
"""Titanium."""

STARVED = 8.0
"""Line integral at which as much scatter as primary radiation arrives: thicker metal hardly looks thicker."""

METAL_DISTANCE = 0.12
"""Of each insert from the middle of the body, share of the picture's side."""

FINER = 8
"""Inserts are drawn on a grid finer by this factor, so that their size can be any."""


@dataclass(frozen=True)
class Corruption:
    """One way to spoil slices.

    Attributes:
        apply: HU (S, H, H), severity, random numbers -> HU (S, H, H).
        severities: weakest first.
        unit: of the severities.
        imitates: what happens in a hospital.
        of_window: severities are shares of the narrowest window's width, and `apply` takes HU.
        across_slices: it needs the neighbours of a slice.
    """

    apply: Callable[[Floats, float, np.random.Generator], Floats]
    severities: tuple[float, ...]
    unit: str
    imitates: str
    of_window: bool = False
    across_slices: bool = False


def lower_dose(hu: Floats, sd_hu: float, rng: np.random.Generator) -> Floats:
    """Quantum noise of fewer photons.

    A ray through a line integral p arrives with exp(-p) of its photons, and the logarithm of a Poisson number of N has
    the variance 1 / N: noise grows as exp(p / 2). Its scale, and with it the dose, is such that the standard deviation
    inside the body of all slices is `sd_hu`.
    """
    body = hu > BODY_HU
    if not body.any():
        return hu
    side = hu.shape[-1]
    angles = view_angles(side)
    spread = np.exp(project(_per_px(hu + 1000), angles) / 2)
    noise = reconstruct(spread * rng.standard_normal(spread.shape, np.float32), angles, side)
    return hu + noise * np.float32(sd_hu / math.sqrt(np.mean(noise[body] ** 2)))


def softer_kernel(hu: Floats, sigma_px: float, _rng: np.random.Generator) -> Floats:
    """A Gaussian blur in plane, px of the model's picture."""
    return np.asarray(ndimage.gaussian_filter(hu, (0, sigma_px, sigma_px), mode="nearest"))


def sharper_kernel(hu: Floats, amount: float, rng: np.random.Generator) -> Floats:
    """Unsharp masking: `amount` times what a blur of 1 px takes away is added."""
    return hu + np.float32(amount) * (hu - softer_kernel(hu, 1.0, rng))


def drift(hu: Floats, offset_hu: float, _rng: np.random.Generator) -> Floats:
    """Calibration drift: the whole offset above -900 HU, none in air (-1000 HU and below), which stays calibrated."""
    share = np.asarray(np.clip((hu + 1000) / 100, 0, 1), np.float32)
    return hu + np.float32(offset_hu) * share


def thicker_slices(hu: Floats, neighbours: float, _rng: np.random.Generator) -> Floats:
    """Mean over as many neighbouring slices; beyond either end the last slice is repeated."""
    return np.asarray(ndimage.uniform_filter1d(hu, max(1, int(neighbours)), axis=0, mode="nearest"))


def metal(hu: Floats, diameter: float, rng: np.random.Generator) -> Floats:
    """Two titanium rods through all slices, either side of the middle of the body, in a random direction.

    The detector sees primary and scattered radiation: rays through both rods lack more than rays through one can tell,
    which is dark streaks between them and bright ones beside (photon starvation, beam hardening).

    Args:
        hu: (S, H, H).
        diameter: of each rod, % of the picture's side.
        rng: of the direction.
    """
    side = hu.shape[-1]
    angles = view_angles(side)
    rods = _rods(hu, diameter / 100 * side, rng)
    clean = project(_per_px(hu + 1000), angles)
    added = project(_per_px(rods * (METAL_HU - hu)), angles)
    return hu + _hounsfield(reconstruct(_detected(clean + added) - _detected(clean), angles, side))


def motion(hu: Floats, shift: float, rng: np.random.Generator) -> Floats:
    """The patient lies elsewhere in the second half of the scan: `shift` % of the picture's side in any direction."""
    side = hu.shape[-1]
    direction = rng.uniform(0, 2 * math.pi)
    way = shift / 100 * side * np.array([[math.cos(direction)], [math.sin(direction)]])
    move = np.hstack([np.eye(2), way])
    moved = np.stack([cv2.warpAffine(one, move, (side, side), borderMode=cv2.BORDER_REPLICATE) for one in hu])
    late = view_angles(side)[side // 2 :]
    change = project(_per_px(moved - hu), late)
    return hu + np.float32(0.5) * _hounsfield(reconstruct(change, late, side))  # these angles are half of all


def white_noise(hu: Floats, sd_hu: float, rng: np.random.Generator) -> Floats:
    """Gaussian noise, independent from pixel to pixel: no scanner's, but what others report."""
    return hu + np.float32(sd_hu) * rng.standard_normal(hu.shape, np.float32)


CORRUPTIONS: dict[str, Corruption] = {
    "dose": Corruption(lower_dose, (10, 20, 40), "HU noise in the body", "fewer photons: quantum noise, streaked"),
    "softer": Corruption(softer_kernel, (0.5, 1, 2), "px blur", "a smoother reconstruction kernel"),
    "sharper": Corruption(sharper_kernel, (0.5, 1, 2), "times unsharp mask", "a sharper reconstruction kernel"),
    "drift": Corruption(drift, (-50, -25, -10, 10, 25, 50), "HU offset", "a scanner out of calibration"),
    "thicker": Corruption(
        thicker_slices, (3, 5, 7), "slices averaged", "thicker reconstructed slices", across_slices=True
    ),
    "metal": Corruption(metal, (1, 2, 4), "% of side, diameter", "two titanium rods: starved and hardened rays"),
    "motion": Corruption(motion, (1, 2, 4), "% of side, shift", "a patient who moves half-way through the scan"),
    "white": Corruption(
        white_noise, (0.1, 0.2, 0.3), "of the narrowest window", "Gaussian noise, for comparison", of_window=True
    ),
}
"""Name -> how, how much, in what unit, and what it imitates."""


def corrupt(
    name: str, slices: Slices, severity: float, rng: np.random.Generator, windows: Sequence[str | Window]
) -> Slices:
    """Whole HU (S, H, H) spoilt by one of `CORRUPTIONS`, as a scanner would store it.

    Args:
        name: which.
        slices: int16 HU (S, H, H); all of a case where neighbours count.
        severity: in the corruption's unit; 0 changes nothing.
        rng: of `draws`.
        windows: the model's, for severities relative to the narrowest.
    """
    one, hu = CORRUPTIONS[name], slices.astype(np.float32)
    narrowest = min(resolve_window(window)[1] for window in windows)
    return as_stored(one.apply(hu, severity * narrowest if one.of_window else severity, rng), hu)


def as_stored(changed: Floats, original: Floats) -> Slices:
    """Whole HU, within what 12-bit CT holds; what was outside before may stay as far outside."""
    low, high = np.minimum(original, AIR_HU), np.maximum(original, HIGHEST_HU)
    return np.round(np.clip(changed, low, high)).astype(np.int16)


def draws(seed: int, case_id: str) -> np.random.Generator:
    """Random numbers that depend on seed and case and on nothing else."""
    digest = hashlib.sha256(case_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8])])


def _per_px(hu: Floats) -> Floats:
    """HU above vacuum, or a difference of HU -> attenuation along one pixel, in e-folds."""
    return hu * np.float32(WATER_PER_MM / 1000 * FIELD_MM / hu.shape[-1])


def _hounsfield(per_px: Floats) -> Floats:
    """The way back."""
    return per_px / np.float32(WATER_PER_MM / 1000 * FIELD_MM / per_px.shape[-1])


def _detected(integrals: Floats) -> Floats:
    """Line integrals as computed from what arrives, scatter included."""
    return -np.logaddexp(-integrals, np.float32(-STARVED))


def _rods(hu: Floats, diameter_px: float, rng: np.random.Generator) -> Floats:
    """Share (H, H) of each pixel that is metal, 0..1."""
    side = hu.shape[-1]
    direction = rng.uniform(0, math.pi)
    body = (hu > BODY_HU).mean(axis=0)
    middle = ndimage.center_of_mass(body) if body.any() else ((side - 1) / 2, (side - 1) / 2)
    fine = (np.arange(side * FINER) + 0.5) / FINER - 0.5  # px
    shares = np.zeros((side, side), np.float32)
    for sign in (-1, 1):
        row, column = (
            m + sign * METAL_DISTANCE * side * f(direction) for m, f in zip(middle, (math.sin, math.cos), strict=True)
        )
        inside = (fine[:, None] - row) ** 2 + (fine - column) ** 2 < (diameter_px / 2) ** 2
        shares += inside.reshape(side, FINER, side, FINER).mean(axis=(1, 3), dtype=np.float32)
    return np.minimum(shares, 1)
