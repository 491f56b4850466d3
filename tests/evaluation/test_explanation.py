import cv2
import numpy as np
import pytest

from medvit.config import AttentionConfig
from medvit.evaluation.explanation import explain
from medvit.evaluation.overlays import GAP, SIDE, draw_overlay
from tests.evaluation.models import ARCHITECTURE, judged_cases, small_model

QUICK = AttentionConfig(cases=4, slices=2, pictures=6)


@pytest.fixture(scope="module")
def judged():
    return judged_cases(small_model(), 14)


@pytest.fixture(scope="module")
def explanation(judged):
    return explain(judged, QUICK)


def test_maps_are_judged_on_calls_within_the_cap(judged, explanation):
    called = [one for one in judged if one.prediction.predicted == "bleed"]
    assert explanation.available == len(called)
    assert explanation.cases == min(4, len(called)) >= 3
    assert list(explanation.maps) == ["attention", "rollout", "gradient", "centre"]
    assert explanation.note == ""
    assert explanation.seconds > 0


def test_pictures_show_calls_false_alarms_and_misses(judged, explanation):
    by_case = {one.case.case_id: one for one in judged}
    assert {picture.kind for picture in explanation.pictures} == {"right call", "false alarm", "missed"}
    for picture in explanation.pictures:
        one = by_case[picture.case_id]
        assert picture.target == "bleed"
        assert (picture.kind == "right call") == (one.right and one.case.label == "bleed")
        assert (picture.kind == "missed") == (one.case.label == "bleed" and not one.right)
        assert picture.weight == max(weight for _, weight in one.prediction.slice_weights)
        assert 1 <= picture.slice_number <= picture.slices == 4


def test_no_time_leaves_pictures_and_says_why_maps_were_not_judged(judged):
    found = explain(judged, QUICK.model_copy(update={"minutes": 0}))
    assert (found.cases, found.maps, found.believable) == (0, {}, False)
    assert "time cap" in found.note
    assert found.pictures


def test_of_three_classes_the_called_one_is_explained():
    classes = ("none", "benign", "malign")
    judged = judged_cases(small_model(classes), 9, classes)
    found = explain(judged, QUICK)
    assert found.available == 9
    by_case = {one.case.case_id: one.prediction.predicted for one in judged}
    assert all(picture.target == by_case[picture.case_id] for picture in found.pictures)
    assert {picture.kind for picture in found.pictures} <= {"right call", "wrong call"}


def test_a_model_without_attention_is_told():
    plain = ARCHITECTURE.model_copy(update={"name": "resnet10t", "options": {}})
    found = explain(judged_cases(small_model(architecture=plain), 3), QUICK)
    assert "no attention" in found.note
    assert found.pictures == ()


def test_the_overlay_is_the_slice_and_the_slice_with_its_brightest_patch():
    hu = np.full((32, 32), 40, np.int16)
    relevance = np.zeros((4, 4))
    relevance[3, 0] = 2.0
    picture = cv2.imdecode(np.frombuffer(draw_overlay(hu, relevance, ("lung", (40.0, 400.0))), np.uint8), 1)
    assert picture.shape == (SIDE, 2 * SIDE + GAP, 3)
    plain, over = picture[:, :SIDE].astype(int), picture[:, SIDE + GAP :].astype(int)
    assert (abs(plain - 128) <= 1).all()  # level of the narrower window
    changed = abs(over - plain).sum(axis=2)
    assert np.unravel_index(changed.argmax(), changed.shape) >= (SIDE * 3 // 4, 0)
    assert changed[: SIDE // 2].max() <= 3


def test_alike_patches_colour_nothing():
    hu = np.full((32, 32), 40, np.int16)
    picture = cv2.imdecode(np.frombuffer(draw_overlay(hu, np.ones((4, 4)), ("soft_tissue",)), np.uint8), 1)
    np.testing.assert_array_equal(picture[:, :SIDE], picture[:, SIDE + GAP :])
