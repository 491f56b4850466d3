"""FGSM and PGD against small models: the product's own numbers, its gradient, and a model that is left as it was."""

import dataclasses

import numpy as np
import pytest
import torch

from medvit.config import ModelConfig
from medvit.evaluation.attacks import ATTACKS, fgsm, input_gradient, logits_of, pgd
from medvit.inference import Encoder
from medvit.models.classifier import build_classifier
from medvit.records import ClaheSettings, Preprocessing, UsageError

PREPROCESSING = Preprocessing(windows=("soft_tissue", (-600.0, 1500.0)), size=32, predict_slices=5)
MEAN, STD = (0.4, 0.3), (0.2, 0.25)


def encoder(pooling: str = "attention", batch_slices: int = 32) -> Encoder:
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        weights="none",
        options={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "proj_drop_rate": 0.2},
        pooling=pooling,
        dropout=0.3,
        drop_path=0.2,
    )
    torch.manual_seed(0)
    classifier, _ = build_classifier(config, size=32, channels=2, classes=2)
    torch.nn.init.normal_(classifier.head[1].weight)
    return Encoder(classifier, PREPROCESSING, MEAN, STD, batch_slices)


def slices(count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(40, 150, (count, 32, 32)).astype(np.int16)


def tensor(hu: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(hu.astype(np.float32))


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def loss(model: Encoder, hu: np.ndarray, truth: int) -> float:
    """As the product predicts."""
    logits = model.studies([model.encode(hu)])[0].logits
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits)[None], torch.tensor([truth])))


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
@pytest.mark.parametrize("batch_slices", [2, 32])
def test_the_attacked_model_is_the_one_that_predicts(pooling, batch_slices):
    model, hu = encoder(pooling, batch_slices), slices(5)
    model.classifier.eval()
    expected = model.studies([model.encode(hu)])[0].logits
    np.testing.assert_allclose(logits_of(model, tensor(hu)).detach().numpy(), expected, atol=1e-4)


def test_gradient_equals_finite_differences():
    model, hu = encoder(), torch.as_tensor(slices().astype(np.float64))
    model.classifier.double().eval()
    found = input_gradient(model, hu, 1)

    def at(moved: torch.Tensor) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(logits_of(model, moved)[None], torch.tensor([1])))

    for place in np.random.default_rng(3).integers(0, hu.numel(), 8):
        step = torch.zeros_like(hu).view(-1)
        step[place] = 1e-3
        step = step.view_as(hu)
        assert found.view(-1)[place] == pytest.approx((at(hu + step) - at(hu - step)) / 2e-3, rel=1e-3, abs=1e-9)


def test_chunks_give_the_same_gradient_and_bound_what_is_held_at_once():
    whole, chunked = encoder(), encoder(batch_slices=2)
    at_once = []
    chunked.classifier.backbone.register_forward_pre_hook(lambda _module, inputs: at_once.append(len(inputs[0])))
    hu = tensor(slices(5))
    np.testing.assert_allclose(input_gradient(chunked, hu, 0), input_gradient(whole, hu, 0), rtol=1e-3, atol=1e-7)
    assert at_once == [2, 2, 1, 1, 2, 2]  # once more, from the last


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("epsilon", [1, 5])
def test_changes_are_whole_and_no_larger_than_said(name, epsilon):
    hu = slices()
    hu[0, 0, :6] = (-1024, -1023, 3071, 3070, -2000, 9000)
    changed = ATTACKS[name].apply(encoder(), hu, 1, epsilon, rng())
    assert changed.dtype == np.int16
    assert np.abs(changed.astype(int) - hu).max() == epsilon  # far more than a clamp to 0..1 would leave
    assert (changed >= np.minimum(hu, -1024)).all()
    assert (changed <= np.maximum(hu, 3071)).all()


@pytest.mark.parametrize("truth", [0, 1])
def test_attacks_make_the_truth_less_likely_and_pgd_at_least_as_much(truth):
    model, hu = encoder(), slices()
    clean = loss(model, hu, truth)
    one_step, ten_steps = fgsm(model, hu, truth, 5), pgd(model, hu, truth, 5, rng())
    chance = hu + np.random.default_rng(2).choice([-5, 5], hu.shape).astype(np.int16)
    assert loss(model, one_step, truth) > clean + 5 * abs(loss(model, chance, truth) - clean)
    assert loss(model, ten_steps, truth) > 0.999 * loss(model, one_step, truth)


def test_the_start_of_pgd_is_random_and_seeded():
    model, hu = encoder(), slices()
    first, again = (pgd(model, hu, 1, 5, np.random.default_rng(7), steps=2) for _ in range(2))
    other = pgd(model, hu, 1, 5, np.random.default_rng(8), steps=2)
    assert (first == again).all()
    assert (first != other).any()


def state(model: Encoder) -> tuple[list, list, list]:
    classifier = model.classifier
    return (
        [module.training for module in classifier.modules()],
        [parameter.requires_grad for parameter in classifier.parameters()],
        [value.clone() for value in classifier.state_dict().values()],
    )


def unchanged(before: tuple[list, list, list], after: tuple[list, list, list]) -> bool:
    return before[:2] == after[:2] and all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_weights_get_no_gradient_and_the_model_stays_as_it_was(name):
    model = encoder(batch_slices=2)
    model.classifier.set_trainable("top", 1)
    model.classifier.train()
    before = state(model)
    ATTACKS[name].apply(model, slices(), 1, 2, rng())
    assert all(parameter.grad is None for parameter in model.classifier.parameters())
    assert unchanged(before, state(model))


def test_the_model_stays_as_it_was_after_an_error():
    model = encoder()
    model.classifier.train()
    before = state(model)
    with pytest.raises(IndexError):
        fgsm(model, slices(), 7, 2)  # no such class
    assert unchanged(before, state(model))


def test_dropout_is_off_while_the_gradient_is_taken():
    model, hu = encoder(), slices()
    model.classifier.train()
    noisy = [input_gradient(model, tensor(hu), 1) for _ in range(2)]
    model.classifier.eval()
    assert torch.equal(*noisy)
    assert torch.equal(noisy[0], input_gradient(model, tensor(hu), 1))


@pytest.mark.parametrize("name", ATTACKS)
def test_clahe_has_no_gradient(name):
    prep = PREPROCESSING.model_copy(update={"clahe": ClaheSettings()})
    with pytest.raises(UsageError, match="no gradient"):
        ATTACKS[name].apply(dataclasses.replace(encoder(), preprocessing=prep), slices(), 1, 2, rng())
