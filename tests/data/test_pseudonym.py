"""Hashes that one site can join and nobody else."""

import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from medvit.data.pseudonym import pseudonym, site_key
from medvit.records import UsageError


def test_same_key_same_hash_and_another_key_another(monkeypatch):
    one = pseudonym("patient", "Mueller-0815")
    assert pseudonym("patient", "Mueller-0815") == one
    monkeypatch.setenv("MEDVIT_SITE_KEY", "other")
    assert pseudonym("patient", "Mueller-0815") != one


def test_kinds_and_borders_between_identifiers_count():
    hashes = {pseudonym("patient", "1"), pseudonym("case", "1"), pseudonym("case", "1", "2"), pseudonym("case", "12")}
    assert len(hashes) == 4
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in hashes)


def test_processes_that_start_at_once_have_one_key(tmp_path):
    """Under no key at all hashes would look the same, and anybody could make them."""
    module = sys.modules[pseudonym.__module__]
    for round_number in range(20):
        path = tmp_path / f"{round_number}" / "site.key"
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(module._stored_key.__wrapped__, [path] * 16))
        assert [len(key) for key in keys] == [64]
        assert list(path.parent.iterdir()) == [path]


def test_an_empty_key_is_refused(tmp_path):
    (tmp_path / "site.key").touch()
    with pytest.raises(UsageError, match="empty"):
        sys.modules[pseudonym.__module__]._stored_key(tmp_path / "site.key")


def test_key_file_is_made_once_and_private(monkeypatch, tmp_path):
    module = sys.modules[pseudonym.__module__]  # medvit.data.pseudonym itself may name the function
    path = tmp_path / "config" / "site.key"
    monkeypatch.delenv("MEDVIT_SITE_KEY")
    monkeypatch.setattr(module, "site_key_path", lambda: path)
    key = site_key()
    assert (site_key(), path.read_bytes(), len(key)) == (key, key, 64)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    module._stored_key.cache_clear()
    assert site_key() == key
