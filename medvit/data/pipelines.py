"""What the model sees: the steps from a scan to a normalised stack of slices, for training and for prediction.

Both are built from one `Preprocessing`, which travels in the bundle. The deterministic part up to the resized int16
slices is `prepare_slices` (cached); the rest is a MONAI Compose. Augmentation happens in HU, before windowing, as the
scanner would vary: geometry, kernel (blur), noise, window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import (
    Compose,
    EnsureType,
    Lambda,
    NormalizeIntensity,
    RandAffine,
    RandFlip,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandomizableTransform,
)

from medvit.config import AugmentConfig
from medvit.data.intensity import Clahe, HounsfieldWindow, apply_windows
from medvit.io import reorient_lps
from medvit.records import AIR_HU, Preprocessing, Scan, Window, resolve_window

Slices = npt.NDArray[np.int16]


def prepare_slices(scan: Scan, preprocessing: Preprocessing, chosen: npt.NDArray[np.intp] | None = None) -> Slices:
    """Orient, resize in plane to square pixels, and pad with air to a square: shapes are kept.

    Args:
        scan: (Z, Y, X).
        preprocessing: orientation and size.
        chosen: (S,) which slices of the oriented scan; None: all.

    Returns:
        int16 HU, (S, size, size).
    """
    oriented = reorient_lps(scan) if preprocessing.orientation == "LPS" else scan
    size, (_, rows, columns) = preprocessing.size, oriented.hu.shape
    x_mm, y_mm, _ = oriented.spacing_mm
    scale = size / max(rows * y_mm, columns * x_mm)  # px of the result per mm
    down, across = max(1, round(rows * y_mm * scale)), max(1, round(columns * x_mm * scale))
    # area averaging below, bilinear above: no aliasing of noise into texture
    method = cv2.INTER_AREA if down < rows or across < columns else cv2.INTER_LINEAR
    planes = oriented.hu if chosen is None else oriented.hu[chosen]
    resized = np.stack([cv2.resize(plane, (across, down), interpolation=method) for plane in planes])
    top, left = (size - down) // 2, (size - across) // 2
    margins = ((0, 0), (top, size - down - top), (left, size - across - left))
    square = np.pad(resized, margins, constant_values=AIR_HU)
    return np.clip(np.round(square), -32768, 32767).astype(np.int16)


def resize_slices(hu: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Square slices (S, H, H) at another size (S, size, size): averaged over areas below, bilinear above."""
    if hu.shape[-1] == size:
        return hu
    method = cv2.INTER_AREA if size < hu.shape[-1] else cv2.INTER_LINEAR
    return np.stack([cv2.resize(plane, (size, size), interpolation=method) for plane in hu])


def choose_slices(count: int, wanted: int, rng: np.random.RandomState | None = None) -> npt.NDArray[np.intp]:
    """Which slices to look at: one from each of `wanted` equal stretches of the axis; all of them if there are no more.

    Args:
        count: slices there are.
        wanted: slices to take at most.
        rng: drawn within each stretch (training); None takes the middle of each (prediction).
    """
    if count <= wanted:
        return np.arange(count)
    edges = np.linspace(0, count, wanted + 1).astype(np.intp)  # whole slices: no two stretches share one
    within = np.full(wanted, 0.5) if rng is None else rng.random_sample(wanted)
    return edges[:-1] + (within * np.diff(edges)).astype(np.intp)


def window_statistics(
    volumes: Iterable[Slices], windows: Sequence[str | Window]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per window of slices (Z, H, W) in HU: for weights that bring none. Training cases only."""
    count, total, squares = 0, np.zeros(len(windows)), np.zeros(len(windows))
    for hu in volumes:
        values = apply_windows(np.asarray(hu), windows).astype(np.float64)
        count += hu.size
        total += values.sum(axis=(1, 2, 3))
        squares += (values**2).sum(axis=(1, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return tuple(mean.tolist()), tuple(std.tolist())


def training_transform(
    preprocessing: Preprocessing,
    augment: AugmentConfig | None,
    mean: Sequence[float],
    std: Sequence[float],
    size: int | None = None,
) -> Compose:
    """HU (S, size, size) -> (S, C, size, size) normalised, randomly varied. `set_random_state(seed)` before each call.

    `size` is that of the stage of training; None is the preprocessing's.
    """
    if augment is None:
        return prediction_transform(preprocessing, mean, std)
    window = JitteredWindow(preprocessing.windows, augment.window_jitter)
    return Compose(
        [
            EnsureType(dtype=torch.float32),
            *_augmentations(size or preprocessing.size, augment),
            *_finish(window, preprocessing, mean, std),
        ]
    )


def prediction_transform(preprocessing: Preprocessing, mean: Sequence[float], std: Sequence[float]) -> Compose:
    """HU (S, H, W) -> (S, C, H, W) normalised, deterministic."""
    window = HounsfieldWindow(preprocessing.windows)
    return Compose([EnsureType(dtype=torch.float32), *_finish(window, preprocessing, mean, std)])


def _augmentations(size: int, augment: AugmentConfig) -> list[Callable[..., Any]]:
    """On (S, H, W): MONAI takes slices for channels, so that one draw moves and blurs a whole scan alike."""
    pixels = augment.shift * size
    steps: list[Callable[..., Any]] = [
        RandAffine(
            prob=1.0,
            rotate_range=np.radians(augment.rotate_deg),
            translate_range=(pixels, pixels),
            scale_range=(augment.zoom, augment.zoom),
            mode="bilinear",
            padding_mode="border",  # zeros would be water around the patient
        )
    ]
    if augment.flip:
        steps.append(RandFlip(prob=0.5, spatial_axis=1))
    if augment.blur_px > 0:
        sigma = (0.0, augment.blur_px)
        steps.append(RandGaussianSmooth(sigma_x=sigma, sigma_y=sigma, prob=0.5))
    if augment.noise_hu > 0:
        steps.append(RandGaussianNoise(prob=0.5, std=augment.noise_hu, sample_std=True))
    return steps


def _finish(
    window: Callable[..., Any], preprocessing: Preprocessing, mean: Sequence[float], std: Sequence[float]
) -> list[Callable[..., Any]]:
    steps: list[Callable[..., Any]] = [Lambda(_add_channel), window]
    if (clahe := preprocessing.clahe) is not None:
        steps.append(Clahe(clahe.clip_limit, clahe.tiles, slice_axis=0))
    steps.append(NormalizeIntensity(subtrahend=list(mean), divisor=list(std), channel_wise=True))
    return [*steps, Lambda(_slices_first)]


def _add_channel(slices: torch.Tensor) -> torch.Tensor:
    return slices[None]  # (1, S, H, W)


def _slices_first(image: torch.Tensor) -> torch.Tensor:
    return image.transpose(0, 1).contiguous()  # (C, S, H, W) -> (S, C, H, W)


class JitteredWindow(RandomizableTransform):
    """Hounsfield windows whose level moves and whose width stretches at random: sites and readers differ.

    Args:
        windows: preset names or (level, width) in HU.
        jitter: largest move of the level, and largest stretch, as a share of the width.
    """

    def __init__(self, windows: Sequence[str | Window], jitter: float) -> None:
        super().__init__(prob=1.0)
        self.windows, self.jitter = tuple(resolve_window(window) for window in windows), jitter

    def __call__(self, hu: torch.Tensor) -> Any:
        """HU (1, ...) -> (C, ...), 0..1."""
        moves = self.R.uniform(-self.jitter, self.jitter, (len(self.windows), 2))
        varied = [
            (level + move * width, width * (1 + stretch))
            for (level, width), (move, stretch) in zip(self.windows, moves, strict=True)
        ]
        return HounsfieldWindow(varied)(hu)
