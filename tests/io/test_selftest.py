"""The self-test passes here, and fails when a reader is turned."""

from dataclasses import replace

import numpy as np
import pytest

from medvit.io import selftest
from medvit.records import ReasonCode, ScanError


def test_this_installation_passes():
    selftest.check_orientation()


def flipped(scan):
    return replace(scan, hu=np.ascontiguousarray(scan.hu[:, :, ::-1]))


def shifted(scan):
    affine = scan.affine.copy()
    affine[0, 3] += 1
    return replace(scan, affine=affine)


def as_ras(scan):
    return replace(scan, affine=np.diag([-1.0, -1, 1, 1]) @ scan.affine)


@pytest.mark.parametrize("fault", [flipped, shifted, as_ras])
def test_a_reader_that_turns_or_moves_the_patient_is_found_out(monkeypatch, fault):
    plain = selftest.read
    monkeypatch.setattr(selftest, "read", lambda folder: fault(plain(folder)))
    with pytest.raises(ScanError) as caught:
        selftest.check_orientation()
    assert caught.value.code is ReasonCode.ORIENT_SELFTEST


def test_a_second_reader_that_disagrees_is_told(monkeypatch):
    monkeypatch.setattr(selftest, "agrees_with_simpleitk", lambda scan, paths: False)
    with pytest.raises(ScanError, match="SimpleITK"):
        selftest.check_orientation()
