import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medvit.models.pooling import POOLINGS

WIDTH = 6


def pool(name: str, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return POOLINGS[name](WIDTH, 4)(features, mask)


def padded(features: Tensor, extra: int, garbage: float) -> tuple[Tensor, Tensor]:
    """The features with `extra` padded slices behind them, and the mask."""
    filler = torch.full((len(features), extra, WIDTH), garbage)
    mask = torch.zeros(len(features), features.shape[1] + extra, dtype=torch.bool)
    mask[:, : features.shape[1]] = True
    return torch.cat([features, filler], dim=1), mask


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", POOLINGS)
@given(extra=st.integers(1, 5), garbage=st.floats(-1e4, 1e4, width=32))
@settings(max_examples=25, deadline=None)
def test_padded_slices_never_count(name, extra, garbage):
    values = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    alone, _ = pool(name, values, torch.ones(2, 3, dtype=torch.bool))
    with_padding, weights = pool(name, *padded(values, extra, garbage))
    torch.testing.assert_close(with_padding, alone, atol=1e-6, rtol=1e-6)
    assert (weights[:, 3:] == 0).all()


@pytest.mark.parametrize("name", POOLINGS)
def test_weights_sum_to_one_over_unmasked_slices(name, features):
    mask = torch.tensor([[True, True, False], [False, True, False]])
    _, weights = pool(name, features, mask)
    torch.testing.assert_close((weights * mask).sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", POOLINGS)
def test_one_slice_is_its_own_summary(name, features):
    pooled, weights = pool(name, features[:, :1], torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(pooled, features[:, 0])
    assert (weights == 1).all()


@pytest.mark.parametrize("name", POOLINGS)
def test_padded_slices_get_no_gradient(name, features):
    values, mask = padded(features, 2, 5.0)
    values.requires_grad_()
    pooled, _ = pool(name, values, mask)
    pooled.square().sum().backward()
    assert (values.grad[:, 3:] == 0).all()
    assert (values.grad[:, :3] != 0).any()


def test_mean_is_over_unmasked_slices(features):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    pooled, _ = pool("mean", features, mask)
    torch.testing.assert_close(pooled, torch.stack([features[0, :2].mean(dim=0), features[1].mean(dim=0)]))


def test_maximum_is_over_unmasked_slices(features):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    pooled, _ = pool("max", features, mask)
    torch.testing.assert_close(pooled, torch.stack([features[0, [0, 2]].amax(dim=0), features[1].amax(dim=0)]))


def test_attention_is_the_published_formula(features):
    torch.manual_seed(0)
    pooling = POOLINGS["attention"](WIDTH, 4)
    pooled, weights = pooling(features, torch.ones(2, 3, dtype=torch.bool))
    for study in range(2):  # Ilse et al. 2018, equation 9, slice by slice
        scores = torch.stack(
            [pooling.score(torch.tanh(pooling.value(h)) * torch.sigmoid(pooling.gate(h)))[0] for h in features[study]]
        )
        expected = torch.exp(scores) / torch.exp(scores).sum()
        torch.testing.assert_close(weights[study], expected)
        torch.testing.assert_close(pooled[study], expected @ features[study])
