import math

import numpy as np
import pytest

from medvit.evaluation import faithfulness
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.faithfulness import FILLS, STEPS, Areas, centre_map, random_map, summarise
from tests.evaluation.models import PATCH, SIDE, BrightestPatch

MODEL = BrightestPatch(slice=1, row=0, column=3)
GRID = (2, 4, 4)


def deletion_insertion(model, hu, target, at, maps, fill="blur"):
    return faithfulness.deletion_insertion(model, hu, model.encode(hu), target, at, maps, fill)


def slices() -> np.ndarray:
    """Two slices of water; the patch that decides is at 300 HU, in a corner."""
    hu = np.zeros((2, SIDE, SIDE), np.int16)
    hu[1, :PATCH, -PATCH:] = 300
    return hu


def pointing_at(number: int) -> np.ndarray:
    relevance = np.zeros(GRID)
    relevance[number, 0, 3] = 1
    return relevance


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_map_that_points_at_what_decides_is_as_good_as_can_be():
    hu = slices()
    filled = FILLS["mean"](hu)[1, 0, -1] / 100
    (areas,) = deletion_insertion(MODEL, hu, 1, [0, 1], {"right": pointing_at(1)}, "mean").values()
    on, off = sigmoid(3), sigmoid(filled)
    # the patch goes (comes) with the first share, all the others change nothing
    assert areas.deletion == pytest.approx((on / 2 + off * (STEPS - 0.5)) / STEPS)
    assert areas.insertion == pytest.approx((off / 2 + on * (STEPS - 0.5)) / STEPS)


@pytest.mark.parametrize("fill", list(FILLS))
def test_it_beats_the_middle_and_chance_and_a_map_of_another_slice(fill):
    maps = {"right": pointing_at(1), "wrong slice": -pointing_at(1) + pointing_at(0), "centre": centre_map(GRID)}
    maps |= {"chance": random_map(GRID, 0, "case")}
    areas = deletion_insertion(MODEL, slices(), 1, [0, 1], maps, fill)
    assert max(areas, key=lambda name: areas[name].difference) == "right"
    assert min(areas, key=lambda name: areas[name].difference) in ("wrong slice", "centre")


def test_slices_that_are_not_explained_stay_as_they_are():
    areas = deletion_insertion(MODEL, slices(), 1, [0], {"blind": np.zeros((1, 4, 4))})
    assert areas["blind"] == pytest.approx((sigmoid(3), sigmoid(3)))


def test_the_curves_of_a_map_that_says_nothing_are_the_same_on_average():
    areas = [
        deletion_insertion(MODEL, slices(), 1, [0, 1], {"": random_map(GRID, 0, f"case{k}")})[""] for k in range(200)
    ]
    differences = np.array([one.difference for one in areas])
    assert abs(differences.mean()) < 4 * differences.std() / math.sqrt(200)


def test_the_middle_comes_first_in_every_slice():
    middle = centre_map((2, 5, 7))
    assert np.unravel_index(middle[0].argmax(), (5, 7)) == (2, 3)
    np.testing.assert_array_equal(middle[0], middle[1])
    np.testing.assert_array_equal(middle[0], middle[0][::-1, ::-1])


def test_the_summary_compares_case_by_case():
    good, poor = Areas(0.2, 0.9), Areas(0.5, 0.5)
    bootstrap = PatientBootstrap(np.arange(30))
    rng = np.random.default_rng(0)
    centre = [Areas(0.5, 0.5 + shift) for shift in rng.normal(0, 0.05, 30)]
    found = summarise({"map": [good] * 30, "centre": centre, "random": [poor] * 30}, bootstrap)
    assert found["map"].over_centre.point == pytest.approx(0.7 - np.mean([one.difference for one in centre]))
    assert found["map"].beats_both
    assert found["map"].deletion == pytest.approx(0.2)
    assert not found["centre"].beats_both


def test_one_patient_with_many_cases_proves_nothing():
    many = [Areas(0.2, 0.9 + 0.001 * k) for k in range(20)]
    poor = [Areas(0.5, 0.5)] * 20
    found = summarise({"map": many, "centre": poor, "random": poor}, PatientBootstrap(np.zeros(20)))
    assert not found["map"].beats_both
