"""A slice as a radiologist would see it, and beside it the same slice with a relevance map over it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from medvit.data.intensity import apply_window
from medvit.records import Window, resolve_window

SIDE = 320
"""Of a panel, px: patches of 14 px stay recognisable, and a dozen panels stay below a megabyte."""

GAP = 6
COLOURS = np.float32(255) * mpl.colormaps["inferno"](np.arange(256))[:, :3].astype(np.float32)
"""(256, 3) from the least to the most relevant, 0..255: as a table, because a batch draws thousands of pictures."""

STRONGEST = 0.65
"""Opacity of the most relevant patch: what is below it must stay visible."""


def draw_overlay(
    hu: npt.NDArray[np.integer], relevance: npt.NDArray[np.floating], windows: Sequence[str | Window]
) -> bytes:
    """PNG of `overlay_panels`."""
    _, encoded = cv2.imencode(".png", overlay_panels(hu, relevance, windows)[:, :, ::-1])
    return encoded.tobytes()


def overlay_panels(
    hu: npt.NDArray[np.integer], relevance: npt.NDArray[np.floating], windows: Sequence[str | Window]
) -> npt.NDArray[np.uint8]:
    """Two panels side by side, RGB (SIDE, 2 * SIDE + GAP, 3).

    The narrowest of the model's windows is shown: it tells tissues apart. Colour goes from the least to the most
    relevant patch of this slice; nothing is coloured where all patches are alike.

    Args:
        hu: (H, H).
        relevance: (rows, columns) of the grid of patches, 0 or more.
        windows: of the model.
    """
    level, width = min((resolve_window(window) for window in windows), key=lambda window: window[1])
    plain = cv2.resize(apply_window(hu, level, width), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    grey = np.repeat(np.float32(255) * plain[:, :, None], 3, axis=2)
    spread = np.ptp(relevance)
    share = (relevance - relevance.min()) / spread if spread > 0 else np.zeros_like(relevance)
    heat = cv2.resize(share.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    colour = np.take(COLOURS, np.round(255 * heat).astype(np.uint8), axis=0)
    seen = grey + np.float32(STRONGEST) * heat[:, :, None] * (colour - grey)
    both = np.concatenate([grey, np.full((SIDE, GAP, 3), 255, np.float32), seen], axis=1)
    return np.round(both).astype(np.uint8)
