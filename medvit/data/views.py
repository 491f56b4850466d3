"""Other views of the same slices, for test-time augmentation: a little larger or smaller, shifted, turned, rewindowed.

A prediction that changes with the view was a guess: the mean over views is steadier, their spread says how steady
(Shanmugam 2021 warns that it can also turn right into wrong). The first view is always the slices as they are, and no
view flips unless told that the anatomy allows it: a liver on the left is not a liver seen again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from medvit.config import TtaConfig
from medvit.records import AIR_HU, Window, resolve_window

Slices = npt.NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """One way to look at slices.

    Attributes:
        zoom: above 1 is larger, and what is outside the picture is cropped away; below 1 is smaller, in air.
        right: shift of the picture, share of its side; likewise `down`.
        degrees: rotation, counter-clockwise on the screen.
        level: shift of every window's level, share of its width.
        stretch: factor of every window's width.
        flip: left and right exchanged.
    """

    zoom: float = 1.0
    right: float = 0.0
    down: float = 0.0
    degrees: float = 0.0
    level: float = 0.0
    stretch: float = 1.0
    flip: bool = False


AS_IT_IS = View()


def draw_views(config: TtaConfig | None, size: int, patch: int) -> tuple[View, ...]:
    """The views of every prediction, the same for all cases: the slices as they are, then `views - 1` others.

    Zooms are such that the enlarged picture is a whole number of patches wide. A crop may lie anywhere in an enlarged
    picture, and a smaller one is moved within its frame by no more than `shift`.

    Args:
        config: ranges; None: no other view.
        size: rows and columns of the model's input, px.
        patch: of the backbone, px.
    """
    if config is None:
        return (AS_IT_IS,)
    rng = np.random.default_rng(config.seed)
    return (AS_IT_IS, *(_draw(config, size, patch, rng) for _ in range(config.views - 1)))


def _draw(config: TtaConfig, size: int, patch: int, rng: np.random.Generator) -> View:
    side = patch * round(size * rng.uniform(*config.scale) / patch)
    room = max(0, side - size) / 2 / size if config.crop else 0.0  # how far a crop can be from the middle
    right, down = rng.uniform(-1, 1, 2) * (room + config.shift)
    degrees, level, stretch = rng.uniform(-1, 1, 3) * (config.rotate_deg, config.window_jitter, config.window_jitter)
    flip = bool(rng.random() < 0.5) and config.flip
    return View(side / size, float(right), float(down), float(degrees), float(level), 1 + float(stretch), flip)


def look(slices: Slices, view: View) -> Slices:
    """HU (S, H, H) as the view shows them; the very same array where it moves nothing."""
    moved = slices
    if (view.zoom, view.right, view.down, view.degrees) != (1.0, 0.0, 0.0, 0.0):
        side = slices.shape[-1]
        middle = ((side - 1) / 2, (side - 1) / 2)
        matrix = cv2.getRotationMatrix2D(middle, view.degrees, view.zoom)
        matrix[:, 2] += np.array([view.right, view.down]) * side
        moved = np.stack(
            [
                cv2.warpAffine(plane, matrix, (side, side), flags=cv2.INTER_LINEAR, borderValue=AIR_HU)
                for plane in slices
            ]
        )
    return np.ascontiguousarray(moved[:, :, ::-1]) if view.flip else moved


def rewindowed(windows: Sequence[str | Window], view: View) -> tuple[str | Window, ...]:
    """The windows of a view; those given where it moves none."""
    if (view.level, view.stretch) == (0.0, 1.0):
        return tuple(windows)
    resolved = (resolve_window(window) for window in windows)
    return tuple((level + view.level * width, width * view.stretch) for level, width in resolved)
