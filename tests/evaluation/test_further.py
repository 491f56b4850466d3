import dataclasses
import math

import pytest

from medvit.evaluation.curves import Curve, Level, NotMeasured, Robustness
from medvit.evaluation.decision import Latency
from medvit.evaluation.explained import Explanation, Faithfulness, Picture
from medvit.evaluation.further import FILE, Further, load_further, save_further
from medvit.evaluation.metrics import Interval
from medvit.records import UsageError

NOWHERE = Interval(0.5, math.nan, math.nan)
FURTHER = Further(
    explanation=Explanation(
        maps={"gradient": Faithfulness(deletion=0.1, insertion=0.9, over_random=NOWHERE, over_centre=NOWHERE)},
        cases=3,
        available=4,
        slices=2,
        seconds=1.5,
        pictures=(
            Picture(
                case_id="a",
                kind="missed",
                target="bleed",
                probability=0.2,
                label="bleed",
                slice_number=1,
                slices=2,
                weight=0.7,
                png=b"\x89PNG\xff\x00",
            ),
        ),
    ),
    robustness=Robustness(
        curves=(Curve("dose", "HU", "photons", 5, 4, 1.0, NOWHERE, (Level(10.0, math.nan, NOWHERE, 0.1, 0.0),)),),
        not_measured=(NotMeasured("PGD", "too slow"),),
        available=5,
        refused=0,
        case_cap=60,
        slices=4,
        minutes=2.0,
        seconds=1.0,
        seed=0,
        draws=100,
        confidence=0.95,
    ),
    latency=Latency(median=0.1, slowest=0.2, cases=3, slices=4.0, device="cpu", threads=2),
)


def test_what_was_kept_comes_back(tmp_path):
    save_further(FURTHER, tmp_path)
    assert repr(load_further(tmp_path)) == repr(FURTHER)  # NaN is not itself
    assert load_further(tmp_path).explanation.pictures == FURTHER.explanation.pictures


def test_nothing_was_kept(tmp_path):
    assert load_further(tmp_path) == Further()


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / FILE).write_text('{"latency": {"median": "soon"}}')
    with pytest.raises(UsageError, match="Delete it"):
        load_further(tmp_path)


def test_pictures_stay_out_of_the_figures():
    numbers = FURTHER.to_json()
    assert list(numbers) == ["explanation", "robustness", "latency"]
    assert "pictures" not in numbers["explanation"]
    assert "pictures" in dataclasses.asdict(FURTHER.explanation)
