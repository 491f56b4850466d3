"""Which volume stands for a study, and what a person is told about the others."""

from itertools import permutations
from pathlib import Path

import pytest

from medvit.data.selection import select_series
from medvit.io import Series
from medvit.records import Outcome, ScanHeader


def volume(uid="1.1", part=0, *, slices=60, matrix=512, thickness=5.0, description="", axial=True, study="1"):
    header = ScanHeader(slice_thickness_mm=thickness, description=description)
    return Series(
        uid=uid,
        study_uid=study,
        root=Path(),
        outcome=Outcome.OK,
        files=(f"{uid}-{part}",),
        part=part,
        header=header,
        shape=(slices, matrix, matrix),
        axial=axial,
    )


LADDER = [
    (volume("9"), volume("1", axial=False, slices=500), "another series of this study was chosen: it is axial"),
    (
        volume("9"),
        volume("1", slices=500, description="AX_MIP_10mm"),
        "another series of this study was chosen: it is no reformat or projection",
    ),
    (
        volume("9", slices=120, thickness=5.0),
        volume("1", thickness=1.0),
        "another series of this study was chosen: more slices (120 against 60)",
    ),
    (
        volume("9", thickness=1.0, matrix=256),
        volume("1"),
        "another series of this study was chosen: thinner slices (1 mm against 5 mm)",
    ),
    (
        volume("9"),
        volume("1", matrix=256),
        "another series of this study was chosen: larger matrix (512 x 512 against 256 x 256)",
    ),
    (
        volume("1"),
        volume("1", 1),
        "another volume of this series was chosen: all else is equal, and its UID or place comes first",
    ),
]


@pytest.mark.parametrize(("better", "worse", "why"), LADDER)
def test_each_step_of_the_rule_decides_before_the_next_and_is_told(better, worse, why):
    for candidates in permutations((better, worse)):
        (chosen,), (other,) = select_series(candidates)
        assert (chosen, other.series, other.detail) == (better, worse, why)


@pytest.mark.parametrize("description", ["SMIPLE CHEST", "Vrtx axial", "CT 3D", "compression"])
def test_a_description_that_only_looks_like_a_reformat_is_none(description):
    (chosen,), _ = select_series([volume("9", slices=61, description=description), volume("1")])
    assert chosen.uid == "9"


def test_studies_do_not_compete():
    chosen, others = select_series([volume("1"), volume("2", study="2"), volume("3", study=""), volume("4", study="")])
    assert (len(chosen), others) == (4, ())
