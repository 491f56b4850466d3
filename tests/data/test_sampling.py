"""Which cases make a batch: all of them, in nearly equal batches, the same for every process and every resumed run."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvit.data.sampling import epoch_batches, share

seeds = st.integers(0, 2**31 - 1)


def flat(batches):
    return [index for batch in batches for index in batch]


@given(count=st.integers(1, 60), size=st.integers(1, 16), seed=seeds, epoch=st.integers(0, 500))
def test_every_case_once_in_batches_of_nearly_one_size(count, size, seed, epoch):
    batches = epoch_batches(np.zeros(count, int), epoch, batch_size=size, seed=seed)
    assert sorted(flat(batches)) == list(range(count))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= size


@given(count=st.integers(2, 60), size=st.integers(1, 8), processes=st.integers(1, 4), target=st.integers(0, 9))
def test_processes_share_every_batch_and_none_goes_without(count, size, processes, target):
    labels = np.array([0] * count + [-1] * target)
    if count < processes:
        return
    for batch in epoch_batches(labels, 0, batch_size=size, seed=0, processes=processes):
        shares = [share(batch, labels, rank, processes) for rank in range(processes)]
        assert sorted(flat(shares)) == sorted(batch)
        assert all(any(labels[index] >= 0 for index in one) for one in shares)
        assert target == 0 or all(any(labels[index] < 0 for index in one) for one in shares)


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return epoch_batches(np.zeros(50, int), epoch, batch_size=8, seed=seed)

    assert order(1, 2) == order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize(("source", "target"), [(20, 7), (7, 20), (8, 8)])
def test_neither_source_nor_target_is_cut_short(source, target):
    """The mistake is zip(), which stops at the shorter of two loaders."""
    labels = np.array([0] * source + [-1] * target)
    epochs = [flat(epoch_batches(labels, epoch, batch_size=4, seed=3)) for epoch in range(target)]
    for epoch in epochs:
        assert sorted(index for index in epoch if labels[index] >= 0) == list(range(source))
    seen = Counter(index for epoch in epochs for index in epoch if labels[index] < 0)
    assert set(seen.values()) == {source}  # as often as each other, over as many epochs as there are target cases


def test_each_batch_is_half_target():
    labels = np.array([0] * 10 + [-1] * 3)
    for batch in epoch_batches(labels, 0, batch_size=4, seed=0):
        assert 2 * sum(labels[index] < 0 for index in batch) == len(batch)


def test_target_cases_go_on_where_the_last_epoch_ended():
    labels = np.array([0] * 5 + [-1] * 20)
    epochs = [flat(epoch_batches(labels, epoch, batch_size=5, seed=0)) for epoch in range(4)]
    target = [index for epoch in epochs for index in epoch if labels[index] < 0]
    assert sorted(target) == list(range(5, 25))


@given(seed=seeds)
def test_balanced_draws_every_class_as_often_and_the_frequent_without_repeats(seed):
    labels = np.array([0] * 30 + [1] * 3 + [2] * 1)
    drawn = Counter(flat(epoch_batches(labels, 0, batch_size=8, seed=seed, strata=labels)))
    by_class = [sum(drawn[index] for index in np.flatnonzero(labels == name)) for name in range(3)]
    assert sum(by_class) == len(labels)
    assert max(by_class) - min(by_class) <= 1
    assert max(drawn[index] for index in range(30)) == 1
    counts = [drawn[index] for index in (30, 31, 32)]
    assert max(counts) - min(counts) <= 1


def test_balanced_epochs_reach_every_case():
    labels = np.array([0] * 30 + [1] * 3)
    seen = {i for e in range(12) for i in flat(epoch_batches(labels, e, batch_size=8, seed=0, strata=labels))}
    assert seen == set(range(33))


def test_strata_need_not_be_the_classes():
    labels, sex = np.array([0, 1] * 15 + [0, 1, -1, -1]), np.array([0] * 30 + [1] * 4)
    drawn = flat(epoch_batches(labels, 0, batch_size=8, seed=0, strata=sex * 2 + labels.clip(0)))
    cells = Counter((sex[index], labels[index]) for index in drawn if labels[index] >= 0)
    assert set(cells.values()) == {8}


def test_epochs_differ():
    batches = [epoch_batches(np.zeros(30, int), epoch, batch_size=30, seed=0) for epoch in range(10)]
    assert all(one != other for one, other in pairwise(batches))


@pytest.mark.parametrize("labels", [[], [-1, -1], [0]])
def test_fewer_labelled_cases_than_processes_is_refused(labels):
    with pytest.raises(ValueError, match="labelled cases"):
        epoch_batches(np.array(labels, int), 0, batch_size=2, seed=0, processes=2)
