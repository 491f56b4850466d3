"""Decoded once, whole or not at all; every draw depends on seed, epoch and index only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ct_builder import TILTED, Ct, phantom_hu
from torch.utils.data import DataLoader

from medvit.config import AugmentConfig
from medvit.data import cache as module
from medvit.data.cache import CaseDataset, FeatureCache, SliceCache, collate, default_cache_dir, epoch_order, read_case
from medvit.data.manifest import unlabelled_cases
from medvit.data.pipelines import prepare_slices, training_transform
from medvit.io import scan_folder
from medvit.records import Case, Preprocessing, ReasonCode

SETTINGS = Preprocessing(windows=("lung",), size=24, train_slices=4)


@pytest.fixture
def cases(tmp_path):
    for n, count in enumerate((3, 8, 12), 1):
        Ct(hu=phantom_hu(count), study=n, patient=f"p{n}").write(tmp_path / "ct" / f"{n}")
    return unlabelled_cases(scan_folder(tmp_path / "ct"))[0]


@pytest.fixture
def slices(tmp_path):
    return SliceCache(tmp_path / "cache", SETTINGS)


def again(cache):
    """As another process sees the same folder."""
    return SliceCache(cache.folder, cache.preprocessing)


def forbid_reading(monkeypatch):
    def read_files(*_, **__):
        raise AssertionError("the source was read")

    monkeypatch.setattr(module, "read_files", read_files)


def test_second_load_does_not_read_the_source(slices, cases, monkeypatch):
    first = slices.load(cases[1])
    expected = prepare_slices(module.read_case(cases[1]), slices.preprocessing)
    forbid_reading(monkeypatch)
    second = again(slices).load(cases[1])
    assert isinstance(second, np.memmap)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(second, expected)


def test_files_appear_whole_and_their_names_tell_nothing(slices, cases):
    slices.build(cases)
    names = [path.name for path in slices.folder.iterdir()]
    assert len(names) == 3
    assert all(len(name) == 68 and name.endswith(".npy") for name in names)


def test_a_write_that_fails_leaves_nothing_behind(slices, cases, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="disk full"):
        slices.load(cases[0])
    assert list(slices.folder.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: raw[:40], lambda raw: raw[:-10], lambda raw: b"x" * 500]
)
def test_damaged_file_is_made_again(slices, cases, damage):
    expected = np.array(slices.load(cases[0]))
    (path,) = slices.folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(again(slices).load(cases[0]), expected)
    np.testing.assert_array_equal(np.load(path), expected)


def test_changed_source_or_preparation_is_another_key(slices, cases, tmp_path):
    key = slices.key(cases[0])
    assert again(slices).key(cases[0]) == key
    assert SliceCache(tmp_path, SETTINGS.model_copy(update={"size": 25})).key(cases[0]) != key
    assert SliceCache(tmp_path, SETTINGS.model_copy(update={"orientation": "as_stored"})).key(cases[0]) != key
    assert SliceCache(tmp_path, SETTINGS, assume_hu=True).key(cases[0]) != key
    # windows come after the cache: changing them must not decode anew
    assert SliceCache(tmp_path, SETTINGS.model_copy(update={"windows": ("bone",)})).key(cases[0]) == key
    with (tmp_path / "ct" / cases[0].files[0]).open("ab") as stream:
        stream.write(b"\0\0")
    assert again(slices).key(cases[0]) != key


def test_failures_are_listed_and_the_rest_goes_on(slices, cases, tmp_path):
    Ct(study=7, grid=TILTED).write(tmp_path / "ct" / "7")
    tilted = replace(cases[0], case_id="t", files=tuple(f"7/IM{n:04d}.dcm" for n in range(12)))
    gone = Case(case_id="g", patient_id="p", group="p", root=str(tmp_path / "ct"), files=("9/missing.dcm",))
    seen = []
    hashes, failures = slices.build([tilted, gone, *cases], progress=lambda: seen.append(1))
    assert [failure.error.code for failure in failures] == [ReasonCode.GANTRY_TILT, ReasonCode.IO_ERROR]
    assert set(hashes) == {case.case_id for case in cases}
    assert len(seen) == 5


def test_hashes_tell_identical_pixels(slices, cases, tmp_path):
    Ct(hu=phantom_hu(3), study=8, patient="another").write(tmp_path / "ct" / "8")
    all_cases, _ = unlabelled_cases(scan_folder(tmp_path / "ct"))
    hashes, _ = slices.build(all_cases)
    assert len(hashes) == 4
    assert len(set(hashes.values())) == 3


def test_features_come_back_and_belong_to_one_backbone(slices, cases):
    features = FeatureCache(slices, "one")
    assert features.load(cases[0]) is None
    features.save(cases[0], np.ones((3, 5), np.float32))
    np.testing.assert_array_equal(features.load(cases[0]), np.ones((3, 5)))
    assert FeatureCache(slices, "two").load(cases[0]) is None


def test_cache_lives_under_the_run_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDVIT_CACHE", raising=False)
    assert default_cache_dir(tmp_path) == tmp_path / "cache"
    monkeypatch.setenv("MEDVIT_CACHE", str(tmp_path / "x"))
    assert default_cache_dir(tmp_path / "run") == tmp_path / "x"


def test_read_case_is_the_scan(cases):
    assert read_case(cases[2]).hu.shape == (12, 20, 24)


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(slices, cases):
    slices.build(cases)
    transform = training_transform(SETTINGS, AugmentConfig(), [0.5], [0.5])
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


def test_order_of_an_epoch_depends_on_seed_and_epoch():
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2) != epoch_order(50, 1, 3)
    assert epoch_order(50, 1, 2) != epoch_order(50, 2, 2)
