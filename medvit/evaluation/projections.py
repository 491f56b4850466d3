"""Parallel-beam projections of CT slices, and filtered back-projection: what a scanner does, in small.

Noise, metal and motion happen in the rays, and only from there do they get the streaks and the texture that a reader
knows. Discretisation blurs what is projected and reconstructed, so a picture is never replaced by its reconstruction:
the difference that a fault makes to its rays is reconstructed and added (`medvit.evaluation.physics`).

Filtered back-projection as in Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), chapter 3.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def view_angles(side: int) -> npt.NDArray[np.float64]:
    """As many directions over half a turn as the picture has columns, radians: finer pictures need more of them."""
    return np.linspace(0, math.pi, side, endpoint=False)


def project(images: Floats, angles: npt.NDArray[np.float64]) -> Floats:
    """Sums along parallel rays one pixel apart; outside the picture is 0.

    Args:
        images: (S, H, H), per px.
        angles: (A,) between the detector and the rows, radians: at 0 a ray runs down a column.

    Returns:
        (S, A, N): the detector is as long as the picture's diagonal, so that its corners are seen as well.
    """
    side = images.shape[-1]
    rays = _rays(side)
    sums = np.empty((len(images), len(angles), rays), np.float32)
    for a, angle in enumerate(angles):
        turn = _place(np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]), rays, side)
        for s, image in enumerate(images):
            turned = cv2.warpAffine(image, turn, (rays, rays), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            sums[s, a] = turned.sum(axis=0)
    return sums


def reconstruct(sinogram: Floats, angles: npt.NDArray[np.float64], side: int) -> Floats:
    """Filtered back-projection: rays (S, A, N) of `project` over half a turn -> pictures (S, side, side)."""
    filtered = _ramp_filtered(sinogram)
    pictures = np.zeros((len(sinogram), side, side), np.float32)
    for a, angle in enumerate(angles):
        # every pixel looks up where its ray met the detector: an affine map from the picture to a single row
        smear = _place(np.array([[np.cos(angle), np.sin(angle)], [0.0, 0.0]]), side, sinogram.shape[-1])
        smear[1] = 0
        for s, profile in enumerate(filtered[:, a]):
            pictures[s] += cv2.warpAffine(
                profile[None], smear, (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            )
    return pictures * np.float32(math.pi / len(angles))


def _ramp_filtered(sinogram: Floats) -> Floats:
    """Each row (..., N) through the ramp |f|, tapered towards the highest frequency as soft kernels do (Hann)."""
    rays = sinogram.shape[-1]
    length = 2 ** math.ceil(math.log2(2 * rays))  # no ray reaches round to the other end
    n = np.minimum(np.arange(length), length - np.arange(length))
    # the ramp's response in space, cut off at the sampling limit: sampling |f| instead would lose the mean value
    response = np.zeros(length)
    response[n % 2 == 1] = -1 / (math.pi * n[n % 2 == 1]) ** 2
    response[0] = 0.25
    gain = np.fft.rfft(response).real * (0.5 + 0.5 * np.cos(2 * math.pi * np.fft.rfftfreq(length)))
    return np.asarray(np.fft.irfft(np.fft.rfft(sinogram, length) * gain, length)[..., :rays], np.float32)


def _place(turn: npt.NDArray[np.float64], target: int, source: int) -> npt.NDArray[np.float64]:
    """The map (2, 3) from pixels of a square of `target` px to one of `source` px that turns about both middles."""
    middle = np.full(2, (target - 1) / 2)
    return np.column_stack([turn, np.full(2, (source - 1) / 2) - turn @ middle])


def _rays(side: int) -> int:
    return math.ceil(math.sqrt(2) * side)
