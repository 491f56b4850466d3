"""Damaged and unusual headers: read leniently, decided on needed tags only, and never an unnamed crash."""

import contextlib

import numpy as np
import pytest
from ct_builder import Ct, assert_is_phantom
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.io import read, scan_folder
from medvit.records import Outcome, ScanError


def header_of(folder, **tags):
    def edit(dataset, index):
        for keyword, value in tags.items():
            if value is None:
                if keyword in dataset:
                    del dataset[keyword]
            else:
                setattr(dataset, keyword, value)

    Ct(edit=edit).write(folder, only=[0])
    return scan_folder(folder).series[0].header


@pytest.mark.parametrize(
    ("age", "birth", "study", "years"),
    [
        ("061Y", "19600102", "20210304", 61),
        ("018M", "19600102", "20210304", 1.5),
        ("003W", None, None, 0.06),
        ("010D", None, None, 0.03),
        (None, "19600102", "20210304", 61.17),
        ("", "19600102", "20210304", 61.17),
        (None, "", "20210304", None),
        (None, "19600102", "", None),
        (None, "20250101", "20210304", None),
        (None, None, None, None),
    ],
)
def test_age_comes_from_patient_age_else_from_the_dates(tmp_path, age, birth, study, years):
    header = header_of(tmp_path, PatientAge=age, PatientBirthDate=birth, StudyDate=study)
    assert header.age == (None if years is None else pytest.approx(years, abs=0.01))


@pytest.mark.parametrize(
    ("institution", "manufacturer", "site", "source"),
    [
        ("North", "Acme", "North", "InstitutionName"),
        (None, "Acme", "Acme", "Manufacturer"),
        ("", "Acme", "Acme", "Manufacturer"),
        (None, None, "", ""),
    ],
)
def test_site_comes_from_institution_else_from_manufacturer(tmp_path, institution, manufacturer, site, source):
    header = header_of(tmp_path, InstitutionName=institution, Manufacturer=manufacturer)
    assert (header.site, header.site_source) == (site, source)


def test_absent_description_is_no_fault(tmp_path):
    absent = dict.fromkeys(
        ("SliceThickness", "PatientAge", "PatientSex", "AcquisitionNumber", "Manufacturer", "ImageType", "RescaleType")
    )
    header = header_of(tmp_path, **absent)
    assert (header.slice_thickness_mm, header.sex, header.manufacturer) == (None, "", "")
    assert scan_folder(tmp_path).series[0].outcome is Outcome.OK


def test_malformed_numbers_in_tags_nobody_needs_are_no_fault(tmp_path):
    paths = Ct().write(tmp_path)
    for path in paths:
        raw = path.read_bytes()
        assert raw.count(b"2.5 ") == 1  # SliceThickness
        path.write_bytes(raw.replace(b"2.5 ", b"2,5 "))
    assert_is_phantom(read(tmp_path))


@pytest.mark.parametrize(("good", "bad"), [(b"-1024.0", b"-1024,0"), (b"20210304", b"notadate")])
def test_malformed_needed_number_is_refused_and_a_date_is_not(tmp_path, good, bad):
    for path in Ct().write(tmp_path):
        raw = path.read_bytes()
        assert raw.count(good) == 1
        path.write_bytes(raw.replace(good, bad))
    (series,) = scan_folder(tmp_path).series
    assert series.usable is (bad == b"notadate")
    if not series.usable:
        assert series.codes == ("RESCALE_INVALID",)


@pytest.fixture(scope="module")
def one_slice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slice")
    return Ct().write(folder, only=[3])[0].read_bytes()


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_end_in_a_scan_or_a_coded_refusal(one_slice, tmp_path_factory, flips):
    """No exception type of a parser ever leaves: one damaged file must not stop a hospital's batch."""
    damaged = bytearray(one_slice)
    for where, value in flips:
        damaged[where % (len(damaged) - 960)] = value  # in the header
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "IM").write_bytes(damaged)
    inventory = scan_folder(folder)
    assert len(inventory.files) == 1
    for series in inventory.series:
        with contextlib.suppress(ScanError):  # nothing else may come out
            assert np.isfinite(read(series).hu).all()
