"""Decoded once, by whom- and wherever; named by content; damage is repaired and told."""

import hashlib
import logging
import multiprocessing
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from ct_builder import Ct, phantom_hu
from torch.utils.data import DataLoader

from medvit.data import cache as module
from medvit.data import sources
from medvit.data.cache import FeatureCache, SliceCache, read_case
from medvit.data.dataset import CaseDataset, collate
from medvit.data.manifest import unlabelled_cases
from medvit.data.pipelines import prepare_slices
from medvit.data.places import default_cache_dir
from medvit.data.store import CacheFullError
from medvit.io import scan_folder
from medvit.records import Case, MedvitError, Preprocessing, ReasonCode, ScanError

SETTINGS = Preprocessing(windows=("lung",), size=24, train_slices=4)
SPAWN = multiprocessing.get_context("spawn")


def cases_in(folder):
    return unlabelled_cases(scan_folder(folder))[0]


@pytest.fixture
def cases(tmp_path):
    for n, count in enumerate((3, 8, 12), 1):
        Ct(hu=phantom_hu(count), study=n, patient=f"p{n}").write(tmp_path / "ct" / f"{n}")
    return cases_in(tmp_path / "ct")


@pytest.fixture
def slices(tmp_path):
    return SliceCache(tmp_path / "cache", SETTINGS)


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled from the start, so that the hash of their content is kept."""
    monkeypatch.setattr(sources, "FRESH_NS", 0)


def again(cache):
    """As another process sees the same folder."""
    return SliceCache(cache.folder, cache.preprocessing)


def forbid_reading(monkeypatch):
    def read_files(*_, **__):
        raise AssertionError("the source was read")

    monkeypatch.setattr(module, "read_files", read_files)


def entries(cache):
    """Of slices alone."""
    return sorted(path for path in cache.folder.iterdir() if path.name.count(".") == 1)


def flip(path: Path, position: int = -100):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.with_suffix(".other").write_bytes(raw)
    path.with_suffix(".other").replace(path)


# ---- decoded once ---------------------------------------------------------------------------------------------------


def test_second_load_does_not_decode(slices, cases, monkeypatch):
    first = slices.load(cases[1])
    expected = prepare_slices(module.read_case(cases[1]), slices.preprocessing)
    forbid_reading(monkeypatch)
    second = again(slices).load(cases[1])
    assert isinstance(second, np.memmap)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(second, expected)


def test_next_run_does_not_read_settled_files(slices, cases, settled, monkeypatch):
    slices.build(cases)
    forbid_reading(monkeypatch)
    monkeypatch.setattr(hashlib, "file_digest", None)
    hashes, failures = again(slices).build(cases)
    assert (len(hashes), failures) == (3, [])


def build_without_decoding(folder: Path, cases: list[Case], hashes: dict[str, str]):
    module.read_files = None
    assert SliceCache(folder, SETTINGS).build(cases) == (hashes, [])


def test_another_process_shares_what_the_first_decoded(slices, cases):
    hashes, _ = slices.build(cases)
    process = SPAWN.Process(target=build_without_decoding, args=(slices.folder, cases, hashes))
    process.start()
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore")
def test_loader_processes_map_slices_and_features(method, slices, cases, monkeypatch):
    slices.build(cases)
    features = FeatureCache(slices, "trunk")
    for case in cases:
        features.save(case, np.array(slices.load(case)[:, 0], np.float32))
    shutil.rmtree(Path(cases[0].root))  # nobody needs the source any more
    for load in (slices.load, features.load):
        dataset = CaseDataset(cases, load, np.array([0, 1, 0]), slices=4, transform=None, seed=3)
        loader = DataLoader(dataset, 1, num_workers=1, multiprocessing_context=method, collate_fn=collate)
        for index, batch in enumerate(loader):
            assert torch.equal(batch["input"][0], dataset[index]["input"])


def test_caches_pickle_small(slices, cases):
    loaded = [slices.load(case) for case in cases]
    sent = pickle.dumps(FeatureCache(slices, "trunk"))
    assert len(sent) < 3000 < sum(array.nbytes for array in loaded)
    assert pickle.loads(sent).slices.key(cases[0]) == slices.key(cases[0])


# ---- named by content -----------------------------------------------------------------------------------------------


def test_a_copied_moved_or_renamed_folder_finds_its_entries(slices, cases, tmp_path, monkeypatch):
    hashes, _ = slices.build(cases)
    shutil.copytree(tmp_path / "ct", tmp_path / "copy")
    (tmp_path / "ct").rename(tmp_path / "moved")
    for number, path in enumerate(sorted((tmp_path / "moved" / "1").iterdir())):
        path.rename(path.with_name(f"{9 - number}.dcm"))
    forbid_reading(monkeypatch)
    for folder in ("copy", "moved"):
        found, failures = again(slices).build(cases_in(tmp_path / folder))
        assert (sorted(found.values()), failures) == (sorted(hashes.values()), [])


def test_preparation_is_part_of_the_key(slices, cases, tmp_path):
    key = slices.key(cases[0])
    assert again(slices).key(cases[0]) == key
    assert SliceCache(tmp_path / "a", SETTINGS.model_copy(update={"size": 25})).key(cases[0]) != key
    assert SliceCache(tmp_path / "b", SETTINGS.model_copy(update={"orientation": "as_stored"})).key(cases[0]) != key
    assert SliceCache(tmp_path / "c", SETTINGS, assume_hu=True).key(cases[0]) != key
    assert slices.key(replace(cases[0], part=1)) != key
    assert slices.key(cases[1]) != key
    assert slices.key(replace(cases[0], case_id="other", files=cases[0].files[::-1])) == key
    # windows come after the cache: changing them must not decode anew
    assert SliceCache(tmp_path / "d", SETTINGS.model_copy(update={"windows": ("bone",)})).key(cases[0]) == key


def test_the_volume_of_a_shared_series_is_read(cases, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "read_files", lambda *_, **how: asked.append(how))
    read_case(replace(cases[0], part=2), assume_hu=True)
    assert asked == [{"assume_hu": True, "part": 2}]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("settle", [True, False])
def test_a_change_under_the_same_size_and_time_is_seen(in_place, settle, slices, cases, request):
    if settle:
        request.getfixturevalue("settled")
    path = Path(cases[1].root) / cases[1].files[4]
    before, raw = path.stat(), bytearray(path.read_bytes())
    old = np.array(slices.load(cases[1]))
    raw[-200] ^= 255  # a pixel
    target = path if in_place else path.with_name("other")
    target.write_bytes(raw)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(path)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    new = again(slices).load(cases[1])
    np.testing.assert_array_equal(new, prepare_slices(read_case(cases[1]), SETTINGS))
    assert not np.array_equal(new, old)


@pytest.mark.parametrize("field", ["path", "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_each_mark_of_a_change_is_enough(field, monkeypatch):
    marks = {"path": 0, "st_size": 1, "st_mtime_ns": 2, "st_ctime_ns": 3, "st_ino": 4}
    stamps = []
    for changed in (0, 1):
        status = SimpleNamespace(**(marks | {field: marks[field] + changed}))
        monkeypatch.setattr(Path, "stat", lambda _, status=status: status)
        stamps.append(sources._stamp([Path(f"{status.path}.dcm")]).name)
    assert stamps[0] != stamps[1]


def test_hashes_of_fresh_files_are_not_kept(slices, cases, settled, monkeypatch):
    slices.key(cases[0])
    assert len(list(slices.folder.glob("*.source.npy"))) == 1
    monkeypatch.setattr(sources, "FRESH_NS", 3_600_000_000_000)
    slices.key(cases[1])
    assert len(list(slices.folder.glob("*.source.npy"))) == 1


def test_a_file_that_changes_while_it_is_decoded_leaves_no_entry(slices, cases, monkeypatch):
    read_files = module.read_files

    def read_and_change(paths, **how):
        scan = read_files(paths, **how)
        paths[0].write_bytes(paths[0].read_bytes()[:-2] + b"\1\1")
        return scan

    monkeypatch.setattr(module, "read_files", read_and_change)
    with pytest.raises(ScanError) as caught:
        slices.load(cases[0])
    assert caught.value.code is ReasonCode.INCOMPLETE
    assert entries(slices) == []


@pytest.mark.parametrize("header", ["scan.mhd", "scan.nhdr"])
def test_pixels_in_a_file_of_their_own_are_part_of_the_content(header, slices, tmp_path):
    keys = []
    for value in (1, 2):
        sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 3, 4), value, np.int16)), tmp_path / header)
        case = Case(case_id="c", patient_id="p", group="p", root=str(tmp_path), files=(header,))
        keys.append(again(slices).key(case))
    assert keys[0] != keys[1]


def test_names_and_files_of_the_cache_tell_no_path(cases, tmp_path, settled, monkeypatch):
    (tmp_path / "ct").rename(tmp_path / "Mueller_Hans")
    named = cases_in(tmp_path / "Mueller_Hans")
    slices = SliceCache(tmp_path / "cache", SETTINGS)
    slices.build(named)
    FeatureCache(slices, "trunk").save(named[0], np.ones((3, 5), np.float32))
    files = list(slices.folder.iterdir())
    assert len(files) == 7  # slices and source of each, and features
    assert all(re.fullmatch(r"[0-9a-f]{64}(\.source|\.features)?\.npy", path.name) for path in files)
    assert not any(b"Mueller" in path.read_bytes() for path in files)
    # and nobody can find out by hashing a path of which they think: the stamp is keyed
    sources_of = {path.name for path in files if ".source." in path.name}
    monkeypatch.setenv("MEDVIT_SITE_KEY", "another site")
    again(slices).build(named)
    assert len({path.name for path in slices.folder.glob("*.source.npy")} - sources_of) == 3


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: raw[:40], lambda raw: raw[:-10], lambda raw: b"x" * 500]
)
def test_damaged_entry_is_made_again_and_told(slices, cases, damage, caplog):
    expected = np.array(slices.load(cases[0]))
    (path,) = entries(slices)
    path.write_bytes(damage(path.read_bytes()))
    repaired = again(slices)
    with caplog.at_level(logging.WARNING, "medvit.cache"):
        np.testing.assert_array_equal(repaired.load(cases[0]), expected)
    assert repaired.rebuilt == len(caplog.records) == 1
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(np.load(path), expected)


def test_one_flipped_bit_of_a_pixel_is_not_served(slices, cases):
    expected = np.array(slices.load(cases[0]))
    flip(entries(slices)[0])
    assert slices.load(cases[0])[-1, -1, -1] == expected[-1, -1, -1]
    np.testing.assert_array_equal(slices.load(cases[0]), expected)
    assert slices.rebuilt == 1


def test_failures_are_listed_and_the_rest_goes_on(slices, cases, tmp_path):
    gap = replace(cases[2], case_id="s", files=cases[2].files[:5] + cases[2].files[6:])
    gone = Case(case_id="g", patient_id="p", group="p", root=str(tmp_path / "ct"), files=("9/missing.dcm",))
    seen = []
    hashes, failures = slices.build([gap, gone, *cases], progress=lambda: seen.append(1))
    assert [failure.error.code for failure in failures] == [ReasonCode.SLICE_MISSING, ReasonCode.IO_ERROR]
    assert failures[1].error.files == ("9/missing.dcm",)
    assert set(hashes) == {case.case_id for case in cases}
    assert len(seen) == 5


def test_a_full_disk_says_what_the_other_cases_need(slices, cases, monkeypatch):
    write, calls = slices.store._write, []

    def full_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise CacheFullError("full.")
        write(*arguments)

    monkeypatch.setattr(slices.store, "_write", full_at_third)
    with pytest.raises(CacheFullError, match=r"full. The 1 cases that are left need about 0 MB"):
        slices.build(cases)
    assert len(entries(slices)) == 2


def test_hashes_tell_identical_pixels(slices, cases, tmp_path):
    Ct(hu=phantom_hu(3), study=8, patient="another").write(tmp_path / "ct" / "8")
    hashes, _ = slices.build(cases_in(tmp_path / "ct"))
    assert len(hashes) == 4
    assert len(set(hashes.values())) == 3


# ---- features -------------------------------------------------------------------------------------------------------


def test_features_come_back_and_belong_to_one_backbone(slices, cases):
    features = FeatureCache(slices, "one")
    assert features.find(cases[0]) is None
    features.save(cases[0], np.ones((3, 5), np.float32))
    np.testing.assert_array_equal(features.load(cases[0]), np.ones((3, 5)))
    assert FeatureCache(slices, "two").find(cases[0]) is None
    assert FeatureCache(slices, "one").find(cases[1]) is None


def test_damaged_features_are_not_served(slices, cases):
    features = FeatureCache(slices, "one")
    features.save(cases[0], np.ones((30, 5), np.float32))
    flip(slices.folder / features.name(cases[0]))
    assert features.find(cases[0]) is None
    with pytest.raises(MedvitError, match="--resume"):
        features.load(cases[0])
    features.save(cases[0], np.ones((30, 5), np.float32))
    assert slices.rebuilt == 1


# ---- where ----------------------------------------------------------------------------------------------------------


def test_cache_lives_under_the_run_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDVIT_CACHE", raising=False)
    assert default_cache_dir(tmp_path) == tmp_path / "cache"
    monkeypatch.setenv("MEDVIT_CACHE", str(tmp_path / "x"))
    assert default_cache_dir(tmp_path / "run") == tmp_path / "x"


def test_read_case_is_the_scan(cases):
    assert read_case(cases[2]).hu.shape == (12, 20, 24)
