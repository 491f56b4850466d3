import re

import pytest
import torch

from medvit.models.backbone import Backbone, build_backbone
from medvit.models.depth import block_levels
from medvit.records import EXIT_USAGE, UsageError

SMALL = {"embed_dim": 16, "num_heads": 2, "patch_size": 8}


def levels_of(tiny, name: str, **options) -> dict[str, int]:
    torch.manual_seed(0)
    return block_levels(build_backbone(tiny(name, options=options), size=32, channels=3)[0].model)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_blocks_are_counted_by_index_where_blocks_1_is_also_in_blocks_10_and_11(name, tiny):
    found = levels_of(tiny, name, depth=12, **SMALL)
    for parameter, level in found.items():
        block = re.match(r"blocks\.(\d+)\.", parameter)
        assert level == (int(block[1]) + 1 if block else 12 if parameter.startswith("norm.") else 0), parameter
    assert sum(level == 2 for level in found.values()) == sum(level == 11 for level in found.values()) > 0


def test_tokens_lie_below_all_blocks(tiny):
    assert levels_of(tiny, "deit_tiny_distilled_patch16_224", depth=2, **SMALL)["dist_token"] == 0
    assert levels_of(tiny, "vit_small_patch14_reg4_dinov2", depth=2, **SMALL)["reg_token"] == 0


def test_blocks_of_swin_count_through_its_stages(tiny):
    found = levels_of(tiny, "swin_tiny_patch4_window7_224", embed_dim=12)
    first = {0: 1, 1: 3, 2: 5, 3: 11}  # of stages with 2, 2, 6 and 2 blocks
    for parameter, level in found.items():
        block = re.match(r"layers\.(\d)\.blocks\.(\d)\.", parameter)
        if block:
            assert level == first[int(block[1])] + int(block[2]), parameter
    assert found["layers.2.downsample.norm.weight"] == 5
    assert (found["patch_embed.proj.weight"], found["norm.weight"]) == (0, 12)


def test_blocks_of_resnet_count_through_its_stages(tiny):
    found = levels_of(tiny, "resnet18")
    assert found["conv1.weight"] == found["bn1.bias"] == 0
    assert [found[f"layer{stage}.{block}.conv1.weight"] for stage in range(1, 5) for block in range(2)] == [
        *range(1, 9)
    ]


@pytest.mark.parametrize(
    ("name", "options", "beyond"),
    [
        ("vit_base_patch16_siglip_224", {"depth": 2, **SMALL}, "attn_pool.latent"),
        ("convnext_atto", {}, "head.norm.bias"),
    ],
)
def test_what_follows_the_last_block_counts_with_it_whatever_its_name(name, options, beyond, tiny):
    found = levels_of(tiny, name, **options)
    assert found[beyond] == max(level for parameter, level in found.items() if "blocks." in parameter)


def test_model_whose_blocks_nobody_tells_apart_is_refused(tiny):
    backbone: Backbone = build_backbone(tiny("poolformer_s12"), size=32, channels=3)[0]
    with pytest.raises(UsageError, match=r"trainable head or all.*layer_rates flat.*model.name") as caught:
        backbone.set_trainable("top", 1)
    assert caught.value.exit_code == EXIT_USAGE
