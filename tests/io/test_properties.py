"""Any valid series, however it is oriented, encoded, named and surrounded, gives the one right volume."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from any_series import ORIENTATIONS, SYNTAXES, any_names, any_series, assert_conserved, assert_known_answer, same
from damage import BROKEN
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from medvit.io import Series, read, read_files, scan_folder
from medvit.records import Outcome

randoms = st.randoms(use_true_random=False)
examples = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink)
)
"""The same in every run, and without the search for an explanation, which costs minutes where files are written."""


@contextmanager
def folder() -> Iterator[Path]:
    """Empty, for one example: pytest's tmp_path is shared by all of them."""
    with TemporaryDirectory() as name:
        yield Path(name)


def only_series(root: Path) -> Series:
    inventory = scan_folder(root)
    assert_conserved(inventory, root)
    (series,) = inventory.series
    assert (series.outcome, series.codes) == (Outcome.OK, ())
    return series


def test_there_are_24_orientations():
    assert len(set(ORIENTATIONS)) == 24


@pytest.mark.parametrize("number", range(24))
def test_every_orientation_is_the_phantom_in_the_patient(tmp_path, number):
    syntax = list(SYNTAXES.values())[number % len(SYNTAXES)]
    series = any_series(Random(number), syntax, orientation=ORIENTATIONS[number])
    series.write(tmp_path)
    assert_known_answer(read(only_series(tmp_path)), series)


@pytest.mark.parametrize("syntax", SYNTAXES)
@examples
@given(random=randoms)
def test_any_valid_series_is_the_phantom_in_the_patient(syntax, random):
    series = any_series(random, SYNTAXES[syntax])
    with folder() as root:
        series.write(root)
        assert_known_answer(read(only_series(root)), series)


@pytest.mark.parametrize("syntax", SYNTAXES)
@examples
@given(random=randoms)
def test_neither_order_nor_names_nor_folders_change_a_bit(syntax, random):
    series = any_series(random, SYNTAXES[syntax])
    with folder() as here, folder() as there:
        paths = series.write(here)
        series.write(there, any_names(random, len(paths)))
        scan = read(only_series(here))
        assert same(read(only_series(there)), scan)
        assert same(read_files(random.sample(paths, len(paths))), scan)


@examples
@given(random=randoms, count=st.integers(1, 8))
def test_junk_beside_a_series_is_named_and_changes_nothing(random, count):
    series = any_series(random, random.choice(list(SYNTAXES.values())), folder="series")
    with folder() as root:
        series.write(root)
        clean = read(only_series(root))
        for number, kind in enumerate(random.choices(list(BROKEN), k=count)):
            BROKEN[kind](random, root / random.choice(("", "series", "x")) / f"junk{number}", number)
        inventory = scan_folder(root)
        assert_conserved(inventory, root)
        good = [one for one in inventory.series if one.uid == clean.header.series_uid]
        assert [one.outcome for one in good] == [Outcome.OK]
        assert same(read(good[0]), clean)


@examples
@given(random=randoms)
def test_series_in_one_folder_do_not_mix(random):
    several = [
        any_series(random, random.choice(list(SYNTAXES.values())), uid=n % 2 + 1, study=n // 2 + 1, folder=f"{n}")
        for n in range(4)
    ]
    with folder() as root:
        for series in several:
            series.write(root)
        inventory = scan_folder(root)
        assert_conserved(inventory, root)
        found = {series.uid: read(series) for series in inventory.series}
        assert len(found) == len(several)
        for series in several:
            assert_known_answer(found[str(series.slices[0].dataset(0).SeriesInstanceUID)], series)
