"""Views of slices: what they show, what is drawn, and that a draw depends on its place alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medvit.config import AugmentConfig, ViewsConfig
from medvit.data.dataset import collate
from medvit.data.intensity import apply_windows
from medvit.data.slice_views import SliceView, ViewDataset
from medvit.records import AIR_HU, Case, Preprocessing

SETTINGS = Preprocessing(windows=("lung", "bone"), size=24, train_slices=4)
STILL = AugmentConfig(rotate_deg=0, shift=0, zoom=0, noise_hu=0, blur_px=0, window_jitter=0)
WHOLE = ViewsConfig(crop=(1.0, 1.0), neighbours=0)
PLAIN = ((0.0, 0.0), (1.0, 1.0))


def volume_of(case: Case) -> np.ndarray:
    """Each slice tells its number: 10 HU apart, with a ramp across."""
    count = int(case.files[0])
    ramp = np.linspace(-50, 50, 24)
    return (10 * np.arange(count)[:, None, None] + ramp[None, None] + ramp[None, :, None]).astype(np.int16)


def make_dataset(views: ViewsConfig, augment: AugmentConfig | None = None, **settings) -> ViewDataset:
    cases = [
        Case(case_id=f"c{i}", patient_id=f"p{i}", group=group, root="", files=(str(count),))
        for i, (group, count) in enumerate([("b", 3), ("a", 12), ("b", 9)])
    ]
    prep = SETTINGS.model_copy(update=settings)
    return ViewDataset(cases, volume_of, prep, augment, views, *PLAIN, seed=3)


def test_shapes_and_the_patient_of_a_case():
    dataset = make_dataset(ViewsConfig(local=3, local_size=8), AugmentConfig())
    sample = dataset[1]
    assert sample["input"].shape == (4, 2, 2, 24, 24)
    assert sample["local"].shape == (4, 3, 2, 8, 8)
    assert sample["input"].dtype == torch.float32
    dataset.size = 16
    assert dataset[1]["input"].shape == (4, 2, 2, 16, 16)
    assert [dataset[i]["patient"] for i in range(3)] == [1, 0, 1]  # by group: whoever may be the same person is


def test_batches_pad_views_and_small_crops_alike():
    dataset = make_dataset(ViewsConfig(local=1, local_size=8))
    batch = collate([dataset[i] for i in range(3)])
    assert batch["input"].shape == (3, 4, 2, 2, 24, 24)
    assert batch["local"].shape == (3, 4, 1, 2, 8, 8)
    assert batch["mask"].sum(dim=1).tolist() == [3, 4, 4]
    assert (batch["input"][0, 3] == 0).all()
    assert batch["patient"].tolist() == [1, 0, 1]


def test_without_variation_a_view_is_the_slice_as_the_model_sees_it():
    sample = make_dataset(WHOLE, STILL, train_slices=12)[1]
    expected = apply_windows(volume_of(make_dataset(WHOLE).cases[1]), SETTINGS.windows).swapaxes(0, 1)
    for view in sample["input"].unbind(1):
        np.testing.assert_allclose(view.numpy(), expected, atol=1e-6)


def test_normalisation_follows_the_windows():
    plane = np.zeros((8, 8), np.float32)
    view = SliceView(SETTINGS, None, (0.5, 0.1), (0.25, 2.0), (1.0, 1.0), 8)
    seen = view(plane, np.random.RandomState(0))
    expected = (apply_windows(plane, SETTINGS.windows)[:, 0, 0] - (0.5, 0.1)) / (0.25, 2.0)
    np.testing.assert_allclose(seen[:, 3, 3], expected, rtol=1e-6)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("input", "local"))


def test_a_draw_depends_on_seed_epoch_and_index_only():
    dataset = make_dataset(ViewsConfig(local=1, local_size=8), AugmentConfig())
    forward = [dataset[i] for i in (0, 1, 2)]
    backward = [dataset[i] for i in (2, 1, 0)][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    dataset.epoch = 1
    assert not any(same(a, dataset[i]) for i, a in enumerate(forward))
    dataset.epoch, dataset.seed = 0, 4
    assert not any(same(a, dataset[i]) for i, a in enumerate(forward))


@pytest.mark.filterwarnings("ignore")
def test_draws_do_not_depend_on_workers():
    dataset = make_dataset(ViewsConfig(local=1, local_size=8), AugmentConfig())
    alone = [dataset[i] for i in range(3)]
    np.random.seed(99)  # noqa: NPY002  the global state must not matter
    for batch in DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=collate):
        assert torch.equal(batch["input"][0], alone[int(batch["index"][0])]["input"])


def test_views_are_independent_of_each_other_and_of_their_number():
    two, three = (make_dataset(ViewsConfig(count=n), AugmentConfig())[1]["input"] for n in (2, 3))
    assert torch.equal(two, three[:, :2])
    assert not any(torch.equal(three[:, a], three[:, b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not torch.equal(two[0], two[1])  # slices of one view are varied each on its own


def slices_shown(dataset: ViewDataset, index: int) -> np.ndarray:
    """(S, V) number of the slice that each view is of, from its mean HU."""
    values = dataset[index]["input"][:, :, 1].numpy()  # bone: wide enough for all of them
    level, width = 500, 1800
    return np.round(((values.mean(axis=(2, 3)) - 0.5) * width + level) / 10).astype(int)


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_other_views_are_of_neighbours_no_farther_than_asked_for(distance):
    dataset = make_dataset(replace_views(neighbours=distance), STILL)
    away = []
    for dataset.epoch in range(30):
        shown = slices_shown(dataset, 2)
        assert ((shown >= 0) & (shown < 9)).all()
        away.append(shown[:, 1] - shown[:, 0])
    found = set(np.concatenate(away).tolist())
    assert found == set(range(-distance, distance + 1))


def replace_views(**settings) -> ViewsConfig:
    return WHOLE.model_copy(update=settings)


def test_crops_have_the_area_that_was_asked_for_and_lie_anywhere():
    ramp = np.broadcast_to(np.arange(100, dtype=np.float32), (100, 100))
    view = SliceView(replace_windows(), None, (0.0,), (1.0,), (0.25, 0.25), 50)
    seen = [view(ramp, np.random.RandomState(seed))[0] * 100 for seed in range(20)]
    widths = [one[0, -1] - one[0, 0] for one in seen]
    np.testing.assert_allclose(widths, 49, atol=0.1)  # half the side
    begins = [one[0, 0] for one in seen]
    assert min(begins) < 10
    assert max(begins) > 40


def replace_windows() -> Preprocessing:
    return Preprocessing(windows=((50, 100),), size=50)


@pytest.mark.parametrize("flip", [False, True])
def test_left_stays_left_unless_flips_are_allowed(flip):
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32) * 2, (40, 40))
    view = SliceView(replace_windows(), STILL.model_copy(update={"flip": flip}), (0.0,), (1.0,), (0.5, 1.0), 40)
    rising = [bool(np.diff(view(ramp, np.random.RandomState(seed))[0].mean(axis=0)).mean() > 0) for seed in range(30)]
    assert all(rising) != flip


@pytest.mark.parametrize(
    ("part", "value"), [("noise_hu", 30.0), ("blur_px", 2.0), ("window_jitter", 0.2), ("zoom", 0.3), ("shift", 0.2)]
)
def test_each_part_of_the_augmentation_varies_something(part, value):
    plane = np.random.default_rng(0).normal(0, 100, (40, 40)).astype(np.float32)
    still = SliceView(SETTINGS, STILL, *PLAIN, (1.0, 1.0), 40)
    moved = replace(still, augment=STILL.model_copy(update={part: value}))
    seen = [(one(plane, np.random.RandomState(seed))) for seed in range(8) for one in (still, moved)]
    assert any(not np.allclose(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_what_lies_outside_is_air():
    plane = np.full((40, 40), 40, np.float32)
    shifted = AugmentConfig(rotate_deg=0, shift=0.3, zoom=0, noise_hu=0, blur_px=0, window_jitter=0)
    prep = Preprocessing(windows=((-480, 2000),), size=40)
    seen = SliceView(prep, shifted, (0.0,), (1.0,), (1.0, 1.0), 40)(plane, np.random.RandomState(1))
    lowest = (seen.min() - 0.5) * 2000 - 480
    assert lowest == pytest.approx(AIR_HU, abs=1)


def test_areas_out_of_order_are_refused():
    with pytest.raises(ValueError, match="local_crop"):
        ViewsConfig(local_crop=(0.4, 0.1))
