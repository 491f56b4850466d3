"""Parts of pictures through a ViT: against the whole picture, and against plain timm at that size."""

import pytest
import torch

from medvit.config import ModelConfig
from medvit.models.backbone import build_backbone
from medvit.models.crops import any_size, encode_patches
from medvit.records import UsageError

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


def build(name="vit_tiny_patch16_224", size=32, **options):
    torch.manual_seed(0)
    config = ModelConfig(name=name, weights="none", options={**TINY, **options} if name.startswith("vit") else {})
    return build_backbone(config, size=size, channels=3)[0].eval()


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}])
def test_small_crops_are_seen_as_by_a_model_of_their_size(options):
    backbone, other = build(**options), build(**options)
    assert other.set_size(16) == 16
    crops = torch.randn(2, 3, 16, 16)
    with any_size(backbone):
        seen = backbone(crops)
        assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 64)
    torch.testing.assert_close(seen, other(crops))


def test_afterwards_the_model_is_as_it_was():
    backbone = build()
    slices = torch.randn(2, 3, 32, 32)
    before, names = backbone(slices), [id(p) for p in backbone.parameters()]
    with pytest.raises(RuntimeError, match="stop"), any_size(backbone):
        raise RuntimeError("stop")
    assert torch.equal(backbone(slices), before)
    assert [id(p) for p in backbone.parameters()] == names
    with pytest.raises(AssertionError):
        backbone(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}])
def test_all_patches_are_the_picture(options):
    backbone = build(**options)
    slices = torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(encode_patches(backbone, slices, everything), backbone.tokens(slices))


def test_order_of_patches_is_that_of_the_tokens():
    backbone = build()
    slices = torch.randn(1, 3, 32, 32)
    order = torch.randperm(16)
    tokens = encode_patches(backbone, slices, order[None])
    torch.testing.assert_close(tokens[:, 1:], backbone.tokens(slices)[:, 1:][:, order])


def test_what_is_hidden_plays_no_part_and_positions_do():
    backbone, kept = build(), torch.tensor([[0, 5, 6]])
    slices = torch.randn(1, 3, 32, 32)
    seen = encode_patches(backbone, slices, kept)
    assert seen.shape == (1, 4, 32)
    changed = slices.clone()
    changed[:, :, 24:] = 9  # the last row of patches
    assert torch.equal(encode_patches(backbone, changed, kept), seen)
    same_everywhere = slices[:, :, :8, :8].repeat(1, 1, 4, 4)
    here, there = (encode_patches(backbone, same_everywhere, torch.tensor([[place]])) for place in (0, 7))
    assert not torch.allclose(here, there)


def test_models_without_plain_tokens_are_refused():
    backbone = build("test_resnet.r160_in1k")
    with pytest.raises(UsageError, match="plain ViT"), any_size(backbone):
        pass
