"""Hounsfield windows and CLAHE: array functions, and the MONAI transforms around them.

A window maps HU linearly to 0..1 in floating point: nothing is quantised to 8 bits on the way, an odd width is not
halved to an integer, and display tags such as MONOCHROME1 play no part. CLAHE follows the window, on 16-bit data.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_data_type, convert_to_dst_type
from torch import Tensor

from medvit.records import Window, resolve_window

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any] | Tensor | MetaTensor


def apply_window(hu: npt.NDArray[Any], level: float, width: float) -> Floats:
    """HU -> 0..1, linear within level ± width/2 and clipped outside (PS3.3 C.11.2.1.3.2, LINEAR_EXACT).

    Args:
        hu: any shape, HU.
        level: centre, HU.
        width: HU, above 0.

    Returns:
        float32, the same shape.

    Raises:
        ValueError: the width is not above 0.
    """
    level, width = resolve_window((level, width))
    unit = (np.asarray(hu, np.float32) - np.float32(level)) / np.float32(width) + np.float32(0.5)
    return np.asarray(np.clip(unit, 0, 1), np.float32)


def apply_windows(hu: npt.NDArray[Any], windows: Sequence[str | Window]) -> Floats:
    """One channel per window: HU (...) -> (C, ...) in 0..1."""
    return np.stack([apply_window(hu, *resolve_window(window)) for window in windows])


def apply_clahe(image: npt.NDArray[Any], clip_limit: float = 2.0, tiles: tuple[int, int] = (8, 8)) -> Floats:
    """Contrast-limited adaptive histogram equalisation of each slice by OpenCV, on 16-bit data.

    OpenCV's histogram of 16-bit data has 65,536 bins, and it clips at no less than one pixel per bin: with 8 × 8 tiles
    on slices up to 512 × 512 every limit below 32 therefore does the same.

    Args:
        image: (..., H, W), values 0..1: window first.
        clip_limit: in multiples of the mean bin; higher gives more local contrast and more noise.
        tiles: along rows and columns.

    Returns:
        float32, the same shape, 0..1.

    Raises:
        ValueError: values outside 0..1, NaN, or fewer than two dimensions.
    """
    values = np.asarray(image, np.float32)
    if values.ndim < 2:
        raise ValueError(f"CLAHE needs slices (..., H, W), got shape {values.shape}")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"CLAHE needs values in 0..1, got {values.min():g}..{values.max():g}: apply a window first")
    # OpenCV counts tiles as (across, down)
    equaliser = cv2.createCLAHE(clipLimit=clip_limit, tileGridSize=(tiles[1], tiles[0]))
    levels = np.round(values * 65535).astype(np.uint16).reshape(-1, *values.shape[-2:])
    equalised = np.stack([equaliser.apply(np.ascontiguousarray(plane)) for plane in levels])
    return (equalised.astype(np.float32) / np.float32(65535)).reshape(values.shape)


def _like(result: Floats, source: Array) -> Array:
    """The result as the kind of array the source is: on its device, with its affine and metadata."""
    return convert_to_dst_type(result, source, dtype=np.float32)[0]


def _numpy(source: Array) -> npt.NDArray[Any]:
    return cast("npt.NDArray[Any]", convert_data_type(source, np.ndarray)[0])  # moves to the CPU where needed


class HounsfieldWindow(Transform):
    """HU (1, ...) -> one channel per window (C, ...), 0..1. Keeps array type, device and affine.

    Args:
        windows: preset names or (level, width) in HU.
    """

    def __init__(self, windows: Sequence[str | Window] = ("soft_tissue",)) -> None:
        self.windows = tuple(resolve_window(window) for window in windows)

    def __call__(self, hu: Array) -> Array:
        """Apply to one channel-first image.

        Raises:
            ValueError: the first dimension is not one channel of HU.
        """
        if hu.shape[0] != 1:
            raise ValueError(f"expected one channel of HU (1, ...), got shape {tuple(hu.shape)}: a batch or windowed?")
        return _like(apply_windows(_numpy(hu)[0], self.windows), hu)


class Clahe(Transform):
    """CLAHE of each slice and channel of one channel-first image. Keeps array type, device and affine.

    Args:
        clip_limit: see `apply_clahe`.
        tiles: along the two in-plane axes.
        slice_axis: which spatial axis counts slices when there are three; MONAI's readers put it last.
    """

    def __init__(self, clip_limit: float = 2.0, tiles: tuple[int, int] = (8, 8), slice_axis: int = -1) -> None:
        self.clip_limit, self.tiles, self.slice_axis = clip_limit, tiles, slice_axis

    def __call__(self, image: Array) -> Array:
        """Apply to (C, H, W) or (C, and three spatial axes), values 0..1.

        Raises:
            ValueError: another number of dimensions (a batch must be taken apart first), or values outside 0..1.
        """
        values = _numpy(image)
        if values.ndim not in (3, 4):
            raise ValueError(
                f"expected (C, H, W) or (C, three axes), got {values.ndim} dimensions: one image at a time"
            )
        if values.ndim == 3:
            return _like(apply_clahe(values, self.clip_limit, self.tiles), image)
        axis = range(1, 4)[self.slice_axis]
        by_slice = np.moveaxis(values, axis, 1)
        return _like(np.moveaxis(apply_clahe(by_slice, self.clip_limit, self.tiles), 1, axis), image)


class HounsfieldWindowd(MapTransform):
    """`HounsfieldWindow` on the given keys of a dictionary."""

    def __init__(
        self, keys: KeysCollection, windows: Sequence[str | Window] = ("soft_tissue",), allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = HounsfieldWindow(windows)

    def __call__(self, data: Mapping[Hashable, Array]) -> dict[Hashable, Array]:
        """Apply to each key."""
        return _map_keys(self, data)


class Clahed(MapTransform):
    """`Clahe` on the given keys of a dictionary."""

    def __init__(
        self,
        keys: KeysCollection,
        clip_limit: float = 2.0,
        tiles: tuple[int, int] = (8, 8),
        slice_axis: int = -1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = Clahe(clip_limit, tiles, slice_axis)

    def __call__(self, data: Mapping[Hashable, Array]) -> dict[Hashable, Array]:
        """Apply to each key."""
        return _map_keys(self, data)


def _map_keys(owner: HounsfieldWindowd | Clahed, data: Mapping[Hashable, Array]) -> dict[Hashable, Array]:
    result = dict(data)
    for key in owner.key_iterator(result):
        result[key] = owner.transform(result[key])
    return result
