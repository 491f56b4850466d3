import pytest
import torch
from torch import Tensor, nn

from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.pooling import POOLINGS

RANDOM_TRUNK = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "proj_drop_rate": 0.5}


@pytest.fixture
def build(tiny):
    def make(*arguments, **settings) -> CtClassifier:
        torch.manual_seed(0)
        return build_classifier(tiny(*arguments, **settings), size=32, channels=3, classes=3)[0]

    return make


@pytest.fixture
def slices() -> Tensor:
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def all_of(slices: Tensor) -> Tensor:
    return torch.ones(slices.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_slices_never_change_the_logits(pooling, build, slices):
    classifier = build(pooling=pooling).eval()
    with_garbage = torch.cat([slices, torch.full_like(slices, 1e4)], dim=1)
    mask = torch.cat([all_of(slices), ~all_of(slices)], dim=1)
    expected = classifier(slices, all_of(slices)).logits
    torch.testing.assert_close(classifier(with_garbage, mask).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_features_never_change_the_logits(pooling, build):
    classifier = build(pooling=pooling).eval()
    features = torch.randn(2, 4, classifier.backbone.width, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    expected = classifier(features[:, :2], mask[:, :2]).logits
    torch.testing.assert_close(classifier(features, mask).logits, expected, atol=1e-6, rtol=1e-6)


def test_padded_slices_get_no_gradient(build, slices):
    classifier = build()
    slices.requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    classifier(slices, mask).logits.square().sum().backward()
    assert (slices.grad[0, 2] == 0).all()
    assert (slices.grad[0, 1] != 0).any()


def test_features_give_the_logits_of_their_slices(build, slices):
    classifier = build().eval()
    features = classifier.backbone(slices.flatten(0, 1)).unflatten(0, slices.shape[:2])
    expected = classifier(slices, all_of(slices)).logits
    torch.testing.assert_close(classifier(features, all_of(slices)).logits, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_batch_of_one_scan_of_one_slice_trains(name, build, slices):
    classifier = build(name).train()
    classifier.freeze_backbone(True)
    classifier(slices[:1, :1], torch.ones(1, 1, dtype=torch.bool)).logits.sum().backward()
    assert classifier.head[1].weight.grad.isfinite().all()


def test_frozen_backbone_gets_no_gradient(build, slices):
    classifier = build().train()
    classifier.freeze_backbone(True)
    classifier(slices, all_of(slices)).logits.square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in classifier.backbone.parameters())
    assert all(p.grad is not None for p in (*classifier.head.parameters(), *classifier.pooling.parameters()))


def test_frozen_backbone_stays_in_evaluation_mode_inside_what_is_trained(build):
    classifier = build()
    classifier.freeze_backbone(True)
    nn.Sequential(classifier).train()
    assert not any(module.training for module in classifier.backbone.modules())
    assert classifier.head.training


def test_frozen_backbone_has_no_dropout_or_drop_path(build, slices):
    classifier = build(options=RANDOM_TRUNK, drop_path=0.5)
    classifier.freeze_backbone(True)
    classifier.train()
    first, second = (classifier(slices, all_of(slices)).logits for _ in range(2))
    assert torch.equal(first, second)


def test_thawed_backbone_has_dropout_and_drop_path(build, slices):
    classifier = build(options=RANDOM_TRUNK, drop_path=0.5).train()
    first, second = (classifier(slices, all_of(slices)).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_frozen_batch_norm_keeps_its_statistics(build, slices):
    classifier = build("resnet10t")
    classifier.freeze_backbone(True)
    classifier.train()
    before = classifier.backbone.model.bn1.running_mean.clone()
    classifier(slices, all_of(slices))
    assert torch.equal(classifier.backbone.model.bn1.running_mean, before)


def test_freezing_during_training_takes_effect_at_once(build):
    classifier = build().train()
    classifier.freeze_backbone(True)
    assert not classifier.backbone.training


def test_thawing_brings_gradient_and_training_mode_back(build, slices):
    classifier = build().train()
    classifier.freeze_backbone(True)
    classifier.freeze_backbone(False)
    classifier(slices, all_of(slices)).logits.square().sum().backward()
    assert classifier.backbone.training
    assert all(p.grad is not None for p in classifier.backbone.parameters())


def test_parameter_counts_tell_trainable_from_all(build):
    classifier = build()
    trainable, total = classifier.parameter_counts()
    classifier.freeze_backbone(True)
    trunk = sum(p.numel() for p in classifier.backbone.parameters())
    assert trainable == total
    assert classifier.parameter_counts() == (total - trunk, total)
