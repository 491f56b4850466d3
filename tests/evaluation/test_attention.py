import numpy as np
import pytest
import torch

from medvit.evaluation import attention
from medvit.evaluation.attention import FLOWS
from medvit.records import UsageError
from tests.evaluation.models import ARCHITECTURE, frozen, random_slices, small_model


def relevance_maps(encoder, slices, target, at):
    return attention.relevance_maps(encoder, slices, encoder.encode(slices), target, at)


RNG = np.random.default_rng(0)
ATTENTION = [torch.tensor(RNG.dirichlet(np.ones(5), (2, 3, 5))).float() for _ in range(3)]  # (B, heads, N, N) per block
GRADIENTS = [torch.tensor(RNG.normal(size=(2, 3, 5, 5))).float() for _ in range(3)]


def product(factors: list[np.ndarray]) -> np.ndarray:
    result = np.eye(5)
    for factor in factors:
        result = factor @ result
    return result


def test_rollout_is_the_product_of_blocks_over_all_heads():
    flow = FLOWS["rollout"](ATTENTION, [])
    for b in range(2):
        factors = []
        for block in ATTENTION:
            step = sum(block[b, head].numpy() for head in range(3)) / 3 + np.eye(5)
            factors.append(step / step.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(flow[b], product(factors), atol=1e-6)
    np.testing.assert_allclose(flow.sum(dim=-1), 1, atol=1e-6)


def test_gradient_rollout_follows_only_what_speaks_for_the_class():
    flow = FLOWS["gradient"](ATTENTION, GRADIENTS)
    for b in range(2):
        factors = []
        for block, slope in zip(ATTENTION, GRADIENTS, strict=True):
            step = np.zeros((5, 5))
            for head in range(3):
                for i in range(5):
                    for j in range(5):
                        step[i, j] += max(0, float(block[b, head, i, j] * slope[b, head, i, j])) / 3
            factors.append(np.eye(5) + step)
        np.testing.assert_allclose(flow[b], product(factors) - np.eye(5), atol=1e-6)


def test_the_last_attention_is_the_mean_over_heads():
    np.testing.assert_allclose(FLOWS["attention"](ATTENTION, []), ATTENTION[-1].mean(dim=1))


def test_maps_have_the_shape_of_the_grid_and_are_not_negative():
    maps = relevance_maps(small_model().encoder, random_slices(1), 1, [2, 0])
    assert list(maps) == ["attention", "rollout", "gradient"]
    for one in maps.values():
        assert one.shape == (2, 4, 4)
        assert (one >= 0).all()
        assert one.max() > 0


def test_slices_are_explained_as_in_their_study_and_in_the_order_asked_for():
    encoder, slices = small_model().encoder, random_slices(1)
    both, one = (relevance_maps(encoder, slices, 1, at)["gradient"] for at in ([2, 0], [0]))
    np.testing.assert_allclose(both[1], one[0], rtol=1e-4)


def test_the_gradient_is_that_of_the_class():
    encoder, slices = small_model().encoder, random_slices(1)
    maps = [relevance_maps(encoder, slices, target, [0]) for target in (0, 1)]
    np.testing.assert_array_equal(maps[0]["rollout"], maps[1]["rollout"])  # knows no class
    assert not np.allclose(maps[0]["gradient"], maps[1]["gradient"])


def test_a_head_that_ignores_the_slice_makes_nothing_relevant():
    model = small_model()
    with torch.no_grad():
        model.encoder.classifier.head[-1].weight.zero_()
    assert (relevance_maps(model.encoder, random_slices(1), 1, [0])["gradient"] == 0).all()


def test_looking_leaves_no_trace_in_the_model():
    model = small_model()
    classifier = model.encoder.classifier.train()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    relevance_maps(model.encoder, random_slices(1), 1, [0])
    assert classifier.training
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_dropout_plays_no_part_and_a_frozen_backbone_is_explained_alike():
    model = small_model()
    model.encoder.classifier.train()
    plain = relevance_maps(model.encoder, random_slices(1), 1, [0, 1])
    again = relevance_maps(frozen(model).encoder, random_slices(1), 1, [0, 1])
    for name, one in plain.items():
        np.testing.assert_array_equal(one, again[name])


def test_a_model_without_a_class_token_is_read_at_its_patches():
    options = {**ARCHITECTURE.options, "class_token": False, "global_pool": "avg"}
    model = small_model(architecture=ARCHITECTURE.model_copy(update={"options": options}))
    maps = relevance_maps(model.encoder, random_slices(1), 1, [0])
    assert maps["gradient"].shape == (1, 4, 4)
    assert maps["gradient"].max() > 0


def test_convolutions_are_refused_in_words():
    plain = ARCHITECTURE.model_copy(update={"name": "resnet10t", "options": {}})
    with pytest.raises(UsageError, match="attention"):
        relevance_maps(small_model(architecture=plain).encoder, random_slices(1), 1, [0])
