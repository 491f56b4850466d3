"""Views of CT slices for learning without labels: the same anatomy as another scanner and another table would show it.

Everything is varied in HU, before windowing, and for each view on its own: position, crop, kernel, noise, window. A
neighbouring slice of the series is one more way to see the same again. Nothing is flipped unless told that the anatomy
allows it: heart and liver have a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from medvit.config import AugmentConfig, ViewsConfig
from medvit.data.dataset import CaseDataset, draw
from medvit.data.intensity import apply_clahe, apply_windows
from medvit.data.pipelines import choose_slices, resize_slices
from medvit.data.views import AS_IT_IS, View, look, rewindowed
from medvit.records import Case, Preprocessing

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SliceView:
    """How a view of a slice is made.

    Attributes:
        preprocessing: windows and CLAHE.
        augment: how much is varied; None: only the crop is.
        mean: per channel; `std` too.
        area: smallest and largest, as a share of the slice.
        size: rows and columns of the view, px.
    """

    preprocessing: Preprocessing
    augment: AugmentConfig | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    area: tuple[float, float]
    size: int

    def __call__(self, plane: Floats, rng: np.random.RandomState) -> Floats:
        """HU (H, H) -> (C, size, size), normalised."""
        view = AS_IT_IS if self.augment is None else _drawn(self.augment, rng)
        hu = self._cropped(look(plane[None], view), rng)
        if self.augment is not None:
            hu = _scanned_again(hu, self.augment, rng)
        values = apply_windows(hu[0], rewindowed(self.preprocessing.windows, view))
        if (clahe := self.preprocessing.clahe) is not None:
            values = apply_clahe(values, clahe.clip_limit, clahe.tiles)
        mean, std = (np.array(one, np.float32)[:, None, None] for one in (self.mean, self.std))
        return np.asarray((values - mean) / std, np.float32)

    def _cropped(self, hu: Floats, rng: np.random.RandomState) -> Floats:
        """A square somewhere in (1, H, H), at the size of the view."""
        whole = hu.shape[-1]
        side = max(1, round(whole * math.sqrt(rng.uniform(*self.area))))
        top, left = rng.randint(0, whole - side + 1, 2)
        return resize_slices(hu[:, top : top + side, left : left + side], self.size)


def _drawn(augment: AugmentConfig, rng: np.random.RandomState) -> View:
    zoom, right, down, degrees, level, stretch = rng.uniform(-1, 1, 6) * (
        augment.zoom,
        augment.shift,
        augment.shift,
        augment.rotate_deg,
        augment.window_jitter,
        augment.window_jitter,
    )
    flip = bool(rng.random_sample() < 0.5) and augment.flip
    return View(1 + zoom, right, down, degrees, level, 1 + stretch, flip)


def _scanned_again(hu: Floats, augment: AugmentConfig, rng: np.random.RandomState) -> Floats:
    """With a softer kernel and with more noise, each in half of the cases."""
    soft, noisy = rng.random_sample(2) < 0.5
    if soft and augment.blur_px > 0:
        sigma = max(rng.uniform(0, augment.blur_px), 1e-3)  # OpenCV takes 0 for a sigma that it is to find itself
        hu = cv2.GaussianBlur(hu[0], (0, 0), sigma)[None]
    if noisy and augment.noise_hu > 0:
        hu = hu + rng.uniform(0, augment.noise_hu) * rng.standard_normal(hu.shape).astype(np.float32)
    return np.asarray(hu, np.float32)


class ViewDataset(CaseDataset):
    """Several views of each of some slices of cases, drawn anew each epoch; labels play no part.

    Args:
        cases: in a fixed order.
        load: case -> (Z, size, size) HU.
        preprocessing: slices of a case, windows and CLAHE.
        augment: how much each view is varied.
        views: how many, of what area, and how far apart in the series.
        mean: per channel; `std` too.
        seed: of all draws.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        load: Callable[[Case], npt.NDArray[Any]],
        preprocessing: Preprocessing,
        augment: AugmentConfig | None,
        views: ViewsConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        seed: int,
    ) -> None:
        view = partial(SliceView, preprocessing, augment, mean, std)
        nobody = np.zeros(len(cases), np.int64)
        super().__init__(
            cases, load, nobody, slices=preprocessing.train_slices, transform=partial(view, views.crop), seed=seed
        )
        self.views, self.local = views, view(views.local_crop, views.local_size)
        # whoever may be the same person is: never taken for another one
        _, self.patients = np.unique([case.group for case in cases], return_inverse=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input` (S, V, C, H, W), `local` (S, L, C, h, w) if there are small crops, and numbers of the case."""
        volume = self.load(self.cases[index])
        chosen = choose_slices(len(volume), self.slices, draw(self.seed, self.epoch, index))
        assert self.transform is not None
        whole = self.transform(self.size or volume.shape[-1])
        sample = {"input": self._views(volume, chosen, [whole] * self.views.count, index, first=0)}
        if self.views.local:
            small = [self.local] * self.views.local
            sample["local"] = self._views(volume, chosen, small, index, first=self.views.count)
        numbers = {"label": 0, "domain": 0, "patient": int(self.patients[index]), "index": index}
        return {**sample, **numbers}

    def _views(
        self, volume: npt.NDArray[Any], chosen: npt.NDArray[np.intp], views: Sequence[SliceView], index: int, first: int
    ) -> torch.Tensor:
        """(S, V, C, H, W): views of slices, the first of all as chosen, others perhaps of their neighbours."""
        columns = []
        for number, view in enumerate(views, first):
            # from 1: a place that ends with 0 gives the numbers of the place without it
            rng = draw(self.seed, self.epoch, index, 1 + number)
            away = self.views.neighbours if number else 0
            places = np.clip(chosen + rng.randint(-away, away + 1, len(chosen)), 0, len(volume) - 1)
            columns.append(np.stack([view(np.array(volume[place], np.float32), rng) for place in places]))
        return torch.from_numpy(np.stack(columns, axis=1))
