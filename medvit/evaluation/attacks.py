"""Changes of a few HU made against the model: FGSM (Goodfellow 2015, arXiv 1412.6572) and PGD (Madry 2018, 1706.06083).

They show what noise of that size can do at worst. The model is the one that predicts: in evaluation mode, its weights
without gradient and untouched. Epsilon is in HU and so is the result: clipping to 0..1 belongs to the windows, where
the model does it, and never to the normalised input, whose values lie far outside that range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from medvit.evaluation.physics import Slices, as_stored
from medvit.inference import Encoder
from medvit.records import UsageError, resolve_window

PGD_STEPS = 10
PGD_REACH = 2.5
"""Steps of PGD together, in epsilons: from any start to any corner of what is allowed, and time to turn round."""


@dataclass(frozen=True)
class Attack:
    """One way to attack.

    Attributes:
        apply: encoder, int16 HU (S, H, H), index of the true class, epsilon in HU, random numbers -> int16 HU.
        severities: epsilon, weakest first.
        unit: of epsilon.
        imitates: what it is.
    """

    apply: Callable[[Encoder, Slices, int, float, np.random.Generator], Slices]
    severities: tuple[float, ...]
    unit: str
    imitates: str


def fgsm(
    encoder: Encoder, slices: Slices, truth: int, epsilon: float, _rng: np.random.Generator | None = None
) -> Slices:
    """One step of `epsilon` HU in each pixel, whichever way makes the true class less likely.

    Args:
        encoder: the model, without CLAHE.
        slices: int16 HU (S, H, H) that the prediction looks at, of the backbone's size.
        truth: index of the true class.
        epsilon: HU.

    Returns:
        Whole HU, as a file stores them, nowhere farther than `epsilon` away and within 12 bits.

    Raises:
        UsageError: CLAHE has no gradient.
    """
    start = _tensor(encoder, slices)
    return _stored(start + epsilon * input_gradient(encoder, start, truth).sign(), slices, epsilon)


def pgd(
    encoder: Encoder, slices: Slices, truth: int, epsilon: float, rng: np.random.Generator, steps: int = PGD_STEPS
) -> Slices:
    """Steps of 2.5 epsilon / `steps` HU from a random start, each brought back to within `epsilon`; else as `fgsm`."""
    original = _tensor(encoder, slices)
    low, high = original - epsilon, original + epsilon
    changed = original + torch.as_tensor(rng.uniform(-epsilon, epsilon, slices.shape)).to(original)
    for _ in range(steps):
        uphill = input_gradient(encoder, changed, truth).sign()
        changed = (changed + PGD_REACH * epsilon / steps * uphill).clamp(low, high)
    return _stored(changed, slices, epsilon)


ATTACKS: dict[str, Attack] = {
    "FGSM": Attack(fgsm, (1, 2, 5, 10), "HU", "the worst change of this size, in one step"),
    "PGD": Attack(pgd, (1, 2, 5, 10), "HU", f"the worst change of this size, in {PGD_STEPS} steps"),
}
"""Name -> how, how much, and what it is."""


def input_gradient(encoder: Encoder, hu: Tensor, truth: int) -> Tensor:
    """Gradient (S, H, H) of the cross-entropy of the true class with respect to HU (S, H, H), per HU.

    Several chunks of slices are computed twice, so that the activations of one only are held at a time.

    Raises:
        UsageError: CLAHE has no gradient.
    """
    if encoder.preprocessing.clahe is not None:
        raise UsageError("preprocessing.clahe counts pixels and has no gradient: this model cannot be attacked so.")
    with encoder.judging(), torch.enable_grad():
        pixels = hu.detach().requires_grad_()
        loss = cross_entropy(logits_of(encoder, pixels)[None], torch.tensor([truth], device=hu.device))
        (gradient,) = torch.autograd.grad(loss, pixels)
    return gradient


def logits_of(encoder: Encoder, hu: Tensor) -> Tensor:
    """HU (S, H, H) -> logits (K,) as `Encoder.encode` and `Encoder.studies` compute them, and differentiable."""
    classifier = encoder.classifier

    def features(some: Tensor) -> Tensor:
        encoded: Tensor = classifier.backbone(_normalised(encoder, some))
        return encoded

    chunks = torch.split(hu, encoder.batch_slices)
    if len(chunks) == 1:
        encoded = [features(hu)]
    else:
        encoded = [checkpoint(features, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    values = torch.cat(encoded)[None]  # (1, S, D)
    logits: Tensor = classifier(values, torch.ones(values.shape[:2], dtype=torch.bool, device=hu.device)).logits[0]
    return logits


def _normalised(encoder: Encoder, hu: Tensor) -> Tensor:
    """HU (S, H, H) -> (S, C, H, H) as the backbone takes it: `prediction_transform` in torch."""
    channels = []
    for window, mean, std in zip(encoder.preprocessing.windows, encoder.mean, encoder.std, strict=True):
        level, width = resolve_window(window)
        channels.append((((hu - level) / width + 0.5).clamp(0, 1) - mean) / std)
    return torch.stack(channels, dim=1)


def _tensor(encoder: Encoder, slices: Slices) -> Tensor:
    return torch.as_tensor(slices.astype(np.float32)).to(next(encoder.classifier.parameters()))


def _stored(changed: Tensor, original: Slices, epsilon: float) -> Slices:
    """Whole HU within whole `epsilon` of the original and within 12 bits, or no farther outside than it was."""
    start, most = original.astype(np.float64), np.floor(epsilon)
    near = np.clip(changed.cpu().numpy(), start - most, start + most)
    return as_stored(near.astype(np.float32), original.astype(np.float32))
