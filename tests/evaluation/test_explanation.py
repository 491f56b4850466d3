import dataclasses

import cv2
import numpy as np
import pytest

from medvit.config import AttentionConfig, EvaluationConfig
from medvit.evaluation.explanation import explain
from medvit.evaluation.faithfulness import random_map
from medvit.evaluation.overlays import GAP, SIDE, draw_overlay
from medvit.records import UsageError
from tests.evaluation.models import ARCHITECTURE, judged_cases, small_model

QUICK = EvaluationConfig(bootstrap=100, attention=AttentionConfig(cases=7, slices=2, pictures=6))


@pytest.fixture(scope="module")
def judged():
    return judged_cases(small_model(), 14)


@pytest.fixture(scope="module")
def explanation(judged):
    return explain(judged, QUICK)


def test_maps_are_judged_on_calls_within_the_cap(judged, explanation):
    called = [one for one in judged if one.prediction.predicted == "bleed"]
    assert explanation.available == len(called)
    assert explanation.cases == min(7, len(called)) >= 6
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
    found = explain(judged, EvaluationConfig(attention=AttentionConfig(minutes=0)))
    assert (found.cases, found.maps, found.shown) == (0, {}, "")
    assert "time cap" in found.note
    assert found.pictures


def test_the_surest_are_shown_where_the_threshold_is_far_from_one_half():
    model = small_model()
    judged = judged_cases(model, 1)
    shares = {"sure alarm": 0.8, "alarm": 0.5, "unsure alarm": 0.12, "sure miss": 0.01, "unsure miss": 0.09}
    many = []
    for name, share in shares.items():
        prediction = dataclasses.replace(
            judged[0].prediction, probabilities={"none": 1 - share, "bleed": share}, threshold=0.1
        )
        label = "bleed" if "miss" in name else "none"
        case = dataclasses.replace(judged[0].case, case_id=name, label=label)
        many.append(dataclasses.replace(judged[0], case=case, prediction=prediction))
    found = explain(many, EvaluationConfig(attention=AttentionConfig(minutes=0, pictures=2)))
    assert {picture.case_id for picture in found.pictures} == {"sure alarm", "sure miss"}


def test_chance_is_another_one_in_each_case(judged):
    orders = [random_map((2, 4, 4), 0, one.case.case_id) for one in judged]
    assert len({order.tobytes() for order in orders}) == len(judged)
    np.testing.assert_array_equal(orders[0], random_map((2, 4, 4), 0, judged[0].case.case_id))


def test_null_is_not_looked_into(judged):
    with pytest.raises(UsageError, match=r"evaluation\.attention"):
        explain(judged, EvaluationConfig(attention=None))


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
