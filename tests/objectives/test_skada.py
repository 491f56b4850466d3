"""DANN and CDAN against skada: its modules and losses, on the same weights and cases.

Its DAN loss takes distances where the papers take their squares, so MMD is checked against MONAI, scikit-learn and a
double loop in test_discrepancy instead.
"""

import pytest
import torch
from torch import Tensor, nn

from medvit.objectives import Objective
from medvit.objectives.adaptation import reversal

deep = pytest.importorskip("skada.deep", reason="skada and skorch are not installed")
base = pytest.importorskip("skada.deep.base")
modules = pytest.importorskip("skada.deep.modules")

PROGRESS = 0.2


class DomainClassifier(nn.Module):
    """skada's gradient reversal before our discriminator, as the probability of the target, which its loss wants."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, vectors: Tensor) -> Tensor:
        reversed_ = modules.GradientReversalLayer.apply(vectors, reversal(PROGRESS))
        return self.discriminator(reversed_).softmax(dim=1)[:, 1]


class Probabilities(nn.Module):
    """Encoder and head with probabilities for output, cut off: skada conditions on what the model returns."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = classifier.encoder, classifier.head

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.encoder(values)).softmax(dim=1).detach()


@pytest.fixture
def cases() -> dict[str, Tensor]:
    """Six labelled, six not, one slice each: skada weighs both sides alike, whatever their numbers."""
    values = torch.randn(12, 1, 2, generator=torch.Generator().manual_seed(2))
    label = torch.tensor([0, 1, 1, 0, 1, 1] + [-1] * 6)
    return {
        "input": values,
        "mask": torch.ones(12, 1, dtype=torch.bool),
        "label": label,
        "domain": (label < 0).long(),
    }


def gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def ours(objective: Objective, cases: dict[str, Tensor]) -> Tensor:
    return objective({**cases, "totals": objective.totals(cases)}, PROGRESS)["loss"]


def sample_domain(cases: dict[str, Tensor]) -> Tensor:
    """Negative is a target there."""
    return torch.where(cases["label"] < 0, -2, 1)


def test_dann_is_that_of_skada(adapt, cases):
    objective = adapt("dann", domains=2, class_weights=False)
    classifier = objective.classifier
    model = nn.Sequential()
    model.add_module("encoder", classifier.encoder)
    model.add_module("head", classifier.head)
    module = base.DomainAwareModule(model, "encoder", DomainClassifier(objective.term.discriminator)).train()
    # its loss is the sum of the means of both sides, ours the mean over all cases
    criterion = base.DomainAwareCriterion(nn.CrossEntropyLoss(), deep.DANNLoss(), reg=0.5)
    theirs = criterion(module(cases["input"][:, 0], sample_domain=sample_domain(cases)), cases["label"])
    mine = ours(objective, cases)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(gradients(objective, mine), gradients(objective, theirs))


def test_cdan_is_that_of_skada(adapt, cases):
    objective = adapt("cdan", domains=2, entropy=False)
    module = deep._adversarial.CDANModule(
        Probabilities(objective.classifier), "encoder", DomainClassifier(objective.term.discriminator)
    ).train()
    _, domain, features, _, _ = module(cases["input"][:, 0], sample_domain=sample_domain(cases))
    theirs = 0.5 * deep.CDANLoss()(domain[:6], domain[6:], features[:6], features[6:])
    learned = objective.learning(objective.classifier, cases)
    class_loss = learned.loss / objective.totals(cases)[0]
    mine = ours(objective, cases) - class_loss
    torch.testing.assert_close(mine, theirs)
    found, expected = gradients(objective, mine), gradients(objective, theirs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert len(expected) == 8
