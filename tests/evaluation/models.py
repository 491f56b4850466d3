"""Models to look into: a small ViT with random weights, and one whose answer is known."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from medvit.config import ModelConfig
from medvit.inference import Encoder, Judged, Model, StudyOutput
from medvit.models.bundle_info import BundleInfo
from medvit.models.classifier import build_classifier
from medvit.records import Case, Preprocessing

SIDE, PATCH = 32, 8
PREPROCESSING = Preprocessing(windows=("lung", "soft_tissue"), size=SIDE, predict_slices=5)
ARCHITECTURE = ModelConfig(
    name="vit_tiny_patch16_224",
    weights="none",
    options={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": PATCH, "proj_drop_rate": 0.2},
)


def small_model(classes: tuple[str, ...] = ("none", "bleed"), architecture: ModelConfig = ARCHITECTURE) -> Model:
    torch.manual_seed(0)
    classifier, _ = build_classifier(architecture, size=SIDE, channels=2, classes=len(classes))
    with torch.no_grad():
        for parameter in classifier.parameters():  # timm begins so near to zero that every answer is the same
            parameter.add_(0.3 * torch.randn_like(parameter))
    mean, std = (0.4, 0.3), (0.2, 0.25)
    info = BundleInfo(
        architecture=architecture, preprocessing=PREPROCESSING, mean=mean, std=std, classes=classes, threshold=None
    )
    return Model(Encoder(classifier, PREPROCESSING, mean, std), info)


def random_slices(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 200, (count, SIDE, SIDE)).astype(np.int16)


def judged_cases(model: Model, count: int, labels: tuple[str, ...] = ("none", "bleed")) -> list[Judged]:
    """Cases and labels have nothing to do with each other; of two classes half of the cases is called."""
    cases = [
        Case(
            case_id=f"case{number}",
            patient_id=f"patient{number}",
            group=f"patient{number}",
            root="",
            files=(str(number),),
            label=labels[number // 2 % len(labels)],
        )
        for number in range(count)
    ]
    if len(labels) == 2:
        scores = [model.predict_slices(random_slices(k), case).probabilities[labels[1]] for k, case in enumerate(cases)]
        model = replace(model, info=model.info.model_copy(update={"threshold": float(np.median(scores))}))
    return [
        Judged(
            model, case, model.predict_slices(random_slices(k), case), lambda case: random_slices(int(case.files[0]))
        )
        for k, case in enumerate(cases)
    ]


@dataclass(frozen=True)
class BrightestPatch:
    """Stands in for an Encoder: the logit is the mean HU of one patch of one slice, over 100."""

    slice: int
    row: int
    column: int

    def encode(self, slices: np.ndarray) -> np.ndarray:
        at = np.s_[:, self.row * PATCH : (self.row + 1) * PATCH, self.column * PATCH : (self.column + 1) * PATCH]
        return slices[at].mean(axis=(1, 2), dtype=np.float64)[:, None] / 100

    def studies(self, features: list[np.ndarray]) -> list[StudyOutput]:
        return [SimpleNamespace(logits=np.array([0.0, float(one[self.slice, 0])])) for one in features]


def frozen(model: Model) -> Model:
    model.encoder.classifier.set_trainable("head")
    return replace(model)
