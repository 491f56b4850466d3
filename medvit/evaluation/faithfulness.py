"""Is a relevance map about the model? Delete the patches it names first, and see whether the model minds.

Deletion and insertion (Petsiuk 2018, arXiv 1806.07421): patches are replaced one share after another, those that the
map finds most relevant first, and the class's probability is followed; or they come back, most relevant first. A good
map has a small area below the first curve and a large one below the second. Two rivals know nothing of the model:
patches in random order, and from the middle outwards, which is hard to beat where organs are centred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from medvit.data.pipelines import Slices
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.explained import Faithfulness
from medvit.evaluation.metrics import Floats, Interval, divide
from medvit.evaluation.physics import draws
from medvit.inference import Encoder, softmax

STEPS = 5
"""Shares in which patches go or come."""

BLUR = 1 / 8
"""Standard deviation of the blur that replaces a patch, share of the picture's side."""

Fill = Literal["blur", "mean"]


def _blurred(slices: Slices) -> Slices:
    sigma = slices.shape[-1] * BLUR
    smooth = [cv2.GaussianBlur(plane.astype(np.float32), (0, 0), sigma) for plane in slices]
    return np.round(np.stack(smooth)).astype(np.int16)


def _mean(slices: Slices) -> Slices:
    return np.broadcast_to(np.round(slices.mean(axis=(1, 2), keepdims=True)).astype(np.int16), slices.shape)


FILLS: dict[Fill, Callable[[Slices], Slices]] = {"blur": _blurred, "mean": _mean}
"""What takes the place of a patch: HU (S, H, H) -> the same shape. Neither is a picture that a model was trained on."""


class Areas(NamedTuple):
    """Below the curves of one case: `deletion` is better small, `insertion` large; both 0..1."""

    deletion: float
    insertion: float

    @property
    def difference(self) -> float:
        """Insertion less deletion: larger is better, 0 is a map that says nothing."""
        return self.insertion - self.deletion


def deletion_insertion(
    encoder: Encoder,
    slices: Slices,
    features: npt.NDArray[np.float32],
    target: int,
    at: Sequence[int],
    maps: Mapping[str, npt.NDArray[np.floating]],
    fill: Fill = "blur",
) -> dict[str, Areas]:
    """Areas below the curves of each map; patches of all explained slices are ranked together.

    Args:
        encoder: classifier and what it is shown.
        slices: int16 HU (S, H, H), those that the prediction looked at.
        features: (S, D) of them, as `encoder.encode` gives.
        target: class index whose probability (temperature 1) is followed.
        at: which slices are explained; the others stay as they are.
        maps: name -> (len(at), rows, columns).
        fill: what takes the place of a patch.
    """
    explained, filled = slices[list(at)], FILLS[fill](slices[list(at)])
    rows, columns = next(iter(maps.values())).shape[1:]
    shares = np.linspace(0, 1, STEPS + 1)[1:-1]
    stacks = [explained, filled]  # both ends are those of every map
    for one in maps.values():
        for share in shares:
            gone = _enlarged(_first(one, share), slices.shape[-1] // rows, slices.shape[-1] // columns)
            stacks += [np.where(gone, filled, explained), np.where(gone, explained, filled)]
    whole, nothing, *between = _probabilities(encoder, features, target, at, np.stack(stacks))
    found = {}
    for number, name in enumerate(maps):
        own = between[number * 2 * len(shares) : (number + 1) * 2 * len(shares)]
        deletion = np.trapezoid([whole, *own[0::2], nothing], dx=1 / STEPS)
        insertion = np.trapezoid([nothing, *own[1::2], whole], dx=1 / STEPS)
        found[name] = Areas(float(deletion), float(insertion))
    return found


def _first(relevance: npt.NDArray[np.floating], share: float) -> npt.NDArray[np.bool_]:
    """The most relevant share of patches, of all slices together; ties in order."""
    order = np.argsort(-relevance.ravel(), kind="stable")
    gone = np.zeros(relevance.size, dtype=bool)
    gone[order[: round(share * relevance.size)]] = True
    return gone.reshape(relevance.shape)


def _enlarged(patches: npt.NDArray[np.bool_], down: int, across: int) -> npt.NDArray[np.bool_]:
    return patches.repeat(down, axis=1).repeat(across, axis=2)


def _probabilities(
    encoder: Encoder,
    known: npt.NDArray[np.float32],
    target: int,
    at: Sequence[int],
    stacks: npt.NDArray[np.int16],
) -> list[float]:
    """Of the study with other pictures (n, A, H, H) for the explained slices; (n,)."""
    changed = encoder.encode(stacks.reshape(-1, *stacks.shape[2:])).reshape(*stacks.shape[:2], -1)
    studies = []
    for one in changed:
        features = known.copy()
        features[list(at)] = one
        studies.append(features)
    return [float(softmax(output.logits)[target]) for output in encoder.studies(studies)]


def centre_map(shape: tuple[int, int, int]) -> Floats:
    """The rival that points at the middle of every slice (A, rows, columns)."""
    _, rows, columns = shape
    down, across = np.arange(rows) - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2
    return np.broadcast_to(-np.hypot(down[:, None] / rows, across / columns), shape).copy()


def random_map(shape: tuple[int, int, int], seed: int, case_id: str) -> Floats:
    """The rival that points anywhere, elsewhere in each case."""
    return draws(seed, case_id).random(shape)


def summarise(areas: Mapping[str, Sequence[Areas]], bootstrap: PatientBootstrap) -> dict[str, Faithfulness]:
    """Over cases, with intervals by resampling patients.

    Args:
        areas: map -> areas of each case; the rivals "centre" and "random" (another order for each case) among them.
        bootstrap: of the cases.
    """
    by_chance, by_centre = (np.array([one.difference for one in areas[name]]) for name in ("random", "centre"))

    def over(rival: Floats, own: Floats) -> Interval:
        gain = own - rival
        return bootstrap.interval(lambda weights: divide(weights @ gain, weights.sum(axis=1)))

    found = {}
    for name in (one for one in areas if one != "random"):
        own = np.array([one.difference for one in areas[name]])
        found[name] = Faithfulness(
            deletion=float(np.mean([one.deletion for one in areas[name]])),
            insertion=float(np.mean([one.insertion for one in areas[name]])),
            over_random=over(by_chance, own),
            over_centre=over(by_centre, own),
        )
    return found
