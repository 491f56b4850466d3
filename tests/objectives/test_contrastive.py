"""SimCLR and MoCo v3 against plain loops, lightly, and what they must not learn from."""

import math
import subprocess
import sys
from pathlib import Path

import pretraining_step as step
import pytest
import torch
from torch import Tensor, multiprocessing

from medvit.objectives.contrastive import info_nce, nt_xent
from medvit.objectives.selfsupervised import cosine_momentum, follow, mlp, slices_of
from medvit.records import UsageError


def embeddings(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, 6, generator=generator, dtype=torch.float64)
    return first.requires_grad_(), second.requires_grad_()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(((a @ b) / a.norm() / b.norm()).detach())


def loop_nt_xent(first: Tensor, second: Tensor, patients: list[int], temperature: float) -> list[float]:
    """Equation 1 of SimCLR word by word, without pairs of one patient."""
    rows, owners, count = [*first, *second], patients * 2, len(first)
    losses = []
    for i, row in enumerate(rows):
        partner = (i + count) % (2 * count)
        total = 0.0
        for k, other in enumerate(rows):
            if k == partner or (k != i and owners[k] != owners[i]):
                total += math.exp(cosine(row, other) / temperature)
        losses.append(-math.log(math.exp(cosine(row, rows[partner]) / temperature) / total))
    return losses


def loop_info_nce(queries: Tensor, keys: Tensor, patients: list[int], temperature: float) -> list[float]:
    losses = []
    for i, query in enumerate(queries):
        powers = {
            j: math.exp(cosine(query, key) / temperature)
            for j, key in enumerate(keys)
            if j == i or patients[j] != patients[i]
        }
        losses.append(-math.log(powers[i] / sum(powers.values())))
    return losses


# the losses


@pytest.mark.parametrize("patients", [[0, 1, 2, 3, 4], [0, 0, 1, 2, 1], [0, 0, 0, 0, 1]])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_a_double_loop(patients, temperature):
    first, second = embeddings(5)
    found = nt_xent(first, second, torch.tensor(patients), temperature)
    assert found.losses.tolist() == pytest.approx(loop_nt_xent(first, second, patients, temperature))


@pytest.mark.parametrize("patients", [[0, 1, 2, 3, 4], [0, 0, 1, 2, 1]])
def test_info_nce_is_a_double_loop(patients):
    queries, keys = embeddings(5)
    found = info_nce(queries, keys, torch.tensor(patients), 0.2)
    assert found.losses.tolist() == pytest.approx(loop_info_nce(queries, keys, patients, 0.2))


LIGHTLY = """
import sys, torch
from lightly.loss import NTXentLoss
first, second = torch.load(sys.argv[1])
torch.save([float(NTXentLoss(temperature=t)(first, second)) for t in (0.1, 0.5)], sys.argv[2])
"""


def test_nt_xent_of_different_patients_is_lightlys(tmp_path):
    first, second = embeddings(7)
    torch.save((first.detach(), second.detach()), tmp_path / "in.pt")
    # a process of its own: lightly brings torchvision's and its own warnings on import
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIGHTLY, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")], check=True
    )
    ours = [float(nt_xent(first, second, torch.arange(7), t).losses.mean().detach()) for t in (0.1, 0.5)]
    assert ours == pytest.approx(torch.load(tmp_path / "out.pt"), rel=1e-6)


# negatives


def test_slices_of_one_patient_do_not_push_each_other_apart():
    """The mistake: a slice a few millimetres on, of the same person, counted as a negative."""
    first, second = embeddings(4)
    patients = torch.tensor([0, 0, 1, 2])
    for found in (nt_xent(first, second, patients, 0.1), info_nce(first, second, patients, 0.1)):
        of_first_slice = found.losses[0]
        towards_first, towards_second = torch.autograd.grad(of_first_slice, (first, second), retain_graph=True)
        assert (towards_second[1] == 0).all()  # the other slice of patient 0
        assert (towards_first[1] == 0).all()
        assert (towards_second[2] != 0).any()  # another patient
        assert (towards_second[0] != 0).any()  # the other view of the slice itself


def test_another_slice_of_the_same_patient_may_be_anything():
    first, second = embeddings(4)
    patients = torch.tensor([0, 0, 1, 2])
    twin = first.detach().clone()
    twin[1] = twin[0]  # as near as can be
    twin_second = second.detach().clone()
    twin_second[1] = twin_second[0]
    for loss in (nt_xent, info_nce):
        before, after = loss(first, second, patients, 0.1), loss(twin, twin_second, patients, 0.1)
        torch.testing.assert_close(after.losses[0], before.losses[0].detach())


def test_pairs_that_are_left_out_are_counted():
    first, second = embeddings(4)
    patients = torch.tensor([0, 0, 1, 2])
    both, one_way = nt_xent(first, second, patients, 0.1), info_nce(first, second, patients, 0.1)
    assert (both.pairs, one_way.pairs) == (8, 2)  # 2 slices x 2 views, each with 2 views of the other; 2 queries
    assert both.negatives == (4 * 4 + 4 * 6) / 8
    assert one_way.negatives == (2 * 2 + 2 * 3) / 4
    apart = torch.arange(4)
    assert nt_xent(first, second, apart, 0.1).pairs == info_nce(first, second, apart, 0.1).pairs == 0


@pytest.mark.parametrize("name", ["simclr", "mocov3"])
def test_objectives_tell_how_many_pairs_were_left_out(name):
    result = step.run(step.make_objective(name), step.make_batch())
    # patient 0 has 3 + 1 slices, the others 2, 3 and 3: ordered pairs of different slices of one patient
    same = 4 * 3 + 2 * 1 + 3 * 2 + 3 * 2
    assert result["masked_pairs"] == same * (4 if name == "simclr" else 2)
    assert all(value.ndim == 0 and not value.requires_grad for key, value in result.items() if key != "loss")


def test_a_batch_of_one_patient_teaches_nothing():
    first, second = embeddings(3)
    found = nt_xent(first, second, torch.zeros(3, dtype=torch.long), 0.1)
    assert found.negatives == 0
    assert (found.losses == 0).all()


# MoCo v3


def test_mocov3_is_the_symmetrised_loss_of_its_heads_times_two_tau():
    objective, batch = step.make_objective("mocov3", temperature=0.3), step.make_batch()
    slices = slices_of(batch)
    encode = objective.classifier.backbone
    queries = [objective.predictor(objective.projector(encode(slices.views[:, v]))) for v in (0, 1)]
    keys = [objective.slow_projector(objective.slow_backbone(slices.views[:, v])) for v in (0, 1)]
    patients = slices.patients.tolist()
    expected = 0.0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        losses = loop_info_nce(q, k, patients, 0.3)
        expected += 2 * 0.3 * sum(losses) / len(losses)
    assert float(step.run(objective, batch)["loss"].detach()) == pytest.approx(expected)


def test_the_slow_copy_moves_as_by_hand_and_no_gradient_trains_it():
    objective = step.make_objective("mocov3", momentum=0.9)
    before = [p.detach().clone() for p in objective.slow_backbone.parameters()]
    result = step.run(objective, step.make_batch(), 0.25)
    result["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.slow_backbone.parameters())
    with torch.no_grad():
        for parameter in objective.classifier.backbone.parameters():
            parameter.add_(0.1)
    objective.after_step()
    momentum = 1 - 0.1 * (math.cos(math.pi * 0.25) + 1) / 2
    assert float(result["momentum"]) == pytest.approx(momentum)
    fast = objective.classifier.backbone.parameters()
    for own, was, theirs in zip(objective.slow_backbone.parameters(), before, fast, strict=True):
        torch.testing.assert_close(own, momentum * was + (1 - momentum) * theirs.detach())


def test_momentum_goes_to_one():
    assert [cosine_momentum(0.99, p) for p in (0, 0.5, 1)] == pytest.approx([0.99, 0.995, 1])
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = slow.weight.detach().clone()
    follow(slow, fast, 1.0)
    assert torch.equal(slow.weight, before)


def test_the_slow_copy_rests_while_the_objective_trains_and_follows_its_size():
    objective = step.make_objective("mocov3", drop=0.5).train()
    assert not any(module.training for module in objective.slow_backbone.modules())
    assert objective.classifier.backbone.model.blocks[0].training
    assert objective.slow_projector.training  # statistics of the batch, as those of the queries
    assert objective.set_size(16) == 16
    assert objective.slow_backbone.size == objective.classifier.backbone.size == 16
    batch = step.make_batch()
    batch["input"] = batch["input"][..., :16, :16]
    assert torch.isfinite(step.run(objective, batch)["loss"])
    assert not any(p.requires_grad for p in objective.slow_backbone.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_patch_projection_stays_as_it_is_if_asked_for(frozen):
    objective = step.make_objective("mocov3", freeze_patches=frozen)
    objective.set_trainable("all", 3)
    step.run(objective, step.make_batch())["loss"].backward()
    grad = objective.classifier.backbone.model.patch_embed.proj.weight.grad
    assert (grad is None) == frozen


# all of them


@pytest.mark.parametrize("name", step.METHODS)
def test_every_parameter_that_is_trained_gets_a_gradient(name):
    """Or several processes would wait for it for ever."""
    objective = step.make_objective(name)
    objective.set_trainable("all", 3)
    step.run(objective, step.make_batch(local=step.local_of(name)))["loss"].backward()
    trained = {key for key, p in objective.named_parameters() if p.requires_grad}
    assert step.gradients(objective).keys() == trained
    assert not any(key.startswith(("classifier.norm", "classifier.pooling", "classifier.head")) for key in trained)


@pytest.mark.parametrize("name", step.METHODS)
def test_padding_plays_no_part(name):
    objective, batch = step.make_objective(name), step.make_batch(local=step.local_of(name))
    torch.manual_seed(0)
    before = step.run(objective, batch)["loss"]
    batch["input"][~batch["mask"]] = 99
    torch.manual_seed(0)
    assert torch.equal(step.run(objective, batch)["loss"], before)


@pytest.mark.parametrize("name", ["mocov3", "dino"])
def test_a_slow_copy_that_would_never_know_its_statistics_is_refused(name):
    """It rests, and what follows the weights does not follow running statistics."""
    with pytest.raises(UsageError, match="ResNet has BatchNorm"):
        step.make_objective(name, model="test_resnet.r160_in1k", freeze_patches=False)
    step.make_objective("simclr", model="test_resnet.r160_in1k")


def test_patches_that_are_none_cannot_be_held_back():
    with pytest.raises(UsageError, match="freeze_patches"):
        step.make_objective("mocov3", model="test_convnext.r160_in1k")
    step.make_objective("mocov3", model="test_convnext.r160_in1k", freeze_patches=False)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, step.Step]:
    folder: Path = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(step.step_together, args=(2, str(folder)), nprocs=2)
    return {name: torch.load(folder / f"{name}.pt") for name in step.METHODS}


@pytest.mark.parametrize("name", step.METHODS)
def test_two_processes_have_the_loss_and_the_gradient_of_one_with_the_joined_batch(together, name):
    (ours, our_buffers, our_loss), (expected, buffers, loss) = together[name], step.step_alone(name)
    assert our_loss == pytest.approx(loss, rel=1e-9)
    assert ours.keys() == expected.keys()
    largest = float(max(gradient.abs().max() for gradient in expected.values()))
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-6, atol=1e-9 * largest, msg=key)
    for key, buffer in buffers.items():
        torch.testing.assert_close(our_buffers[key], buffer, msg=key)


def test_heads_have_the_layers_of_the_papers():
    layers = [type(layer).__name__ for layer in mlp((4, 8, 8, 2), last_norm=True)]
    assert layers == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert not mlp((4, 8, 2), last_norm=True)[-1].affine
    assert [type(layer).__name__ for layer in mlp((4, 8, 2), last_norm=False)] == [*layers[:3], "Linear"]
