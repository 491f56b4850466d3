"""Shares of waiting, on a clock that only moves when told."""

import pytest

from medvit.training.waiting import WaitingClock, advice


def run(clock, time, waits, works):
    def batches():
        for wait in waits:
            time[0] += wait
            yield wait

    for _, work in zip(clock.watch(batches()), works, strict=False):
        time[0] += work


def test_waiting_is_what_passes_until_a_batch_is_there():
    time = [100.0]
    clock = WaitingClock(lambda: time[0])
    run(clock, time, (5, 1, 0), (2, 1, 1, 0))
    assert clock.last == clock.overall == pytest.approx(6 / 10)
    run(clock, time, (0, 0), (10, 20, 0))
    assert clock.last == 0
    assert clock.overall == pytest.approx(6 / 40)


def test_the_end_of_the_loader_is_waited_for_too():
    time = [0.0]
    clock = WaitingClock(lambda: time[0])

    def batches():
        yield 1
        time[0] += 3  # processes are joined

    for _ in clock.watch(batches()):
        time[0] += 1
    assert clock.last == pytest.approx(3 / 4)


def test_no_time_is_no_waiting():
    clock = WaitingClock(lambda: 0.0)
    assert list(clock.watch([1, 2])) == [1, 2]
    assert (clock.last, clock.overall) == (0, 0)


@pytest.mark.parametrize(("wait", "work"), [(20, 80), (9, 1), (9, 0)], ids=["small share", "short", "short, all"])
def test_little_waiting_is_not_worth_a_word(wait, work):
    time = [0.0]
    clock = WaitingClock(lambda: time[0])
    run(clock, time, (wait,), (work, 0))
    assert advice(clock, 0) == ""


def test_advice_names_the_settings():
    time = [0.0]
    clock = WaitingClock(lambda: time[0])
    run(clock, time, (35,), (65, 0))
    said = advice(clock, 3)
    assert "35% of the training time (35 s)" in said
    assert "data.workers, now 3" in said
    assert "data.cache_dir" in said
