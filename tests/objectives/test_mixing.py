"""Pictures are made so that each pixel tells whose it is and where it was: hundreds are the case, tens the slice."""

import pytest
import torch
from torch import Tensor

from medvit.config import ModelConfig, ObjectiveConfig
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES, Task
from medvit.objectives.mixing import Mixed, Mixing, cutmix, mixup
from medvit.records import UsageError

B, S, C, H, W = 6, 3, 2, 8, 20
SETTINGS = {"mixup": {"mixup": 0.5}, "cutmix": {"cutmix": 1.0}}
SEEDS = range(30)

Batch = dict[str, Tensor]


def pictures(slices: int = S) -> Tensor:
    case = 100.0 * torch.arange(1, B + 1)[:, None, None, None, None]
    number = 10.0 * torch.arange(slices)[:, None, None, None]
    return (case + number).expand(B, slices, C, H, W).contiguous()


@pytest.fixture
def batch() -> Batch:
    return {
        "input": pictures(),
        "mask": torch.ones(B, S, dtype=torch.bool),
        "label": torch.tensor([0, 1, 2, 0, 0, 1]),
        "index": torch.arange(B),
    }


def mix(batch: Batch, seed: int = 0, **settings: float) -> Mixed:
    torch.manual_seed(seed)
    return Mixing(ObjectiveConfig(**settings))(batch)


def box(mixed: Mixed, batch: Batch) -> Tensor:
    """Where case and partner were exchanged, (H, W); of the first case that has a partner."""
    moved = (mixed.partner != torch.arange(B)).nonzero()[0, 0]
    return mixed.values[moved, 0, 0] != batch["input"][moved, 0, 0]


@pytest.mark.parametrize("kind", SETTINGS)
def test_mixing_never_writes_into_the_batch_it_reads(kind, batch):
    before = {name: values.clone() for name, values in batch.items()}
    for seed in SEEDS:
        mix(batch, seed, **SETTINGS[kind])
    assert all(torch.equal(values, before[name]) for name, values in batch.items())


def test_mixup_is_a_weighted_mean_of_case_and_partner(batch):
    mixed = mix(batch, mixup=0.5)
    assert 0 < mixed.share < 1
    expected = mixed.share * batch["input"] + (1 - mixed.share) * batch["input"][mixed.partner]
    torch.testing.assert_close(mixed.values, expected)


def test_every_case_is_partner_once(batch):
    assert sorted(mix(batch, mixup=0.5).partner.tolist()) == list(range(B))


def test_cutmix_pastes_the_partners_pixels_as_they_were_before(batch):
    # were boxes written into the batch in turn, a case would get what its partner had got from a third
    for seed in SEEDS:
        mixed = mix(batch, seed, cutmix=1.0)
        where = box(mixed, batch)
        expected = torch.where(where, batch["input"][mixed.partner], batch["input"])
        assert torch.equal(mixed.values, expected)


def test_cutmix_has_one_box_in_all_slices_of_all_cases(batch):
    for seed in SEEDS:
        mixed = mix(batch, seed, cutmix=1.0)
        moved = mixed.partner != torch.arange(B)
        changed = (mixed.values != batch["input"])[moved]
        assert torch.equal(changed, box(mixed, batch).expand_as(changed))


def test_labels_follow_the_clipped_box(batch):
    clipped = 0
    for seed in SEEDS:
        mixed = mix(batch, seed, cutmix=1.0)
        where = box(mixed, batch)
        assert 1 - mixed.share == pytest.approx(where.float().mean().item())
        clipped += bool(where[0].any() or where[-1].any() or where[:, 0].any() or where[:, -1].any())
    assert clipped > len(SEEDS) / 3  # the case that matters did occur


def test_rows_and_columns_are_not_swapped():
    # of a picture 8 px high and 20 wide, boxes are wider than high and reach every column
    reached, shapes = torch.zeros(H, W, dtype=torch.bool), []
    for seed in range(200):
        torch.manual_seed(seed)
        pasted, share = cutmix(torch.zeros(H, W), torch.ones(H, W), 0.75)
        rows, columns = (int((pasted.sum(dim=axis) > 0).sum()) for axis in (1, 0))
        assert pasted.sum() == rows * columns == pytest.approx((1 - share) * H * W)
        assert rows <= H // 2
        assert columns <= W // 2
        shapes.append((rows, columns))
        reached |= pasted.bool()
    assert (H // 2, W // 2) in shapes
    assert reached.all()


def test_unclipped_box_has_the_area_that_was_drawn():
    torch.manual_seed(0)
    areas = {round(1 - cutmix(torch.zeros(64, 64), torch.ones(64, 64), 0.75)[1], 6) for _ in range(100)}
    assert max(areas) == 0.25
    assert cutmix(torch.zeros(4, 4), torch.ones(4, 4), 1.0)[1] == 1.0


@pytest.mark.parametrize("kind", SETTINGS)
def test_slice_without_a_partner_stays_as_it_is(kind, batch):
    batch["mask"][:3, 1:] = False
    batch["input"][:3, 1:] = 0
    for seed in SEEDS:
        mixed = mix(batch, seed, **SETTINGS[kind])
        for case, other in enumerate(mixed.partner.tolist()):
            for number in range(S):
                if not batch["mask"][case, number] or not batch["mask"][other, number]:
                    assert torch.equal(mixed.values[case, number], batch["input"][case, number])


def test_targets_are_shared_like_the_pictures(batch):
    mixed = mix(batch, 1, mixup=0.5)
    targets = mixed.targets(batch["label"], 3)
    for case, other in enumerate(mixed.partner.tolist()):
        expected = torch.zeros(3)
        expected[batch["label"][case]] += mixed.share
        expected[batch["label"][other]] += 1 - mixed.share
        torch.testing.assert_close(targets[case], expected)


@pytest.mark.parametrize("kind", SETTINGS)
def test_labelled_and_unlabelled_cases_are_each_mixed_among_themselves(kind, batch):
    batch["label"] = torch.tensor([0, -1, 1, -1, 0, 1])
    labelled = batch["label"] >= 0
    moved = False
    for seed in SEEDS:
        mixed = mix(batch, seed, **SETTINGS[kind])
        assert labelled[mixed.partner[labelled]].all()
        assert not labelled[mixed.partner[~labelled]].any()
        assert mixed.targets(batch["label"], 3)[~labelled].sum() == 0
        moved |= not torch.equal(mixed.values, batch["input"])
    assert moved


@pytest.mark.parametrize("kind", SETTINGS)
def test_sum_of_class_weights_is_not_changed_by_mixing(kind, batch):
    weights = torch.tensor([0.5, 1.0, 4.0])
    for seed in SEEDS:
        targets = mix(batch, seed, **SETTINGS[kind]).targets(batch["label"], 3)
        torch.testing.assert_close((targets * weights).sum(), weights[batch["label"]].sum())


def test_each_batch_has_one_of_two_kinds_half_each(batch):
    kinds = []
    for seed in range(200):
        mixed = mix(batch, seed, mixup=1.0, cutmix=1.0)
        only_whole_pixels = (mixed.values[:, 0] % 100 == 0).all()
        kinds.append(bool(only_whole_pixels))
    assert 70 < sum(kinds) < 130


@pytest.mark.parametrize("kind", SETTINGS)
def test_all_draws_are_from_the_global_generator(kind, batch):
    first, again, other = (mix(batch, seed, **SETTINGS[kind]) for seed in (3, 3, 4))
    assert torch.equal(first.values, again.values)
    assert first.share == again.share
    assert not torch.equal(first.values, other.values)


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.2, "cutmix": 1.0}])
def test_nothing_is_mixed_in_evaluation(settings, batch):
    mixing = Mixing(ObjectiveConfig(**settings)).eval()
    assert torch.equal(mixing(batch).values, batch["input"])
    assert torch.equal(mixing(batch).targets(batch["label"], 3), torch.eye(3)[batch["label"]])


def test_features_can_be_mixed_up(batch):
    features = {**batch, "input": torch.randn(B, S, 5)}
    mixed = mix(features, mixup=0.5)
    torch.testing.assert_close(mixed.values, mixup(features["input"], features["input"][mixed.partner], mixed.share)[0])


@pytest.mark.parametrize("settings", [{"cutmix": 1.0}, {"cutmix": 1.0, "mixup": 0.2}])
def test_cutmix_of_features_is_refused(settings, batch):
    with pytest.raises(UsageError, match=r"objective\.cutmix=0"):
        mix({**batch, "input": torch.randn(B, S, 5)}, **settings)


def test_single_case_is_its_own_partner(batch):
    alone = {name: values[:1] for name, values in batch.items()}
    mixed = mix(alone, mixup=0.5)
    assert torch.equal(mixed.values, alone["input"])
    torch.testing.assert_close(mixed.targets(alone["label"], 3), torch.eye(3)[:1])


def test_loss_is_of_the_mixed_pictures_and_targets():
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        weights="none",
        options={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16},
    )
    torch.manual_seed(0)
    classifier = build_classifier(config, size=32, channels=3, classes=2)[0]
    label = torch.tensor([0, 1, 1])
    batch = {"input": torch.randn(3, 2, 3, 32, 32), "mask": torch.ones(3, 2, dtype=torch.bool), "label": label}
    settings = ObjectiveConfig(cutmix=1.0)
    objective = OBJECTIVES["supervised"](classifier, settings, Task((30, 10)))
    batch["totals"] = objective.totals(batch)
    torch.manual_seed(1)
    ours = objective(batch, 0.0)["loss"]
    torch.manual_seed(1)
    mixed = Mixing(settings)(batch)
    logits = classifier(mixed.values, batch["mask"]).logits
    weights = torch.tensor([40 / 60, 40 / 20])
    theirs = torch.nn.functional.cross_entropy(logits, mixed.targets(label, 2), weight=weights, reduction="sum")
    torch.testing.assert_close(ours, theirs / weights[label].sum())
