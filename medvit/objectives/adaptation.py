"""Learning to keep working at sites that nobody labelled: DANN, CDAN and multi-kernel MMD.

Each is cross-entropy on labelled cases (the source) plus one term over all cases, labelled or not, that makes the
pooled vectors of studies alike across sites. Source and target go through the classifier in one forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier
from medvit.objectives.discrepancy import has_estimate, mmd2
from medvit.objectives.gathering import gather_rows, sum_over_processes
from medvit.objectives.objective import UNLABELLED, Batch, Objective, Task
from medvit.objectives.supervised import ClassLearning
from medvit.records import UsageError

LARGEST_PRODUCT = 4096
"""CDAN: features times classes above which their product is projected, as in the paper."""

PROJECTED = 1024
"""CDAN: width of the projection."""


class Cases(NamedTuple):
    """What a term of adaptation sees of a batch.

    `pooled` (B, D) study vectors, `logits` (B, K), `domains` (B, M) which site each is of, summing to 1 (mixed cases
    are of two), `labelled` (B,).
    """

    pooled: Tensor
    logits: Tensor
    domains: Tensor
    labelled: Tensor


class Dann(nn.Module):
    """Domain-adversarial training (Ganin et al. 2016, JMLR 17, 1-35), for any number of sites.

    A discriminator learns to tell sites from study vectors; its gradient, reversed and weighed by `reversal` times the
    strength, teaches the model to leave it nothing to tell by. The strength does not weaken the discriminator: with 0
    it is a probe.

    Args:
        width: D of the study vectors.
        config: strength and width of the discriminator.
        task: how many domains.
    """

    def __init__(self, width: int, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.strength = config.strength
        self.discriminator = make_discriminator(width, config.discriminator_width, task.domains)

    def total(self, label: Tensor) -> Tensor:
        """Number of cases, labelled or not."""
        return label.new_tensor(len(label), dtype=torch.float32)

    def forward(self, cases: Cases, progress: float) -> dict[str, Tensor]:
        """`loss`, summed over all cases; `domain_loss`, `domain_accuracy`, `alpha`."""
        alpha = reversal(progress)
        logits = self.discriminator(reverse_gradient(cases.pooled, alpha * self.strength))
        return discriminate(logits, cases.domains) | {"alpha": logits.new_tensor(alpha)}


class Cdan(nn.Module):
    """Conditional domain-adversarial training (Long et al. 2018, arXiv 1705.10667).

    The discriminator sees the product of study vector and class probabilities, so that sites are made alike class by
    class. No gradient goes through the probabilities: they are a condition, not something to be adapted.

    Args:
        width: D of the study vectors.
        config: as Dann, and whether confident cases count more (CDAN+E).
        task: classes and domains.
    """

    def __init__(self, width: int, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.strength, self.entropy = config.strength, config.entropy
        product = width * len(task.counts)
        self.projects = product > LARGEST_PRODUCT
        joined = PROJECTED if self.projects else product
        self.discriminator = make_discriminator(joined, config.discriminator_width, task.domains)
        if self.projects:
            # drawn once and fixed: it belongs to the state, not to the random numbers of a run
            generator = torch.Generator().manual_seed(0)
            self.features_projection: Tensor
            self.classes_projection: Tensor
            self.register_buffer("features_projection", torch.randn(width, PROJECTED, generator=generator))
            self.register_buffer("classes_projection", torch.randn(len(task.counts), PROJECTED, generator=generator))

    def total(self, label: Tensor) -> Tensor:
        """Number of cases, labelled or not: their weights average to 1."""
        return label.new_tensor(len(label), dtype=torch.float32)

    def forward(self, cases: Cases, progress: float) -> dict[str, Tensor]:
        """As Dann."""
        probabilities = cases.logits.detach().softmax(dim=1)
        weights = entropy_weights(probabilities, cases.labelled) if self.entropy else None
        alpha = reversal(progress)
        joined = self._join(cases.pooled, probabilities)
        logits = self.discriminator(reverse_gradient(joined, alpha * self.strength))
        return discriminate(logits, cases.domains, weights) | {"alpha": logits.new_tensor(alpha)}

    def _join(self, pooled: Tensor, probabilities: Tensor) -> Tensor:
        """(B, D), (B, K) -> (B, K * D), or its random projection, which keeps inner products in expectation."""
        if not self.projects:
            return (probabilities[:, :, None] * pooled[:, None, :]).flatten(1)
        joined: Tensor = (pooled @ self.features_projection) * (probabilities @ self.classes_projection)
        return joined / math.sqrt(PROJECTED)


class Mmd(nn.Module):
    """Maximum mean discrepancy between labelled and unlabelled study vectors of the global batch.

    Args:
        width: D of the study vectors.
        config: strength, kernel, which estimate.
        task: not used: all labelled cases are one sample.
    """

    def __init__(self, width: int, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.strength, self.kernel, self.unbiased = config.strength, config.kernel, config.unbiased

    def total(self, label: Tensor) -> Tensor:
        """1: the estimates of the batches of one step are averaged."""
        return label.new_tensor(1, dtype=torch.float32)

    def forward(self, cases: Cases, progress: float) -> dict[str, Tensor]:
        """`loss`: strength times `mmd`; a batch too small for the estimate adds nothing, and reports 0."""
        source = gather_rows(cases.pooled[cases.labelled])
        target = gather_rows(cases.pooled[~cases.labelled])
        if has_estimate(len(source), len(target), unbiased=self.unbiased):
            estimate = mmd2(source, target, kernel=self.kernel, unbiased=self.unbiased)
        else:
            estimate = 0 * cases.pooled.sum()
        return {"loss": self.strength * (progress >= 0) * estimate, "mmd": estimate.detach()}


def reversal(progress: float) -> float:
    """How strongly gradients are reversed at a progress of 0..1: from 0 to nearly 1 (Ganin et al. 2016, 5.2.2).

    0 while adaptation has not begun, below 0.
    """
    return 2 / (1 + math.exp(-10 * max(0.0, progress))) - 1


def reverse_gradient(values: Tensor, strength: float) -> Tensor:
    """The values as they are; their gradient times -strength."""
    reversed_: Tensor = _ReverseGradient.apply(values, strength)
    return reversed_


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        reversed_: Tensor = -ctx.strength * gradients[0]
        return reversed_, None


def make_discriminator(width: int, hidden: int, domains: int) -> nn.Sequential:
    """Study vectors (B, width) -> domain logits (B, domains).

    No batch normalisation: the statistics of a batch would tell the sites apart without the vectors.
    """
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, domains))


def discriminate(logits: Tensor, domains: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Cross-entropy of domain logits (B, M) and domains (B, M), each case weighted (B,).

    Returns:
        `loss` summed over cases; of this batch alone `domain_loss`, their mean, and `domain_accuracy`.
    """
    losses = -(domains * logits.log_softmax(dim=1)).sum(dim=1)
    loss = (losses if weights is None else weights * losses).sum()
    correct = logits.detach().argmax(dim=1) == domains.argmax(dim=1)
    return {"loss": loss, "domain_loss": loss.detach() / len(logits), "domain_accuracy": correct.float().mean()}


def entropy_weights(probabilities: Tensor, labelled: Tensor) -> Tensor:
    """1 + exp(-entropy), (B,), scaled to average 1 over the labelled and over the unlabelled cases of all processes.

    Each side apart, as in the authors' code: else the side on which the model is surer would pull the discriminator.
    """
    weights: Tensor = 1 + torch.exp(-torch.special.entr(probabilities).sum(dim=1))
    side = labelled.long()
    sides = nn.functional.one_hot(side, 2).to(weights.dtype)  # (B, 2)
    totals = sum_over_processes(torch.stack([(weights[:, None] * sides).sum(dim=0), sides.sum(dim=0)]))
    return weights * (totals[1] / totals[0])[side]


Term = Dann | Cdan | Mmd
"""What is added to the cross-entropy: `total(label)` is its normaliser, `forward(cases, progress)` its sum. Progress is
that of the adaptation: below 0 it has not begun, and the model must feel nothing of it."""


class Adaptation(Objective):
    """Cross-entropy on labelled cases and a term that makes sites alike.

    Logged, each for the batch of this process alone: `class_loss` and what the term reports.

    Args:
        term: Dann, Cdan or Mmd.
        classifier: the model.
        config: settings of both.
        task: classes and domains.

    Raises:
        UsageError: a single domain.
    """

    def __init__(
        self,
        term: Callable[[int, ObjectiveConfig, Task], Term],
        classifier: CtClassifier,
        config: ObjectiveConfig,
        task: Task,
    ) -> None:
        super().__init__()
        if task.domains < 2:
            raise UsageError(
                f"objective.name {config.name!r} makes sites alike, and all cases are of one site. Name an unlabelled "
                "one in data.target_sites, or set objective.name=supervised."
            )
        self.classifier = classifier
        self.learning = ClassLearning(config, task)
        self.term = term(classifier.backbone.width, config, task)
        self.domains = task.domains
        self.begin = config.begin
        self.discriminator_rate = config.discriminator_rate

    def rate_of(self, name: str) -> float:
        """The discriminator learns at a rate of its own: an opponent that lags behind teaches nothing."""
        return self.discriminator_rate if name.startswith("term.") else 1.0

    def totals(self, batch: Batch) -> Tensor:
        """Sum of the class weights of labelled cases, and what the term is divided by, (2,)."""
        return torch.stack([self.learning.total(batch["label"]), self.term.total(batch["label"])])

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch of labelled and unlabelled cases; `logits` of the labelled ones."""
        learned = self.learning(self.classifier, batch)
        domains = learned.mixed.targets(batch["domain"], self.domains)
        labelled = batch["label"] != UNLABELLED
        cases = Cases(learned.output.pooled, learned.output.logits, domains, labelled)
        adapted: dict[str, Tensor] = self.term(cases, (progress - self.begin) / (1 - self.begin))
        loss = learned.loss / batch["totals"][0] + adapted.pop("loss") / batch["totals"][1]
        class_loss = learned.loss.detach() / self.learning.total(batch["label"]).clamp_min(1e-12)  # perhaps no label
        return {"loss": loss, "logits": learned.logits, "class_loss": class_loss, **adapted}
