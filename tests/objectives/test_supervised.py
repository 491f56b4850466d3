import pytest
import torch
from torch import Tensor, nn

from medvit.config import ModelConfig, ObjectiveConfig
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.objectives import OBJECTIVES, Task
from medvit.objectives.supervised import class_weights, cross_entropy

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


def learn(
    classifier: CtClassifier, batch: dict[str, Tensor], counts: tuple[int, ...], **settings: object
) -> dict[str, Tensor]:
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(**settings), Task(counts))
    return objective({**batch, "totals": objective.totals(batch)}, 0.0)


def loss(classifier: CtClassifier, batch: dict[str, Tensor], counts: tuple[int, ...], **settings: object) -> Tensor:
    return learn(classifier, batch, counts, **settings)["loss"]


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
    torch.testing.assert_close(loss(classifier, batch, (30, 10)), -(weights * log_p).sum() / weights.sum())


def test_class_weights_can_be_turned_off(classifier, batch):
    logits = classifier(batch["input"], batch["mask"]).logits
    plain = loss(classifier, batch, (30, 10), class_weights=False)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, LABELS))


def test_label_smoothing_is_applied(classifier, batch):
    logits = classifier(batch["input"], batch["mask"]).logits
    smooth = loss(classifier, batch, (2, 2), label_smoothing=0.2)
    target = 0.8 * nn.functional.one_hot(LABELS, 2) + 0.1
    torch.testing.assert_close(smooth, -(target * logits.log_softmax(dim=1)).sum(dim=1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_of_weighted_classes_is_that_of_torch(classifier, batch, smoothing):
    logits = classifier(batch["input"], batch["mask"]).logits
    theirs = nn.functional.cross_entropy(logits, LABELS, weight=class_weights((30, 10)), label_smoothing=smoothing)
    torch.testing.assert_close(loss(classifier, batch, (30, 10), label_smoothing=smoothing), theirs)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_is_that_of_its_paper(classifier, batch, gamma):
    p = classifier(batch["input"], batch["mask"]).logits.softmax(dim=1)[torch.arange(4), LABELS]
    weights = class_weights((30, 10))[LABELS]
    expected = -(weights * (1 - p) ** gamma * p.log()).sum() / weights.sum()
    torch.testing.assert_close(loss(classifier, batch, (30, 10), focal_gamma=gamma), expected)


def test_focal_loss_tends_to_cross_entropy(classifier, batch):
    plain, focal = (loss(classifier, batch, (30, 10), focal_gamma=gamma) for gamma in (0.0, 1e-6))
    torch.testing.assert_close(plain, focal)


def test_focal_loss_counts_easy_cases_less():
    logits, targets = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    shares = {}
    for gamma in (0.0, 2.0):
        easy, hard = (
            cross_entropy(row[None], target[None], torch.ones(2), smoothing=0.0, gamma=gamma)
            for row, target in zip(logits, targets, strict=True)
        )
        shares[gamma] = easy / hard
    assert shares[2.0] < 0.01 * shares[0.0]


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_of_a_certain_case_has_a_finite_gradient(gamma, smoothing):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    cross_entropy(logits, torch.eye(2), torch.ones(2), smoothing=smoothing, gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all()


def test_soft_targets_are_the_weighted_mean_of_hard_ones():
    torch.manual_seed(0)
    logits, weights, first, second = torch.randn(5, 3), torch.tensor([0.5, 1, 3]), torch.eye(3)[0], torch.eye(3)[2]

    def sum_of(target: Tensor) -> Tensor:
        return cross_entropy(logits, target.expand(5, 3), weights, smoothing=0.1, gamma=0.0)

    torch.testing.assert_close(sum_of(0.3 * first + 0.7 * second), 0.3 * sum_of(first) + 0.7 * sum_of(second))


def test_unlabelled_cases_never_count(classifier, batch):
    with_target = {**batch, "label": torch.tensor([0, -1, 1, -1])}
    labelled = {name: values[[0, 2]] for name, values in with_target.items()}
    for settings in ({}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}):
        ours, alone = (learn(classifier, some, (30, 10), **settings) for some in (with_target, labelled))
        torch.testing.assert_close(ours["loss"], alone["loss"])
        torch.testing.assert_close(ours["logits"], alone["logits"])


def test_gradient_does_not_depend_on_how_a_batch_is_cut_up(classifier, batch):
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(label_smoothing=0.1), Task((30, 10)))
    totals = objective.totals(batch)

    def gradients(parts: list[list[int]]) -> list[Tensor]:
        objective.zero_grad()
        for part in parts:
            objective({**{name: values[part] for name, values in batch.items()}, "totals": totals}, 0.0)[
                "loss"
            ].backward()
        return [p.grad.clone() for p in objective.parameters() if p.grad is not None]

    whole, cut = gradients([[0, 1, 2, 3]]), gradients([[0], [1, 2, 3]])
    torch.testing.assert_close(whole, cut)
    assert len(whole) > 3


def test_objective_owns_the_model(classifier):
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(), Task((1, 1)))
    assert {f"classifier.{name}" for name in classifier.state_dict()} <= set(objective.state_dict())
