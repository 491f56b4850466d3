import pytest
import torch
from torch import Tensor, nn

from medvit.config import ModelConfig, ObjectiveConfig
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.objectives import OBJECTIVES
from medvit.objectives.supervised import class_weights

TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16}
LABELS = torch.tensor([0, 0, 1, 0])


@pytest.fixture(scope="module")
def classifier() -> CtClassifier:
    torch.manual_seed(0)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=TINY)
    return build_classifier(config, size=32, channels=3, classes=2)[0]


@pytest.fixture
def batch(classifier) -> dict[str, Tensor]:
    values = torch.randn(4, 2, classifier.backbone.width, generator=torch.Generator().manual_seed(1))
    return {"input": values, "mask": torch.ones(4, 2, dtype=torch.bool), "label": LABELS, "index": torch.arange(4)}


def loss(classifier: CtClassifier, batch: dict[str, Tensor], counts: list[int], **settings: object) -> Tensor:
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(**settings), counts)
    return objective(batch, 0.0)["loss"]


def test_class_weights_are_inverse_frequencies():
    assert class_weights([30, 10]).tolist() == pytest.approx([40 / (2 * 30), 40 / (2 * 10)])


def test_class_weights_average_to_one_over_the_cases():
    counts = torch.tensor([50.0, 7.0, 3.0])
    assert (class_weights([50, 7, 3]) * counts).sum() / counts.sum() == pytest.approx(1)


def test_balanced_classes_weigh_one():
    assert class_weights([5, 5, 5]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("counts", [[4, 0], [0, 0, 1]])
def test_class_without_cases_is_refused(counts):
    with pytest.raises(ValueError, match="a case of each class"):
        class_weights(counts)


def test_loss_is_cross_entropy_weighted_by_the_counts_given(classifier, batch):
    log_p = classifier(batch["input"], batch["mask"]).logits.log_softmax(dim=1)[torch.arange(4), LABELS]
    weights = torch.tensor([40 / 60, 40 / 20])[LABELS]  # of the counts, not of the batch
    torch.testing.assert_close(loss(classifier, batch, [30, 10]), -(weights * log_p).sum() / weights.sum())


def test_class_weights_can_be_turned_off(classifier, batch):
    logits = classifier(batch["input"], batch["mask"]).logits
    plain = loss(classifier, batch, [30, 10], class_weights=False)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, LABELS))


def test_label_smoothing_is_applied(classifier, batch):
    logits = classifier(batch["input"], batch["mask"]).logits
    smooth = loss(classifier, batch, [2, 2], label_smoothing=0.2)
    target = 0.8 * nn.functional.one_hot(LABELS, 2) + 0.1
    torch.testing.assert_close(smooth, -(target * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_objective_owns_the_model(classifier):
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(), [1, 1])
    assert {f"classifier.{name}" for name in classifier.state_dict()} <= set(objective.state_dict())
