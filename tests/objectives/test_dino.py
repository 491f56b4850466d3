"""DINO against a plain loop and lightly; the centre, the teacher and the head by hand."""

import math
import subprocess
import sys

import pretraining_step as step
import pytest
import torch
from torch import Tensor

from medvit.objectives.dino import DinoHead, dino_losses, warm_up
from medvit.objectives.selfsupervised import slices_of


def outputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of a teacher for two views of five slices, of a student for four, and a centre."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 7), (4, 5, 7), (7,)))
    taught, said, center = made
    return taught, said, center


def loop(taught: Tensor, said: Tensor, center: Tensor, teacher: float, student: float) -> list[float]:
    losses = []
    for n in range(taught.shape[1]):
        terms = []
        for t in range(len(taught)):
            for v in range(len(said)):
                if t == v:
                    continue
                powers = [math.exp(float(a - c) / teacher) for a, c in zip(taught[t, n], center, strict=True)]
                sums = sum(math.exp(float(b) / student) for b in said[v, n])
                logs = [float(b) / student - math.log(sums) for b in said[v, n]]
                terms.append(-sum(p / sum(powers) * q for p, q in zip(powers, logs, strict=True)))
        losses.append(sum(terms) / len(terms))
    return losses


def test_loss_is_a_plain_loop_over_pairs_of_different_views():
    found = dino_losses(*outputs(), 0.5, 0.9)
    assert found.tolist() == pytest.approx(loop(*outputs(), 0.5, 0.9))


LIGHTLY = """
import sys, torch
from lightly.loss import DINOLoss
taught, said, center = torch.load(sys.argv[1])
loss = DINOLoss(output_dim=7, teacher_temp=0.05, student_temp=0.1, center_momentum=0.9).double()
loss.center.copy_(center)
value = loss(list(taught), list(said), teacher_temp=0.05)
torch.save((value, loss.center.flatten()), sys.argv[2])
"""


def test_loss_and_centre_are_lightlys(tmp_path):
    taught, said, center = outputs()
    torch.save((taught, said, center), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", LIGHTLY, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    value, moved = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(dino_losses(taught, said, center, 0.05, 0.1).mean(), value.double(), rtol=1e-6, atol=0)
    objective = step.make_objective("dino", prototypes=7)
    objective.center.copy_(center)
    objective._collect(taught)
    objective.after_step()
    torch.testing.assert_close(objective.center, moved.double(), rtol=1e-6, atol=1e-7)


def test_objective_is_the_loss_of_its_networks_over_all_crops():
    objective, batch = step.make_objective("dino", temperature=0.1), step.make_batch(local=2)
    objective.center.copy_(torch.linspace(-0.1, 0.1, 12))
    slices, student = slices_of(batch), objective.classifier.backbone
    small = step.make_objective("dino").classifier.backbone
    small.set_size(16)
    with torch.no_grad():
        seen = [student(one) for one in slices.views.unbind(1)]
        seen += [small(one) for one in slices.local.unbind(1)]
        # statistics are of all crops together
        said = objective.head(torch.cat(seen)).view(4, -1, 12)
        taught = objective.slow_head(torch.cat([objective.slow_backbone(one) for one in slices.views.unbind(1)]))
    expected = loop(taught.view(2, -1, 12), said, objective.center, warm_up(0.04, 0.07, 0.3, step.PROGRESS), 0.1)
    found = step.run(objective, batch)
    assert float(found["loss"].detach()) == pytest.approx(sum(expected) / len(expected))
    assert all(value.ndim == 0 and not value.requires_grad for key, value in found.items() if key != "loss")


def test_the_centre_is_a_running_mean_over_all_micro_batches_of_a_step():
    objective = step.make_objective("dino", center_momentum=0.8)
    parts = [step.make_batch(cases=cases) for cases in ([0, 1], [2, 3, 4])]
    with torch.no_grad():
        views = [slices_of(part).views.flatten(0, 1) for part in parts]
        mean = torch.cat([objective.slow_head(objective.slow_backbone(one)) for one in views]).mean(dim=0)
    for part in parts:
        step.run(objective, part)
    assert (objective.center == 0).all()  # not before the step
    objective.after_step()
    torch.testing.assert_close(objective.center, 0.2 * mean)
    assert (objective.collected == 0).all()


def test_prototypes_and_what_meets_them_have_length_one():
    head = DinoHead(6, 8, 5)
    features = torch.randn(4, 6)
    found = head(features)
    assert (found.abs() <= 1 + 1e-6).all()
    with torch.no_grad():
        head.prototypes.weight.mul_(torch.tensor([[2.0], [0.5], [3.0], [1.0], [9.0]]))
    torch.testing.assert_close(head(features), found)


def test_teacher_temperature_rises_and_stays():
    found = [warm_up(0.04, 0.07, 0.3, progress) for progress in (0, 0.15, 0.3, 1)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert warm_up(0.04, 0.07, 0.0, 0.0) == 0.07


def test_no_gradient_reaches_the_teacher_and_it_is_what_is_kept():
    objective = step.make_objective("dino", momentum=0.5)
    step.run(objective, step.make_batch(local=1))["loss"].backward()
    slow = [*objective.slow_backbone.parameters(), *objective.slow_head.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in slow)
    assert objective.encoder() is objective.slow_backbone
    before = objective.slow_head.prototypes.weight.clone()
    with torch.no_grad():
        objective.head.prototypes.weight.add_(1)
    objective.after_step()
    moved = objective.slow_head.prototypes.weight - before
    share = 0.5 * (math.cos(math.pi * step.PROGRESS) + 1) / 2
    torch.testing.assert_close(moved, torch.full_like(moved, share))


def test_the_teacher_sees_large_crops_only_and_rests():
    objective = step.make_objective("dino", drop=0.5)
    seen: list[torch.Size] = []
    objective.slow_backbone.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-2:]))
    step.run(objective, step.make_batch(local=2))
    assert seen == [(32, 32)]
    assert not any(module.training for module in objective.slow_backbone.modules())
    assert objective.set_size(16) == objective.slow_backbone.size == 16
