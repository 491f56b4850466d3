"""Good series among ten times as many bad files: the same results to the bit, and every bad file named."""

from pathlib import Path
from random import Random

import pytest
from any_series import SYNTAXES, any_series, assert_conserved, same, settle
from damage import BROKEN

from medvit.io import scan_folder
from medvit.records import ReasonCode


def write_good(root: Path, random: Random, count: int) -> None:
    """Series of all transfer syntaxes, two to a study."""
    for number in range(count):
        syntax = list(SYNTAXES.values())[number % len(SYNTAXES)]
        series = any_series(random, syntax, uid=number % 2 + 1, study=number // 2 + 1, folder=f"{number:03d}")
        series.write(root)


def write_bad(root: Path, random: Random, count: int) -> set[str]:
    """Every kind of broken file in turn, among the good ones and beside them; returns their paths."""
    before = {path for path in root.rglob("*") if not path.is_dir()}
    folders = [path for path in root.rglob("*") if path.is_dir()]
    for number in range(count):
        folder = random.choice((root, root / f"other {number % 7}", random.choice(folders)))
        kind = list(BROKEN)[number % len(BROKEN)]
        BROKEN[kind](random, folder / f"{random.choice('0aZ~')}-{number}", number)
    after = {path for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path.relative_to(root).as_posix() for path in after - before}


def check(root: Path, seed: int, good: int) -> None:
    random = Random(seed)
    write_good(root, random, good)
    clean, aside = settle(scan_folder(root))
    assert len(clean) == good
    assert not aside

    bad = write_bad(root, random, 10 * good)
    assert len(bad) == 10 * good
    inventory = scan_folder(root)
    assert_conserved(inventory, root)
    mixed, aside = settle(inventory)
    assert set(mixed) == set(clean)
    for key, (series, scan) in clean.items():
        assert same(mixed[key][1], scan)
        assert mixed[key][0] == series
    assert set(aside) == bad
    for entry in aside.values():
        assert not entry.outcome.used
        assert entry.code in ReasonCode


@pytest.mark.parametrize("kind", BROKEN)
def test_each_kind_of_bad_file_is_named_where_it_lies_alone(tmp_path, kind):
    BROKEN[kind](Random(kind), tmp_path / "one", 1)
    inventory = scan_folder(tmp_path)
    assert_conserved(inventory, tmp_path)
    scans, aside = settle(inventory)
    assert not scans
    (entry,) = aside.values()
    assert entry.code in ReasonCode
    assert not entry.outcome.used


def test_20_good_series_are_the_same_among_200_bad_files(tmp_path):
    check(tmp_path, 0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_200_good_series_are_the_same_among_2000_bad_files(tmp_path, seed):
    check(tmp_path, seed, 200)
