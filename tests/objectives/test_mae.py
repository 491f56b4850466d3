"""The masked autoencoder against plain loops."""

import math

import pretraining_step as step
import pytest
import torch
from torch import Tensor

from medvit.config import ModelConfig, ObjectiveConfig
from medvit.models.classifier import build_classifier
from medvit.objectives import Task, mae
from medvit.objectives.mae import Decoder, Mae, draw_mask, patch_losses, patchify, sine_positions, unpatchify
from medvit.records import UsageError


def test_patches_are_those_of_a_loop_in_the_order_of_the_backbones_tokens():
    pictures = torch.randn(2, 3, 16, 24)
    found = patchify(pictures, 8)
    assert found.shape == (2, 6, 192)
    for b in range(2):
        for number in range(6):
            row, column = divmod(number, 3)
            part = pictures[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            expected = [float(part[c, y, x]) for y in range(8) for x in range(8) for c in range(3)]
            assert found[b, number].tolist() == pytest.approx(expected)
    assert torch.equal(unpatchify(found, 8, (2, 3)), pictures)
    embed = step.make_objective("mae").float().classifier.backbone.model.patch_embed
    embed.set_input_size((16, 16))
    square = torch.randn(1, 3, 16, 16)
    kernel = embed.proj.weight.permute(2, 3, 1, 0).reshape(192, -1)
    torch.testing.assert_close(patchify(square, 8) @ kernel + embed.proj.bias, embed(square), rtol=1e-4, atol=1e-5)


def test_loss_is_a_plain_loop_over_pixels_of_hidden_patches():
    generator = torch.Generator().manual_seed(0)
    told, patches = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 4), (2, 5, 4)))
    patches = 3 * patches + 7
    hidden = torch.tensor([[4, 0, 2], [1, 3, 0]])
    expected = []
    for b in range(2):
        total = 0.0
        for m, number in enumerate(hidden[b].tolist()):
            pixels = patches[b, number].tolist()
            mean = sum(pixels) / 4
            variance = sum((p - mean) ** 2 for p in pixels) / 3
            target = [(p - mean) / math.sqrt(variance + 1e-6) for p in pixels]
            total += sum((t - p) ** 2 for t, p in zip(told[b, m].tolist(), target, strict=True))
        expected.append(total / 12)
    assert patch_losses(told, patches, hidden).tolist() == pytest.approx(expected)


def test_visible_patches_and_air_cost_nothing():
    patches, hidden = torch.randn(1, 4, 6), torch.tensor([[1, 2]])
    told = torch.randn(1, 2, 6)
    before = patch_losses(told, patches, hidden)
    patches[:, [0, 3]] = 99
    assert torch.equal(patch_losses(told, patches, hidden), before)
    air = torch.full((1, 4, 6), -3.0)
    assert patch_losses(torch.zeros(1, 2, 6), air, hidden) == 0


@pytest.mark.parametrize(("patches", "share", "hidden"), [(16, 0.75, 12), (196, 0.75, 147), (4, 0.99, 3), (4, 0.01, 1)])
def test_mask_hides_the_share_and_each_patch_is_on_one_side(patches, share, hidden):
    visible, masked = draw_mask(50, patches, share, torch.device("cpu"))
    assert masked.shape == (50, hidden)
    both = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(patches).expand(50, -1))
    assert len({tuple(row.tolist()) for row in masked.sort(dim=1).values}) > 1  # another one for each picture


def test_positions_differ_and_nearer_ones_are_more_alike():
    places = sine_positions(4, 5, 32)
    assert places.shape == (20, 32)
    assert torch.cdist(places, places).add(torch.eye(20)).min() > 0.1
    assert (places[0] - places[1]).norm() < (places[0] - places[3]).norm()
    assert (places[0] - places[5]).norm() < (places[0] - places[15]).norm()


def test_decoder_does_not_depend_on_the_order_of_patches():
    torch.manual_seed(0)
    decoder = Decoder(8, 32, 2, outputs=5, prefix=1)
    tokens, visible, hidden = torch.randn(1, 4, 8), torch.tensor([[2, 7, 3]]), torch.tensor([[0, 8, 5, 1, 4, 6]])
    told = decoder(tokens, visible, hidden, (3, 3))
    assert told.shape == (1, 6, 5)
    turned = decoder(tokens[:, [0, 3, 1, 2]], visible[:, [2, 0, 1]], hidden.flip(1), (3, 3))
    torch.testing.assert_close(turned, told.flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(told[:, 0], told[:, 1])


def masked_alike(monkeypatch) -> Tensor:
    """Every picture hides the same patches."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))

    def draw(count: int, patches: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
        return order[None, 12:].expand(count, -1), order[None, :12].expand(count, -1)

    monkeypatch.setattr(mae, "draw_mask", draw)
    return order[:12]


def test_what_is_hidden_does_not_reach_the_encoder(monkeypatch):
    """A decoder that was given what it is to tell would learn nothing."""
    hidden = masked_alike(monkeypatch)
    objective, batch = step.make_objective("mae"), step.make_batch()
    batch["input"].requires_grad_()
    seen: list[Tensor] = []
    objective.decoder.register_forward_hook(lambda _module, _given, told: seen.append(told))
    step.run(objective, batch)
    (gradient,) = torch.autograd.grad(seen[0].square().sum(), batch["input"])
    per_patch = patchify(gradient[batch["mask"]].flatten(0, 1), 8).abs().sum(dim=-1)
    assert (per_patch[:, hidden] == 0).all()
    assert (per_patch.sum(dim=1) > 0).all()


def test_gradient_does_not_depend_on_how_a_batch_is_cut_up(monkeypatch):
    masked_alike(monkeypatch)
    objective, whole = step.make_objective("mae"), step.make_batch()
    step.run(objective, whole)["loss"].backward()
    expected = step.gradients(objective)
    objective.zero_grad()
    parts = [step.make_batch(cases=cases) for cases in ([0, 3], [1, 2, 4])]
    totals = sum(objective.totals(part) for part in parts)
    for part in parts:
        objective({**part, "totals": totals}, 0.0)["loss"].backward()
    for name, gradient in step.gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name])


def test_it_learns_to_tell_what_is_hidden_from_what_is_not():
    """Stripes go on behind the mask."""
    torch.manual_seed(0)
    objective = step.make_objective("mae", mask_share=0.5)
    batch = step.make_batch()
    stripes = torch.linspace(0, 12.0, 32, dtype=torch.float64).sin()
    phase = torch.rand(5, 3, 2, 1, 1, 1, dtype=torch.float64)
    batch["input"] = (stripes * (1 + phase)).expand(5, 3, 2, 3, 32, 32).contiguous()
    optimizer = torch.optim.Adam((p for p in objective.parameters() if p.requires_grad), 2e-3)
    losses = []
    for _ in range(60):
        loss = step.run(objective, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1  # less than telling the mean of each patch
    assert losses[-1] < 0.7


def test_a_model_that_drops_patches_itself_is_refused():
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options={"depth": 1, "patch_drop_rate": 0.5})
    classifier = build_classifier(config, size=32, channels=3, classes=1)[0]
    with pytest.raises(UsageError, match="patch_drop_rate"):
        Mae(classifier, ObjectiveConfig(name="mae"), Task(()))


def test_models_without_plain_patches_are_refused():
    with pytest.raises(UsageError, match="plain ViT"):
        step.make_objective("mae", model="test_resnet.r160_in1k")
