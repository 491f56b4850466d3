"""Fits with fewer tokens early: interrupted, accumulated and told of."""

import itertools

import pytest

from medvit.config import Stage
from medvit.training import loop
from medvit.training.loop import Run, fit
from medvit.training.waiting import WaitingClock
from tests.training.fits import judged, make_dataset, make_objective, same, training, weights

SCHEDULE = [{"from_progress": 0, "keep": 0.25}, {"from_progress": 0.3, "keep": 0.5}, {"from_progress": 0.8}]
ACCELERATION = {"schedule": SCHEDULE}
STAGES = (Stage(name="head", trainable="head", epochs=1, lr=1e-2), Stage(name="all", epochs=3, lr=1e-2))


class Interrupted(Exception):  # noqa: N818  no error
    pass


@pytest.mark.parametrize("validation", [1, 2, 3])
def test_interrupted_fit_goes_on_bit_for_bit(validation, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WaitingClock", lambda: WaitingClock(lambda: 0.0))
    config = training(stages=STAGES, accumulate=2, ema=0.9, checkpoint_minutes=0)
    whole = make_objective(random=True, acceleration=ACCELERATION)
    expected = fit(whole, make_dataset(), config, judged(whole), Run(folder=tmp_path / "whole"))

    cut, left = make_objective(random=True, acceleration=ACCELERATION), [validation]
    judge = judged(cut)

    def interrupted() -> dict[str, float]:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted
        return judge()

    with pytest.raises(Interrupted):
        fit(cut, make_dataset(), config, interrupted, Run(folder=tmp_path / "cut"))
    resumed = make_objective(random=True, acceleration=ACCELERATION)
    history = fit(resumed, make_dataset(), config, judged(resumed), Run(folder=tmp_path / "cut", resume=True))
    assert same(weights(resumed), weights(whole))
    assert history == expected


def test_metrics_tell_how_many_tokens_were_seen(tmp_path):
    objective = make_objective(acceleration=ACCELERATION)
    config = training(stages=(Stage(epochs=10, lr=1e-3),))
    history = fit(objective, make_dataset(), config, judged(objective), Run(folder=tmp_path))
    shares = [row["tokens_share"] for row in history.rows]
    assert shares == sorted(shares)
    assert (shares[0], shares[5], shares[-1]) == (0.25, 0.5, 1.0)


@pytest.mark.parametrize(("epochs", "best"), [(5, 5), (10, 9), (1, 1)])
def test_a_model_that_never_saw_whole_slices_is_never_the_best(epochs, best, tmp_path):
    """However good it looks: later epochs are judged worse here, and still the first that saw whole slices is kept."""
    objective, scores = make_objective(acceleration=ACCELERATION), itertools.count(1)
    config = training(stages=(Stage(epochs=epochs, lr=1e-3),), select="best")
    history = fit(objective, make_dataset(), config, lambda: {"auroc": 1 / next(scores)}, Run(folder=tmp_path))
    assert history.best_epoch == best
