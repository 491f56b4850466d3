"""Token dropout and patch scaling, against plain timm, numpy and finite differences."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from medvit.models.backbone import Backbone, build_backbone
from medvit.models.compression import (
    NONE,
    Compression,
    check_compression,
    compressed,
    compressed_features,
    drop_tokens,
    embed,
    kept_tokens,
    resize_kernel,
)
from medvit.records import EXIT_USAGE, UsageError

VIT = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
REGISTERS_NO_CLS = "vit_medium_patch16_reg4_gap_256"
NO_CLS = "vit_medium_patch16_gap_240"
ALL = [VIT, DISTILLED, REGISTERS, REGISTERS_NO_CLS, NO_CLS]

BOTH = Compression(keep=0.5, patch=16)


def picture(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def build(tiny):
    """A backbone of patches of 8 px for slices of 32 px, in training mode."""

    def make(name: str = VIT, size: int = 32, **options: object) -> Backbone:
        torch.manual_seed(0)
        config = tiny(name)
        config = config.model_copy(update={"options": config.options | options})
        backbone = build_backbone(config, size=size, channels=3)[0]
        randomise_positions(backbone)
        return backbone.train()

    return make


def randomise_positions(backbone: Backbone) -> None:
    """Freshly made ones are too small to show."""
    if getattr(backbone.model, "pos_embed", None) is not None:
        nn.init.normal_(backbone.model.pos_embed)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("compression", [NONE, Compression(), Compression(1.0, 8)])
def test_nothing_left_out_is_plain_timm_to_the_bit(name, compression, build):
    backbone = build(name)
    expected = backbone.model.forward_features(picture())
    backbone.compression = compression
    assert torch.equal(backbone.tokens(picture()), expected)
    assert torch.equal(compressed_features(backbone.model, picture(), compression), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_plain_timms_too(checkpointing, build):
    backbone = build()
    backbone.set_gradient_checkpointing(checkpointing)
    found = []
    for features in (backbone.model.forward_features, lambda x: compressed_features(backbone.model, x, NONE)):
        backbone.zero_grad()
        features(picture()).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in backbone.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_the_training_mode_is_compressed(build):
    backbone = build()
    backbone.compression = BOTH
    assert backbone.tokens(picture()).shape == (2, 1 + 2, 32)
    backbone.eval()
    assert torch.equal(backbone.tokens(picture()), backbone.model.forward_features(picture()))


def test_a_frozen_backbone_is_not_compressed(build):
    """Its features may have been cached, and are those that are served."""
    backbone = build()
    backbone.set_trainable("head", 1)
    backbone.train()
    backbone.compression = BOTH
    assert torch.equal(backbone.tokens(picture()), backbone.model.forward_features(picture()))


def test_compression_ends_with_its_context_whatever_happens(build):
    backbone = build()

    def fail() -> None:
        with compressed(backbone, BOTH):
            assert backbone.compression == BOTH
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (backbone.compression, backbone.training) == (NONE, True)


def test_a_teacher_is_compressed_only_where_that_is_said(build):
    teacher = build().eval()
    for resting, tokens in ((False, 16), (True, 2)):
        with compressed(teacher, BOTH, resting=resting):
            assert teacher.tokens(picture()).shape[1] == 1 + tokens
            assert not any(module.training for module in teacher.model.modules())  # dropout goes on resting
        assert not teacher.training


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_as_many_tokens_as_asked_for_and_every_prefix_token(name, keep, build):
    backbone = build(name)
    with compressed(backbone, Compression(keep)):
        tokens = backbone.tokens(picture())
    assert tokens.shape[1] == backbone.prefix_tokens + max(1, int(keep * 16))
    assert backbone(picture()).shape == (2, backbone.width)


@pytest.mark.parametrize(
    ("keep", "tokens", "kept"), [(0.29, 100, 29), (0.7, 10, 7), (0.99, 100, 99), (1, 7, 7), (1e-6, 256, 1), (0.5, 1, 1)]
)
def test_counts_are_exact(keep, tokens, kept):
    assert kept_tokens(keep, tokens) == kept


def numbered(count: int, prefix: int = 3, patches: int = 20) -> Tensor:
    """Tokens (B, prefix + patches, 1) whose value is their place."""
    return torch.arange(prefix + patches, dtype=torch.float32).view(1, -1, 1).repeat(count, 1, 1)


def test_prefix_tokens_stay_in_place_and_no_patch_comes_twice():
    places = drop_tokens(numbered(500), 0.4, prefix=3)[..., 0]
    assert places.shape == (500, 3 + 8)
    assert torch.equal(places[:, :3], torch.tensor([0.0, 1, 2]).expand(500, -1))
    assert all(len(set(row)) == 8 for row in places[:, 3:].tolist())
    assert places[:, 3:].min() >= 3


def test_every_patch_is_as_likely_as_any_other():
    torch.manual_seed(0)
    places = drop_tokens(numbered(4000), 0.4, prefix=3)[:, 3:, 0].long()
    shares = torch.bincount(places.flatten() - 3, minlength=20) / 4000
    assert (shares - 0.4).abs().max() < 4.5 * (0.4 * 0.6 / 4000) ** 0.5


def test_samples_and_calls_lose_different_patches_and_a_seed_brings_them_back():
    torch.manual_seed(0)
    first, second = (drop_tokens(numbered(8), 0.5, prefix=3) for _ in range(2))
    subsets = {tuple(sorted(row)) for view in (first, second) for row in view[..., 0].tolist()}
    assert len(subsets) == 16
    torch.manual_seed(0)
    assert torch.equal(drop_tokens(numbered(8), 0.5, prefix=3), first)


def test_tokens_that_are_left_know_where_they_were(build):
    """Dropped before the position embedding they would all be in the first places."""
    backbone = build()
    whole = embed(backbone.model, picture(), None)
    kept = drop_tokens(whole, 0.5, 1)
    for sample, row in zip(whole, kept, strict=True):
        assert torch.equal(row[0], sample[0])
        assert all((sample[1:] == token).all(dim=1).sum() == 1 for token in row[1:])


def resize_matrix(own: int, patch: int) -> np.ndarray:
    """(patch², own²) of bilinear resizing, written down pixel by pixel: half-pixel centres, edges repeated."""
    line = np.zeros((patch, own))
    for new in range(patch):
        place = (new + 0.5) * own / patch - 0.5
        low = int(np.floor(place))
        for old, share in ((low, 1 - (place - low)), (low + 1, place - low)):
            line[new, min(max(old, 0), own - 1)] += share
    return np.kron(line, line)


@pytest.mark.parametrize(("own", "patch"), [(4, 8), (8, 12), (8, 16), (14, 28), (16, 40)])
def test_the_resized_kernel_is_numpys_pseudo_inverse(own, patch):
    kernel = torch.randn(5, 3, own, own, generator=torch.Generator().manual_seed(0))
    inverse = np.linalg.pinv(resize_matrix(own, patch).T)  # (patch², own²)
    expected = np.einsum("po,dco->dcp", inverse, kernel.flatten(2).numpy()).reshape(5, 3, patch, patch)
    np.testing.assert_allclose(resize_kernel(kernel, patch).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("own", "patch"), [(4, 8), (8, 12), (8, 16), (14, 28)])
def test_a_resized_kernel_says_of_an_enlarged_patch_what_it_said_of_the_patch(own, patch):
    generator = torch.Generator().manual_seed(1)
    kernel = torch.randn(6, 1, own, own, generator=generator) / own
    patches = torch.randn(9, 1, own, own, generator=generator)
    enlarged = nn.functional.interpolate(patches, size=(patch, patch), mode="bilinear")
    before = torch.einsum("dcij,ncij->nd", kernel, patches)
    after = torch.einsum("dcij,ncij->nd", resize_kernel(kernel, patch), enlarged)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    resized = nn.functional.interpolate(kernel, size=(patch, patch), mode="bilinear")
    naive = torch.einsum("dcij,ncij->nd", resized, enlarged)
    assert (naive - before).abs().max() > 0.1  # a kernel enlarged like a picture would not do


@pytest.mark.parametrize("name", ALL)
def test_enlarged_pictures_give_the_tokens_of_the_picture(name, build):
    """Twice the picture, twice the patch: the same grid and positions, and the same to say of each (even) patch."""
    backbone = build(name)
    blocks = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    small, large = (nn.functional.interpolate(blocks, scale_factor=factor, mode="nearest") for factor in (8, 16))
    expected = embed(backbone.model, small, None)
    torch.testing.assert_close(embed(backbone.model, large, 16), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_positions_are_those_of_a_model_resized_by_timm(name, build):
    backbone = build(name)
    tokens = embed(backbone.model, picture(), 16)
    backbone.model.patch_embed.proj.weight.data = resize_kernel(backbone.model.patch_embed.proj.weight, 16).detach()
    backbone.model.patch_embed.proj.stride = (16, 16)
    backbone.model.patch_embed.patch_size = (16, 16)
    backbone.model.patch_embed.img_size = (64, 64)  # of which the present grid of 4 x 4 is
    backbone.model.set_input_size(img_size=(32, 32))
    torch.testing.assert_close(tokens, backbone.model._pos_embed(backbone.model.patch_embed(picture())))


def test_models_of_any_input_size_are_compressed_at_that_size(build):
    backbone = build(dynamic_img_size=True)
    expected = backbone.model.forward_features(picture())
    assert torch.equal(compressed_features(backbone.model, picture(), NONE), expected)
    with compressed(backbone, Compression(keep=0.5, patch=16)):
        assert backbone.tokens(picture(size=48)).shape[1] == 1 + 4
    with compressed(backbone, Compression(keep=0.5)):
        assert backbone.tokens(picture(size=48)).shape[1] == 1 + 18


def test_size_changes_are_followed(build):
    backbone = build()
    backbone.set_size(64)
    with compressed(backbone, Compression(patch=16)):
        assert backbone.tokens(picture(size=64)).shape[1] == 1 + 16


def test_gradients_reach_the_stored_kernel_and_all_positions(build):
    backbone = build().double()
    slices, kernel = picture().double(), backbone.model.patch_embed.proj.weight
    weight = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss() -> Tensor:
        return (weight * compressed_features(backbone.model, slices, Compression(patch=16))).sum()

    loss().backward()
    assert (backbone.model.pos_embed.grad[0].abs().sum(dim=1) > 0).all()
    for place in [(0, 0, 0, 0), (3, 1, 7, 2), (31, 2, 4, 4)]:
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                kernel[place] += step
                values.append(loss())
                kernel[place] -= step
        assert kernel.grad[place].item() == pytest.approx(float(values[0] - values[1]) / 2e-4, rel=1e-4)


def test_a_first_call_without_gradients_does_not_spoil_the_second():
    kernel = torch.randn(2, 1, 5, 5, requires_grad=True)
    with torch.inference_mode():
        resize_kernel(kernel, 11)
    resize_kernel(kernel, 11).sum().backward()
    assert kernel.grad is not None


def test_resizing_is_always_from_the_stored_kernel(build):
    backbone = build()
    before = backbone.model.patch_embed.proj.weight.clone()
    for patch in (16, 32, 16):
        with compressed(backbone, Compression(patch=patch)):
            last = backbone.tokens(picture())
    assert torch.equal(backbone.model.patch_embed.proj.weight, before)
    assert torch.equal(last, compressed_features(backbone.model, picture(), Compression(patch=16)))
    assert backbone.state_dict().keys() == build().state_dict().keys()


def test_a_compiled_backbone_sees_every_change_of_compression(build):
    backbone, expected = build(), []
    given = [NONE, Compression(patch=16), Compression(0.5), Compression(patch=32), Compression(patch=16), NONE]
    for compiled in (False, True):
        if compiled:
            backbone.compile(backend="eager")
        for number, compression in enumerate(given):
            torch.manual_seed(0)
            with compressed(backbone, compression):
                features = backbone(picture())
            if compiled:
                torch.testing.assert_close(features, expected[number])
            else:
                expected.append(features)


def test_half_precision_resizes_in_full(build):
    backbone = build()
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_kernel(backbone.model.patch_embed.proj.weight, 16)
        with compressed(backbone, BOTH):
            assert backbone.tokens(picture()).isfinite().all()
    assert torch.equal(found, resize_kernel(backbone.model.patch_embed.proj.weight, 16))


@pytest.mark.parametrize("settings", [{"keep": 0.0}, {"keep": 1.1}, {"keep": float("nan")}, {"patch": 0}])
def test_a_record_that_means_nothing_is_refused(settings):
    with pytest.raises(ValueError, match="got"):
        Compression(**settings)


@pytest.mark.parametrize(
    ("patch", "words"), [(4, "smaller than the model's own of 8 px"), (12, "Patches of 8, 16, 32 px do")]
)
def test_a_patch_that_does_not_fit_is_refused(patch, words, build):
    backbone = build()
    with compressed(backbone, Compression(patch=patch)), pytest.raises(UsageError, match=words) as caught:
        backbone.tokens(picture())
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_models_without_tokens_are_refused(name):
    model = timm.create_model(name, num_classes=0)
    check_compression(model, NONE, 224)
    for compression in (Compression(keep=0.5), Compression(patch=56)):
        with pytest.raises(UsageError, match="has no patch tokens"):
            check_compression(model, compression, 224)
