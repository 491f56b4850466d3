import json

import pytest

from medvit.evaluation.learning_curve import convergence_epoch, how_it_went, overfitting_onset, read_history
from medvit.records import UsageError


def scored(*scores):
    return [{"epoch": epoch, "val_auroc": score} for epoch, score in enumerate(scores, 1)]


def losses(train, validation):
    rows = zip(train, validation, strict=True)
    return [{"epoch": epoch, "loss": one, "val_loss": other} for epoch, (one, other) in enumerate(rows, 1)]


def gaps(*values):
    return losses([0.5] * len(values), [0.5 + value for value in values])


RISING = (0.55, 0.65, 0.75, 0.82, 0.88, 0.90, 0.90, 0.90)


def test_converged_where_95_percent_of_the_way_is_kept():
    assert convergence_epoch(scored(*RISING)) == 5  # 0.5 + 0.95 * 0.4 = 0.88


@pytest.mark.parametrize("noisy", range(len(RISING)))
@pytest.mark.parametrize("value", [0.2, 0.999])
def test_one_noisy_epoch_moves_convergence_by_one_epoch_at_most(noisy, value):
    scores = list(RISING)
    scores[noisy] = value
    assert abs(convergence_epoch(scored(*scores)) - 5) <= 1


def test_an_early_spike_is_no_convergence():
    assert convergence_epoch(scored(0.5, 0.99, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9)) >= 6


def test_a_score_that_falls_back_has_not_converged_before():
    assert convergence_epoch(scored(0.9, 0.9, 0.9, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9)) == 7


@pytest.mark.parametrize("scores", [(0.5,) * 6, (0.4, 0.45, 0.3, 0.5), (0.9, 0.95), ()])
def test_flat_below_chance_or_short_is_none_and_no_division(scores):
    assert convergence_epoch(scored(*scores)) is None


def test_a_flat_score_above_chance_has_converged_at_once():
    assert convergence_epoch(scored(0.8, 0.8, 0.8, 0.8)) == 1
    assert convergence_epoch(scored(0.8, 0.8, 0.8, 0.8), start=0.8) is None


def test_epochs_without_a_figure_are_left_out_and_keep_their_numbers():
    rows = scored(None, *RISING, float("nan"))
    assert convergence_epoch(rows) == 6
    assert convergence_epoch(rows, figure="val_oracle_auroc") is None


def test_overfit_where_the_gap_begins_to_grow():
    assert overfitting_onset(gaps(0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5)) == 5
    train, validation = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2], [1.0, 0.8, 0.6, 0.6, 0.7, 0.8, 0.9]
    assert overfitting_onset(losses(train, validation)) == 4


def test_a_noisy_rise_is_found_too():
    assert overfitting_onset(gaps(0.1, 0.1, 0.1, 0.3, 0.2, 0.4, 0.3, 0.5, 0.4, 0.6)) in range(3, 7)


@pytest.mark.parametrize(
    "values",
    [
        (-0.9, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1),  # negative, its size shrinks: the rule of the naive |gap| fires
        (-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7),  # negative and growing in size
        (0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1),  # positive and shrinking
        (0.1,) * 8,
        (0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1),  # one noisy epoch
        (0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3),  # a step is no growth
        (0.1, 0.2, 0.3),
        (),
    ],
)
def test_nothing_is_overfit(values):
    assert overfitting_onset(gaps(*values)) is None


def test_growth_counts_only_from_where_the_gap_is_positive():
    assert overfitting_onset(gaps(-0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5)) == 5


def test_rows_of_two_folds_are_refused():
    with pytest.raises(ValueError, match="one fold"):
        convergence_epoch(scored(0.6, 0.7, 0.8) + scored(0.6, 0.7, 0.8))


def test_history_is_read_by_fold(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"fold": fold, **row} for fold in (0, 1) for row in scored(*RISING)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folds = read_history(path)
    assert [convergence_epoch(history) for history in folds.values()] == [5, 5]
    for text in ("no json\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"metrics\.jsonl"):
            read_history(path)
    with pytest.raises(UsageError):
        read_history(tmp_path / "nowhere.jsonl")


def test_what_ends_below_its_best_has_not_settled():
    assert convergence_epoch(scored(0.5, 0.9, 0.9, 0.9, 0.6, 0.6, 0.6)) is None


def test_each_fold_has_its_own_account():
    rows = [[{"epoch": e, "loss": 1.0, "val_loss": 1.0, "val_auroc": a} for e, a in enumerate(c, 1)] for c in CURVES]
    assert [(one.fold, one.epochs, one.converged, one.overfit) for one in how_it_went(rows)] == [
        (0, 5, 3, None),
        (1, 4, None, None),
    ]


CURVES = ((0.5, 0.6, 0.9, 0.9, 0.9), (0.5, 0.4, 0.5, 0.5))
