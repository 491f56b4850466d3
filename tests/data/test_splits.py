"""Nobody is on two sides, however the split is asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.config import DataConfig
from medvit.data import group_cases, slice_prints
from medvit.data.splits import Fold, check_leakage, make_folds, split_patients
from medvit.records import EXIT_REFUSED, EXIT_USAGE, Case, GateError, UsageError

SITES = ("North", "South", "West")


def case(number, patient, label="no", site="North", split=""):
    return Case(
        case_id=f"c{number}",
        patient_id=f"p{patient}",
        group=f"p{patient}",
        root="/nowhere",
        files=(f"{number}",),
        label=label,
        site=site,
        split=split,
    )


def cohort(patients=40, per_patient=3, seed=0):
    """Some patients carry both labels, and some were seen at two sites."""
    rng = np.random.default_rng(seed)
    return [
        case(
            f"{p}-{i}",
            p,
            str(rng.choice(["yes", "no"], p=[0.4, 0.6])),
            str(rng.choice(SITES)) if p % 7 == 0 else SITES[p % 3],
        )
        for p in range(patients)
        for i in range(rng.integers(1, per_patient + 1))
    ]


def assert_apart(cases, fold):
    sides = [{cases[i].group for i in side} for side in (fold.train, fold.val, fold.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    everyone = np.sort(np.concatenate([fold.train, fold.val, fold.test]))
    np.testing.assert_array_equal(everyone, np.arange(len(cases)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    patients=st.integers(5, 60),
    per_patient=st.integers(1, 6),
    data=st.builds(
        DataConfig,
        folds=st.sampled_from([0, 2, 3, 5]),
        test_fraction=st.floats(0.05, 0.9),
        validation_fraction=st.floats(0.05, 0.9),
        holdout_sites=st.sampled_from([(), ("North",), ("South", "West")]),
    ),
)
def test_no_patient_is_ever_on_two_sides(seed, patients, per_patient, data):
    cases = cohort(patients, per_patient, seed)
    try:
        folds = make_folds(cases, data, seed)
    except UsageError:
        return  # too few patients is said, never worked around
    assert len(folds) == (1 if data.holdout_sites else max(1, data.folds))
    for fold in folds:
        assert_apart(cases, fold)
    if len(folds) > 1:
        judged = np.sort(np.concatenate([fold.test for fold in folds]))
        np.testing.assert_array_equal(judged, np.arange(len(cases)))  # everyone is judged exactly once


def test_splits_depend_on_the_seed_only():
    cases, data = cohort(), DataConfig(folds=3)
    one, again, other = (make_folds(cases, data, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.test, b.test) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a.test, b.test) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("share", [0.07, 0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9])
def test_single_split_holds_out_about_the_share_asked_for(share):
    cases = cohort(400, 1)
    (fold,) = make_folds(cases, DataConfig(test_fraction=share, validation_fraction=0.2), 0)
    assert len(fold.test) / 400 == pytest.approx(share, abs=0.02)
    assert len(fold.val) / 400 == pytest.approx(0.2 * (1 - share), abs=0.02)
    shares = [np.mean([cases[i].label == "yes" for i in side]) for side in (fold.train, fold.val, fold.test)]
    assert np.ptp(shares) < 0.1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.4, 0.75])
def test_pretraining_watches_about_the_share_asked_for(share):
    fold = split_patients(cohort(200, 1), DataConfig(validation_fraction=share), 0)
    assert len(fold.val) / 200 == pytest.approx(share, abs=0.02)
    assert len(fold.train) + len(fold.val) == 200


def test_a_share_that_few_patients_do_not_allow_is_the_nearest_that_they_do():
    cases = cohort(16, 1)
    fewest = min(sum(case.label == name for case in cases) for name in ("yes", "no"))
    assert fewest < 10
    (fold,) = make_folds(cases, DataConfig(test_fraction=0.3, validation_fraction=0.5), 0)
    assert len(fold.test) / 16 == pytest.approx(0.3, abs=0.1)


def test_held_out_sites_are_the_test_split_with_all_of_their_patients():
    cases = cohort()
    (fold,) = make_folds(cases, DataConfig(holdout_sites=("North",)), 0)
    trained = {cases[i].site for i in (*fold.train, *fold.val)}
    assert "North" not in trained
    visitors = {c.group for c in cases if c.site == "North"}
    assert {cases[i].group for i in fold.test} == visitors


def test_unknown_site_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match=r"no site Nord.*North, South, West"):
        make_folds(cohort(), DataConfig(holdout_sites=("Nord",)), 0)


def test_holding_out_every_site_is_wrong_usage():
    with pytest.raises(UsageError, match="nothing is left"):
        make_folds(cohort(), DataConfig(holdout_sites=SITES), 0)


def test_too_few_patients_for_the_folds_names_the_numbers():
    cases = [case(n, n, "yes" if n < 3 else "no") for n in range(20)]
    with pytest.raises(UsageError, match=r"20 patients, 3 of them with label 'yes'; 5 parts") as caught:
        make_folds(cases, DataConfig(folds=5), 0)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"folds": 5}, r"data\.folds.*Lower it"),
        ({"test_fraction": 0.05}, r"data\.test_fraction.*Bring it nearer to 0\.5"),
    ],
)
def test_too_few_patients_names_the_setting_to_change(settings, remedy):
    with pytest.raises(UsageError, match=remedy):
        make_folds([case(n, n, "yes" if n < 3 else "no") for n in range(20)], DataConfig(**settings), 0)


def given_split(names):
    return [case(n, n if group is None else group, label, split=split) for n, (split, group, label) in enumerate(names)]


GOOD = [(split, None, label) for split in ("train", "val", "test") for label in ("yes", "no")]


def test_a_given_split_is_kept():
    (fold,) = make_folds(given_split(GOOD), DataConfig(), 0)
    assert [side.tolist() for side in (fold.train, fold.val, fold.test)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("settings", [{"folds": 5}, {"holdout_sites": ("North",)}, {"target_sites": ("North",)}])
def test_a_given_split_and_another_one_are_a_contradiction(settings):
    """Above all with target sites: their labels would train, although nobody said so."""
    with pytest.raises(UsageError, match=f"data.{next(iter(settings))}: the labels have a 'split' column"):
        make_folds(given_split(GOOD), DataConfig(**settings), 0)


@pytest.mark.parametrize("side", ["train", "val", "test"])
def test_a_case_without_label_is_on_no_side_but_target(side):
    with pytest.raises(UsageError, match="1 cases without a label"):
        make_folds(given_split([*GOOD, (side, None, None)]), DataConfig(), 0)


@pytest.mark.parametrize("sides", [("train", "test"), ("train", "val"), ("val", "test")])
def test_a_given_split_with_a_patient_on_two_sides_is_refused(sides):
    leak = [(side, "twice", "yes") for side in sides]
    with pytest.raises(GateError, match=r"LEAKAGE: 1 patients.*ptwice") as caught:
        make_folds(given_split(GOOD + leak), DataConfig(), 0)
    assert caught.value.exit_code == EXIT_REFUSED == 4


@pytest.mark.parametrize("bad", [("", None, "yes"), ("valid", None, "yes")])
def test_a_given_split_must_be_complete_and_spelt_right(bad):
    with pytest.raises(UsageError, match="column 'split'"):
        make_folds(given_split([*GOOD, bad]), DataConfig(), 0)


def test_a_side_without_a_class_is_said():
    only = [("train", None, "yes"), ("train", None, "no"), ("val", None, "yes"), ("test", None, "no")]
    with pytest.raises(UsageError, match="validation split has no case with label no"):
        make_folds(given_split(only), DataConfig(), 0)


def test_identical_pixels_across_a_given_split_are_refused():
    same = slice_prints(np.random.default_rng(0).normal(0, 100, (1, 32, 32)).astype(np.int16))
    grouped = group_cases(given_split(GOOD), {"c0": same, "c4": same})
    with pytest.raises(GateError, match="LEAKAGE"):
        make_folds(grouped.cases, DataConfig(), 0)


def test_check_leakage_looks_at_groups_not_at_patients():
    cases = [replace(case(n, n), group="one") for n in range(3)]
    with pytest.raises(GateError):
        check_leakage(cases, Fold(np.array([0]), np.array([1]), np.array([2])))


# adaptation to target sites


def two_hospitals(patients=48):
    """North and South are labelled; half of West is, and one of its patients was seen at North too."""
    cases = [case(f"{p}", p, ("yes", "no")[p % 2], SITES[p // 2 % 3]) for p in range(patients)]
    cases += [replace(case(f"u{p}", 1000 + p, site="West"), label=None) for p in range(10)]
    cases.append(case("moved", 4, "yes", "North"))
    assert cases[4].site == "West"
    return cases


@pytest.mark.parametrize("seed", range(5))
def test_target_labels_stay_out_of_training_and_selection(seed):
    cases = two_hospitals()
    (fold,) = make_folds(cases, DataConfig(target_sites=("West",)), seed)
    assert all(cases[i].site != "West" for i in (*fold.train, *fold.val))
    assert {cases[i].site for i in fold.test} == {"North", "South", "West"}
    assert all(cases[i].label is not None for i in (*fold.train, *fold.val, *fold.test))
    assert {i for i, one in enumerate(cases) if one.label is None} <= set(fold.target.tolist())
    everyone = np.sort(np.concatenate([fold.train, fold.val, fold.test, fold.target]))
    np.testing.assert_array_equal(everyone, np.arange(len(cases)))


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_adapted_to_and_judged(seed):
    cases = two_hospitals()
    (fold,) = make_folds(cases, DataConfig(target_sites=("West",)), seed)
    sides = [{cases[i].group for i in side} for side in fold.sides().values()]
    assert sum(len(side) for side in sides) == len(set.union(*sides))


def test_a_patient_seen_at_both_sites_goes_to_the_target():
    cases = two_hospitals()
    (fold,) = make_folds(cases, DataConfig(target_sites=("West",)), 0)
    assert len(cases) - 1 in {*fold.target.tolist(), *fold.test.tolist()}


def test_a_target_without_labels_is_adapted_to_with_all_of_it():
    cases = [one if one.site != "West" else replace(one, label=None) for one in two_hospitals()[:-1]]
    (fold,) = make_folds(cases, DataConfig(target_sites=("West",)), 0)
    assert sum(cases[i].site == "West" for i in fold.target) == sum(one.site == "West" for one in cases)
    assert all(cases[i].site != "West" for i in fold.test)


def test_few_labels_of_a_target_are_all_for_judging():
    kept = {"4", "5", "10"}
    cases = [
        one if one.site != "West" or one.files[0] in kept else replace(one, label=None) for one in two_hospitals()[:-1]
    ]
    (fold,) = make_folds(cases, DataConfig(target_sites=("West",)), 0)
    at_west = {i for i, one in enumerate(cases) if one.site == "West" and one.label is not None}
    assert at_west
    assert at_west <= set(fold.test.tolist())


def few_at_the_target(each):
    """Of West, so many patients of each label, and nobody without."""
    return [one for one in two_hospitals()[:48] if one.site != "West" or int(one.files[0]) < 4 + 6 * each]


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_target_whose_patients_all_judge_is_told_what_helps(share):
    cases = few_at_the_target(3)
    with pytest.raises(UsageError, match=r"6 patients there, all labelled, of the rarest label 3.*nearer to 0\.5"):
        make_folds(cases, DataConfig(target_sites=("West",), test_fraction=share), 0)
    (nearer,) = make_folds(cases, DataConfig(target_sites=("West",), test_fraction=0.34), 0)
    emptied = [replace(one, label=None) if one.files[0] in ("4", "5") else one for one in cases]
    (fewer,) = make_folds(emptied, DataConfig(target_sites=("West",), test_fraction=0.25), 0)
    assert len(nearer.target)
    assert {cases[i].files[0] for i in fewer.target} == {"4", "5"}


def test_one_target_patient_of_each_label_cannot_be_cut_however_they_are_held_out():
    with pytest.raises(UsageError, match="nobody is left to adapt to") as caught:
        make_folds(few_at_the_target(1), DataConfig(target_sites=("West",), test_fraction=0.5), 0)
    assert "nearer" not in str(caught.value)


def test_unknown_target_site_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match=r"data.target_sites: no site Mars. Saw North, South, West"):
        make_folds(two_hospitals(), DataConfig(target_sites=("Mars",)), 0)


def test_a_given_split_may_name_target_cases():
    names = ("train", "train", "train", "val", "test", "target")
    cases = [replace(case(i, i, ("yes", "no")[i // 6 % 2]), split=names[i % 6]) for i in range(48)]
    (fold,) = make_folds(cases, DataConfig(), 0)
    assert {i % 6 for i in fold.target} == {5}


# without labels


def unlabelled(count, splits=()):
    return [
        Case(
            case_id=f"c{n}",
            patient_id=f"p{n}",
            group=f"g{n // 2}",
            root="",
            files=(str(n),),
            split=dict(splits).get(n, ""),
        )
        for n in range(count)
    ]


def groups_of(cases, indices):
    return {cases[index].group for index in indices}


@pytest.mark.parametrize("seed", [0, 1])
def test_without_labels_patients_are_on_one_side(seed):
    cases = unlabelled(20)
    fold = split_patients(cases, DataConfig(validation_fraction=0.2), seed)
    assert not groups_of(cases, fold.train) & groups_of(cases, fold.val)
    assert sorted([*fold.train, *fold.val]) == list(range(20))
    assert len(fold.val) == 4
    assert not len(fold.test)


def test_without_labels_the_seed_decides_who_is_watched():
    cases = unlabelled(20)
    first, again, second = (split_patients(cases, DataConfig(), seed).val.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != second


def test_without_labels_patients_of_a_given_test_split_take_no_part():
    cases = unlabelled(12, {0: "test", 5: "val"})  # each group has two cases
    fold = split_patients(cases, DataConfig(), 0)
    assert fold.test.tolist() == [0, 1]
    assert fold.val.tolist() == [4, 5]
    assert fold.train.tolist() == [2, 3, 6, 7, 8, 9, 10, 11]


def test_one_patient_cannot_be_pretrained_on():
    with pytest.raises(UsageError, match="two patients"):
        split_patients(unlabelled(2), DataConfig(), 0)
