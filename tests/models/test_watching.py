import numpy as np
import pytest
import timm
import torch

from medvit.config import ModelConfig
from medvit.models.backbone import Backbone, build_backbone
from medvit.models.watching import watchable, watched_attention
from medvit.records import UsageError

SLICES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone(tiny) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(tiny(), size=32, channels=3)[0].eval()


def by_hand(backbone: Backbone) -> list[torch.Tensor]:
    """Softmax attention of each block from its own weights, in plain steps."""
    model = backbone.model
    tokens = model._pos_embed(model.patch_embed(SLICES))
    found = []
    for block in model.blocks:
        inside = block.norm1(tokens)
        q, k, _ = block.attn.qkv(inside).reshape(3, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        found.append((q @ k.transpose(-2, -1) / 4).softmax(dim=-1))
        tokens = block(tokens)
    return found


def test_is_that_of_every_block_and_head(backbone):
    with torch.inference_mode(), watched_attention(backbone) as seen:
        backbone(SLICES)
    assert len(seen) == 2
    for own, expected in zip(seen, by_hand(backbone), strict=True):
        assert own.shape == (3, 2, 17, 17)
        torch.testing.assert_close(own, expected)


def test_watching_changes_no_feature(backbone):
    with torch.inference_mode():
        plain = backbone(SLICES)
        with watched_attention(backbone):
            watched = backbone(SLICES)
    torch.testing.assert_close(plain, watched, atol=1e-6, rtol=1e-5)


def test_afterwards_the_model_is_as_it_was_whatever_happened(backbone):
    def state() -> list[object]:
        return [(m.fused_attn, len(m.attn_drop._forward_hooks)) for m in (b.attn for b in backbone.model.blocks)]

    backbone.set_gradient_checkpointing(True)
    before = state()
    with watched_attention(backbone):
        assert state() != before
    assert state() == before
    with pytest.raises(RuntimeError, match="stop"), watched_attention(backbone):
        raise RuntimeError("stop")
    assert state() == before
    assert backbone.model.grad_checkpointing


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_every_vit_is_watchable_whatever_its_prefix(name):
    model = timm.create_model(name, num_classes=0, img_size=56, depth=2) if "deit" in name else None
    model = model or timm.create_model(name, num_classes=0, img_size=56, patch_size=14, depth=2)
    size = model.patch_embed.img_size[0]
    backbone = Backbone(model.eval(), ModelConfig(), size)
    assert watchable(backbone)
    with torch.inference_mode(), watched_attention(backbone) as seen:
        backbone(torch.zeros(1, 3, size, size))
    rows, columns = backbone.grid
    assert [one.shape[-1] for one in seen] == [backbone.prefix_tokens + rows * columns] * 2
    np.testing.assert_allclose(seen[-1].sum(dim=-1), 1, rtol=1e-5)


def test_what_has_no_such_attention_is_told():
    backbone = build_backbone(ModelConfig(name="resnet18", weights="none"), size=32, channels=3)[0]
    assert not watchable(backbone)
    with pytest.raises(UsageError, match=r"evaluation\.attention=null"), watched_attention(backbone):
        pass
