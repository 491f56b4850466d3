import math
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.objectives import OBJECTIVES, Objective, Task
from medvit.objectives.adaptation import Cases, Cdan, entropy_weights, reversal, reverse_gradient
from medvit.objectives.discrepancy import mmd2
from medvit.records import UsageError

METHODS = ("dann", "cdan", "mmd")
ADVERSARIES = ("dann", "cdan")
LOGGED = {
    "dann": {"class_loss", "domain_loss", "domain_accuracy", "alpha"},
    "cdan": {"class_loss", "domain_loss", "domain_accuracy", "alpha"},
    "mmd": {"class_loss", "mmd"},
}

Batch = dict[str, Tensor]


def run(objective: Objective, batch: Batch, progress: float = 0.3) -> dict[str, Tensor]:
    return objective({**batch, "totals": objective.totals(batch)}, progress)


def term_of(objective: Objective, batch: Batch, progress: float = 0.3) -> Tensor:
    """What the term adds to the loss, with its gradient."""
    output = objective.classifier(batch["input"], batch["mask"])
    domains = nn.functional.one_hot(batch["domain"], 3).float()
    result = objective.term(Cases(output.pooled, output.logits, domains, batch["label"] >= 0), progress)
    return result["loss"] / objective.totals(batch)[1]


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def some(batch: Batch, cases: list[int]) -> Batch:
    return {name: values[cases] for name, values in batch.items()}


# gradient reversal


def test_reversal_grows_from_zero_to_one_as_published():
    assert [reversal(p) for p in (0.0, 0.1, 0.5)] == pytest.approx([0, math.tanh(0.5), math.tanh(2.5)])
    assert 0.9999 < reversal(1.0) < 1


def test_progress_is_taken_at_every_step_not_every_epoch(adapt, batch):
    objective = adapt("dann")
    alphas = [float(run(objective, batch, step / 100)["alpha"]) for step in range(5)]
    assert alphas == pytest.approx([math.tanh(5 * step / 100) for step in range(5)])
    assert all(later > earlier for earlier, later in pairwise(alphas))


def test_reversed_gradient_is_minus_strength_times_the_finite_difference():
    torch.manual_seed(0)
    weight = torch.randn(4, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return (values @ weight).tanh() ** 2

    values = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reverse_gradient(values, 0.7), values)
    loss(reverse_gradient(values, 0.7)).backward()
    steps = 1e-6 * torch.eye(4, dtype=torch.float64)
    slope = torch.stack([(loss(values + step) - loss(values - step)) / 2e-6 for step in steps]).detach()
    torch.testing.assert_close(values.grad, -0.7 * slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_discriminator_descends_where_the_classifier_climbs(adapt, batch, name):
    # the gradients of the domain loss itself, without reversal, by strength -1 at the end of training
    plain = adapt(name)
    plain.term.strength = -1 / reversal(0.3)
    ours = adapt(name, strength=0.5)
    expected, found = gradients(plain, term_of(plain, batch)), gradients(ours, term_of(ours, batch))
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        factor = 1 if "discriminator" in parameter else -0.5 * reversal(0.3)
        torch.testing.assert_close(found[parameter], factor * gradient)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_strength_zero_leaves_the_classifier_alone_and_a_probe_learning(adapt, batch, name):
    objective = adapt(name, strength=0.0)
    moved = {parameter for parameter, g in gradients(objective, term_of(objective, batch)).items() if g.abs().max() > 0}
    assert moved == {
        f"term.discriminator.{parameter}" for parameter, _ in objective.term.discriminator.named_parameters()
    }


# the source first


@pytest.mark.parametrize("name", METHODS)
def test_before_it_begins_the_classifier_learns_as_without_adaptation(adapt, batch, name):
    early, late, never = (adapt(name, **setting) for setting in ({"begin": 0.4}, {"begin": 0.3}, {"strength": 0.0}))
    found, later, alone = (
        gradients(objective.classifier, run(objective, batch, 0.39)["loss"]) for objective in (early, late, never)
    )
    for parameter, gradient in alone.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=0)
    assert any((later[parameter] != gradient).any() for parameter, gradient in alone.items())


@pytest.mark.parametrize("name", ADVERSARIES)
def test_begin_counts_progress_from_there(adapt, batch, name):
    objective = adapt(name, begin=0.4)
    alphas = [float(run(objective, batch, progress)["alpha"]) for progress in (0.0, 0.4, 0.7, 1.0)]
    assert alphas == pytest.approx([0, 0, reversal(0.5), reversal(1)])


# the domain loss


def test_domain_loss_is_cross_entropy_of_the_pooled_vector_over_all_cases(adapt, batch):
    objective = adapt("dann")
    pooled = objective.classifier(batch["input"], batch["mask"]).pooled
    logits = objective.term.discriminator(pooled)
    expected = nn.functional.cross_entropy(logits, batch["domain"])
    result = run(objective, batch)
    torch.testing.assert_close(result["domain_loss"], expected.detach())
    torch.testing.assert_close((result["loss"] - result["class_loss"]).detach(), expected.detach())
    assert result["domain_accuracy"] == (logits.argmax(dim=1) == batch["domain"]).float().mean()


@pytest.mark.parametrize("name", METHODS)
def test_both_domains_have_a_share_in_the_term(adapt, batch, name):
    objective = adapt(name)
    batch["input"].requires_grad_()
    (gradient,) = torch.autograd.grad(term_of(objective, batch), batch["input"])
    assert (gradient.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_both_domains_go_through_one_forward(adapt, batch, name):
    objective, seen = adapt(name), []
    objective.classifier.register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    run(objective, batch)
    assert seen == [7]


@pytest.mark.parametrize("name", ADVERSARIES)
def test_discriminator_reads_no_batch_statistics(adapt, name):
    discriminator = adapt(name).term.discriminator.train()
    vectors = torch.randn(5, discriminator[0].in_features)
    alone = torch.cat([discriminator(vector[None]) for vector in vectors])
    torch.testing.assert_close(discriminator(vectors), alone)


def test_discriminator_has_the_width_and_dropout_that_were_asked_for(adapt):
    torch.manual_seed(0)
    discriminator = OBJECTIVES["dann"](
        adapt("mmd").classifier, ObjectiveConfig(name="dann", discriminator_width=32), Task((1, 1), 4)
    ).term.discriminator
    assert [tuple(p.shape) for p in discriminator.parameters()] == [(32, 8), (32,), (4, 32), (4,)]
    assert [module.p for module in discriminator if isinstance(module, nn.Dropout)] == [0.5]


@pytest.mark.parametrize("name", METHODS)
def test_one_site_is_refused(adapt, name):
    with pytest.raises(UsageError, match=r"data\.target_sites"):
        adapt(name, domains=1)


# conditioning


def test_conditional_discriminator_sees_the_product_of_vector_and_probabilities(adapt, batch):
    objective = adapt("cdan", entropy=False, counts=(5, 5, 5))
    output = objective.classifier(batch["input"], batch["mask"])
    p = output.logits.softmax(dim=1)
    joined = torch.stack([torch.cat([p[b, k] * output.pooled[b] for k in range(3)]) for b in range(7)])
    expected = nn.functional.cross_entropy(objective.term.discriminator(joined), batch["domain"])
    torch.testing.assert_close(run(objective, batch)["domain_loss"], expected.detach())


@pytest.mark.parametrize("entropy", [True, False])
def test_no_gradient_through_the_conditioning_probabilities(adapt, batch, entropy):
    objective = adapt("cdan", entropy=entropy)
    found = gradients(objective, term_of(objective, batch))
    assert not [parameter for parameter in found if parameter.startswith("classifier.head")]
    assert [parameter for parameter in found if parameter.startswith("classifier.encoder")]


def test_confident_cases_weigh_more_and_each_side_averages_to_one():
    p = torch.tensor([[0.5, 0.5], [0.99, 0.01], [0.8, 0.2], [1.0, 0.0], [0.6, 0.4]])
    labelled = torch.tensor([True, True, True, False, False])
    weights = entropy_weights(p, labelled)
    entropies = [-sum(q * math.log(q) for q in row if q > 0) for row in p.tolist()]
    plain = [1 + math.exp(-h) for h in entropies]
    expected = [w * 3 / sum(plain[:3]) for w in plain[:3]] + [w * 2 / sum(plain[3:]) for w in plain[3:]]
    assert weights.tolist() == pytest.approx(expected)
    assert weights[0] < weights[2] < weights[1]
    assert torch.isfinite(entropy_weights(p, torch.ones(5, dtype=torch.bool))).all()


def test_entropy_changes_the_loss_and_can_be_turned_off(adapt, batch):
    weighted, plain = (run(adapt("cdan", entropy=entropy), batch)["domain_loss"] for entropy in (True, False))
    assert not torch.isclose(weighted, plain)


def test_large_products_are_projected_and_the_projection_belongs_to_the_state(adapt, batch):
    objective = adapt("cdan", width=2100)  # 2 classes: 4200 numbers, 4096 are allowed
    assert objective.term.discriminator[0].in_features == 1024
    torch.manual_seed(99)
    other = Cdan(2100, ObjectiveConfig(name="cdan"), Task((1, 1), 3))
    for name in ("features_projection", "classes_projection"):
        assert torch.equal(objective.state_dict()[f"term.{name}"], other.state_dict()[name])
    assert torch.isfinite(run(objective, batch)["loss"])
    assert "term.features_projection" not in adapt("cdan", width=2048).state_dict()


def test_projection_keeps_inner_products():
    torch.manual_seed(0)
    term = Cdan(2100, ObjectiveConfig(name="cdan"), Task((1, 1), 3))
    vectors, p = nn.functional.normalize(torch.randn(6, 2100) + 1), torch.rand(6, 2)
    joined = term._join(vectors, p)
    expected = (vectors @ vectors.T) * (p @ p.T)
    assert (joined @ joined.T - expected).abs().max() < 0.25


# all methods


@pytest.mark.parametrize("name", METHODS)
def test_class_loss_is_that_of_the_labelled_cases_alone(adapt, batch, name):
    labelled = some(batch, [0, 1, 2, 3])
    supervised = OBJECTIVES["supervised"](adapt(name).classifier, ObjectiveConfig(), Task((30, 10)))
    ours, alone = run(adapt(name), batch), run(supervised, labelled)
    torch.testing.assert_close(ours["class_loss"], alone["loss"].detach())
    torch.testing.assert_close(ours["logits"], alone["logits"])


@pytest.mark.parametrize("name", METHODS)
def test_logged_values_are_detached_scalars(adapt, batch, name):
    result = run(adapt(name), batch)
    logged = {key: value for key, value in result.items() if key not in ("loss", "logits")}
    assert logged.keys() == LOGGED[name]
    assert all(value.ndim == 0 and not value.requires_grad for value in logged.values())


@pytest.mark.parametrize(("name", "settings"), [("dann", {}), ("cdan", {"entropy": False})])
def test_gradient_does_not_depend_on_how_a_batch_is_cut_up(adapt, batch, name, settings):
    objective = adapt(name, **settings)
    totals = objective.totals(batch)
    parts = [[0, 1, 4], [2, 3, 5, 6]]
    torch.testing.assert_close(sum(objective.totals(some(batch, part)) for part in parts), totals)
    cut = sum(objective({**some(batch, part), "totals": totals}, 0.3)["loss"] for part in parts)
    whole = objective({**batch, "totals": totals}, 0.3)["loss"]
    torch.testing.assert_close(gradients(objective, cut), gradients(objective, whole))


def test_discrepancies_of_one_step_are_averaged(adapt, batch):
    objective, parts = adapt("mmd"), [[0, 1, 4, 5], [2, 3, 5, 6]]
    totals = sum(objective.totals(some(batch, part)) for part in parts)
    results = [objective({**some(batch, part), "totals": totals}, 0.3) for part in parts]
    class_losses = [objective.learning(objective.classifier, some(batch, part)).loss / totals[0] for part in parts]
    added = sum(result["loss"] for result in results) - sum(class_losses)
    torch.testing.assert_close(added, sum(result["mmd"] for result in results) / 2)


@pytest.mark.parametrize(("kernel", "unbiased"), [("rbf", False), ("rbf", True), ("linear", False), ("linear", True)])
def test_discrepancy_is_that_of_labelled_and_unlabelled_vectors_weighed(adapt, batch, kernel, unbiased):
    objective = adapt("mmd", kernel=kernel, unbiased=unbiased, strength=0.3)
    pooled = objective.classifier(batch["input"], batch["mask"]).pooled
    expected = mmd2(pooled[:4], pooled[4:], kernel=kernel, unbiased=unbiased)
    torch.testing.assert_close(run(objective, batch)["mmd"], expected.detach())
    torch.testing.assert_close(term_of(objective, batch), 0.3 * expected)


def test_unbiased_discrepancy_below_zero_is_not_clipped(adapt, batch):
    batch["input"][4:] = batch["input"][:3].flip(0)
    objective = adapt("mmd", unbiased=True)
    result = run(objective, batch)
    assert result["mmd"] < 0
    torch.testing.assert_close(result["loss"].detach(), result["class_loss"] + result["mmd"])
    assert gradients(objective, term_of(objective, batch))["classifier.encoder.0.weight"].abs().max() > 0


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_one_labelled_and_one_unlabelled_case_are_enough(adapt, batch, name, unbiased):
    objective = adapt(name, unbiased=unbiased)
    result = run(objective, some(batch, [0, 4]))
    assert all(torch.isfinite(value).all() for value in result.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(objective, result["loss"]).values())


def test_discrepancy_adds_nothing_where_it_has_no_estimate(adapt, batch):
    for cases, unbiased in (([0, 4, 5], True), ([0, 1], False)):
        result = run(adapt("mmd", unbiased=unbiased), some(batch, cases))
        assert result["mmd"] == 0
        torch.testing.assert_close(result["loss"].detach(), result["class_loss"])


def test_mixed_cases_belong_to_both_of_their_sites(adapt, batch):
    objective = adapt("dann", mixup=1.0)
    torch.manual_seed(5)
    result = run(objective, batch)
    torch.manual_seed(5)
    mixed = objective.learning.mixing(batch)
    assert not torch.equal(mixed.values, batch["input"])
    logits = objective.term.discriminator(objective.classifier(mixed.values, batch["mask"]).pooled)
    targets = (
        mixed.share * torch.eye(3)[batch["domain"]] + (1 - mixed.share) * torch.eye(3)[batch["domain"]][mixed.partner]
    )
    torch.testing.assert_close(result["domain_loss"], nn.functional.cross_entropy(logits, targets).detach())


@pytest.mark.parametrize("name", ADVERSARIES)
def test_dropout_is_drawn_from_the_global_generator(adapt, batch, name):
    objective = adapt(name, dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(run(objective, batch)["loss"].detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", METHODS)
def test_state_restores_the_objective(adapt, batch, name):
    first, second = adapt(name), adapt(name)
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(first, batch)["loss"], run(second, batch)["loss"])


# does it help?


def clusters(count: int, degrees: float, shift: tuple[float, float], seed: int) -> tuple[Tensor, Tensor]:
    """Two classes left and right, then rotated and shifted: slices (N, 3, 2) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    label, angle = torch.arange(count) % 2, math.radians(degrees)
    centre = torch.stack([3.0 * label - 1.5, torch.zeros(count)], dim=1)
    points = centre + 0.4 * torch.randn(count, 2, generator=generator)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = points @ turn + torch.tensor(shift)
    return points[:, None] + 0.1 * torch.randn(count, 3, 2, generator=generator), label


def target_accuracy(objective: Objective, steps: int = 300, size: int = 32) -> float:
    """Train on labelled clusters and unlabelled moved ones; accuracy on the latter."""
    (source, label), (target, truth) = clusters(200, 0, (0, 0), 0), clusters(200, 15, (1.5, 1.0), 1)
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    common = {"mask": torch.ones(2 * size, 3, dtype=torch.bool), "domain": torch.arange(2 * size) // size}
    for step in range(steps):
        s, t = torch.randperm(200)[:size], torch.randperm(200)[:size]
        labels = torch.cat([label[s], torch.full((size,), -1)])
        loss = run(objective, {**common, "input": torch.cat([source[s], target[t]]), "label": labels}, step / steps)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
    objective.eval()
    logits = objective.classifier(target, torch.ones(200, 3, dtype=torch.bool)).logits
    return float((logits.argmax(dim=1) == truth).float().mean())


def test_adaptation_raises_accuracy_at_a_site_without_labels(adapt):
    setting = {"domains": 2, "counts": (100, 100), "width": 16, "dropout": 0.5}
    accuracy = {
        name: fmean(target_accuracy(adapt(name, seed=seed, **setting)) for seed in range(3))
        for name in ("supervised", *METHODS)
    }
    assert accuracy["supervised"] < 0.85
    assert all(accuracy[name] > accuracy["supervised"] + 0.1 for name in METHODS), accuracy


@pytest.mark.parametrize(("name", "joined"), [("dann", 8), ("cdan", 16)])
def test_discriminator_has_the_width_that_was_asked_for(adapt, name, joined):
    discriminator = adapt(name, discriminator_width=32).term.discriminator
    assert [tuple(p.shape) for p in discriminator.parameters()] == [(32, joined), (32,), (3, 32), (3,)]
