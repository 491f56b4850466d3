"""Every draw depends on seed, epoch and index only."""

from functools import partial

import numpy as np
import pytest
import torch
from ct_builder import Ct, phantom_hu
from torch.utils.data import DataLoader

from medvit.config import AugmentConfig
from medvit.data.cache import SliceCache
from medvit.data.dataset import CaseDataset, collate
from medvit.data.manifest import unlabelled_cases
from medvit.data.pipelines import training_transform
from medvit.io import scan_folder
from medvit.records import Preprocessing

SETTINGS = Preprocessing(windows=("lung",), size=24, train_slices=4)


@pytest.fixture
def cases(tmp_path):
    for n, count in enumerate((3, 8, 12), 1):
        Ct(hu=phantom_hu(count), study=n, patient=f"p{n}").write(tmp_path / "ct" / f"{n}")
    return unlabelled_cases(scan_folder(tmp_path / "ct"))[0]


@pytest.fixture
def dataset(cases, tmp_path):
    slices = SliceCache(tmp_path / "cache", SETTINGS)
    slices.build(cases)
    transform = partial(training_transform, SETTINGS, AugmentConfig(), [0.5], [0.5])
    return CaseDataset(cases, slices.load, np.array([0, 1, 0]), slices=4, transform=transform, seed=3)


def same(a, b):
    return torch.equal(a["input"], b["input"])


def test_a_draw_depends_on_seed_epoch_and_index_only(dataset):
    forward = [dataset[i] for i in (0, 1, 2)]
    backward = [dataset[i] for i in (2, 1, 0)][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    dataset.epoch = 1
    assert not any(same(a, dataset[i]) for i, a in enumerate(forward))
    dataset.epoch, dataset.seed = 0, 4
    assert not any(same(a, dataset[i]) for i, a in enumerate(forward))


@pytest.mark.filterwarnings("ignore")
def test_draws_do_not_depend_on_workers(dataset):
    alone = [dataset[i] for i in range(3)]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  the global state must not matter
    for batch in DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=collate):
        i = int(batch["index"][0])
        assert torch.equal(batch["input"][0], alone[i]["input"])


def test_draws_do_not_depend_on_global_random_state(dataset):
    one = dataset[1]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  the global state must not matter
    assert same(one, dataset[1])


def test_samples_are_plain_float_tensors_with_label_and_index(dataset):
    sample = dataset[1]
    assert type(sample["input"]) is torch.Tensor
    assert (sample["input"].shape, sample["input"].dtype) == ((4, 1, 24, 24), torch.float32)
    assert (sample["label"], sample["index"]) == (1, 1)


def test_features_pass_without_a_transform(cases):
    features = {case.case_id: np.full((6, 5), n, np.float32) for n, case in enumerate(cases)}
    dataset = CaseDataset(
        cases, lambda case: features[case.case_id], np.zeros(3, int), slices=4, transform=None, seed=0
    )
    assert torch.equal(dataset[2]["input"], torch.full((4, 5), 2.0))


def test_collate_pads_short_scans_and_masks_the_padding(dataset):
    batch = collate([dataset[0], dataset[1]])
    assert batch["input"].shape == (2, 4, 1, 24, 24)
    assert batch["mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert (batch["input"][0, 3] == 0).all()
    assert torch.equal(batch["input"][0, :3], dataset[0]["input"])
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([0, 1], [0, 1])


def test_a_stage_of_another_size_reaches_workers(dataset):
    for size in (16, 24):
        dataset.size = size
        batches = DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=2)
        assert [batch["input"].shape[-2:] for batch in batches] == [(size, size)]


def test_transform_is_that_of_the_size(cases):
    class Sized:
        def __init__(self, size):
            self.size = size

        def set_random_state(self, seed):
            pass

        def __call__(self, slices):
            assert slices.shape[-1] == self.size
            return torch.full((len(slices), 1, self.size, self.size), float(self.size))

    def load(_case):
        return np.zeros((4, 24, 24), np.int16)

    dataset = CaseDataset(cases, load, np.zeros(3, int), slices=2, transform=Sized, seed=0)
    for size in (16, 24, 16):
        dataset.size = size
        assert (dataset[0]["input"] == size).all()
