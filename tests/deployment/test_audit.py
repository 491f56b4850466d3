"""The audit: any change that somebody without the key makes is found; a kill or a full disk is no change."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.cli import doctor
from medvit.deployment import Audit, Head, verify
from medvit.deployment.audit import MAX_LINE, AuditBrokenError, AuditWriteError
from medvit.deployment.audit_line import FIELDS, START, derive_key, hash_of, seal, unseal

KEY = b"a site's key"
ENTRIES = 12


def ticking():
    """A clock that moves a second at each look."""
    seconds = itertools.count()
    return lambda: datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=next(seconds))


def write(path, entries=ENTRIES, key=KEY):
    with Audit(path, key, ticking()) as audit:
        for number in range(entries):
            audit.append("decided", case_id=f"{number:016x}", outcome="ok", codes=["LOSSY", "MONO1"], used=number)
        return audit.head


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(content, end) of an audit."""
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    head = write(path)
    return path.read_bytes(), head


def checked(content, tmp_path, expected=None):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(content)
    return verify(path, KEY, expected)


def lines_of(verdict):
    return [problem.line for problem in verdict.problems]


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_line_is_what_was_said_and_hashes_chain(whole, tmp_path):
    lines = whole[0].decode().splitlines()
    entries = [json.loads(line) for line in lines]
    assert list(entries[0]) == ["seq", "time", "event", "case_id", "outcome", "codes", "used", "prev", "hash"]
    assert entries[1]["time"] == "2026-01-02T00:00:01.000+00:00"
    assert [entry["seq"] for entry in entries] == list(range(1, ENTRIES + 1))
    assert [entry["prev"] for entry in entries] == [START.hash, *(entry["hash"] for entry in entries[:-1])]
    assert whole[1] == Head(ENTRIES, entries[-1]["hash"])
    verdict = checked(whole[0], tmp_path, whole[1])
    assert verdict.intact
    assert verdict.head == whole[1]


def test_without_the_key_nobody_makes_a_line(whole, tmp_path):
    last = json.loads(whole[0].splitlines()[-1])
    entry = {"seq": last["seq"] + 1, "time": last["time"], "event": "stopped", "prev": last["hash"]}
    for key in (b"", b"guess", KEY):  # the site's key itself is not that of the chain
        forged = seal(entry, key) + b"\n"
        assert lines_of(checked(whole[0] + forged, tmp_path)) == [ENTRIES + 1]
    assert checked(whole[0] + seal(entry, derive_key(KEY)) + b"\n", tmp_path).intact
    path = tmp_path / "audit.jsonl"
    assert len(verify(path, b"another site's").problems) == ENTRIES + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"patient_name": "Mueller^Anna"},
        {"path": "/export/Mueller"},
        {"case_id": "Mueller-0815"},
        {"file": "../x.dcm"},
        {"file": "Mueller.dcm"},
        {"codes": ["LOSSY", "Anna Mueller"]},
        {"used": -1},
        {"used": True},
        {"used": "12"},
        {"outcome": 3},
        {"predicted": "a\nb"},
        {"prev": "0" * 64},
        {"seq": 7},
    ],
)
def test_what_might_be_identity_is_a_programming_error(fields, tmp_path):
    path = tmp_path / "audit.jsonl"
    with Audit(path, KEY, ticking()) as audit:
        with pytest.raises(ValueError, match=r"\w+") as caught:
            audit.append("read", **fields)
        assert "Mueller" not in str(caught.value)
        assert not path.read_bytes()
        audit.append("read", case_id="0" * 16)
    assert verify(path, KEY).intact


@pytest.mark.parametrize("event", ["", "Mueller", "read file", "x" * 41])
def test_an_event_is_a_word(event, tmp_path):
    with Audit(tmp_path / "a", KEY) as audit, pytest.raises(ValueError, match="short word"):
        audit.append(event)


def test_the_longest_entry_fits_what_is_read_of_an_end(tmp_path):
    longest = {name: "f" * 64 for name, form in FIELDS.items() if form and form.fullmatch("f" * 64)}
    with Audit(tmp_path / "a", KEY) as audit:
        audit.append("read", **longest, used=2**63)
        with pytest.raises(ValueError, match="too long"):
            audit.append("read", codes=["X" * 64] * (MAX_LINE // 64))
        audit.append("read")
    assert verify(tmp_path / "a", KEY).head.entries == 2


def test_an_entry_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    seen, sync = [], os.fsync
    path = tmp_path / "a"
    with Audit(path, KEY) as audit:
        monkeypatch.setattr(os, "fsync", lambda file: (seen.append(path.read_bytes()), sync(file)))
        audit.append("read")
        assert seen == [path.read_bytes()] != [b""]


def test_threads_write_one_chain(tmp_path):
    with Audit(tmp_path / "a", KEY) as audit:
        threads = [
            threading.Thread(target=lambda: [audit.append("read", used=one) for one in range(20)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    verdict = verify(tmp_path / "a", KEY)
    assert verdict.intact
    assert verdict.head.entries == 80


def test_an_empty_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        Audit(tmp_path / "a", b"")


# ---- what is found --------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_single_edit_of_bytes_is_found(whole, tmp_path_factory, data):
    """Replaced, inserted or removed at any place; at the line that it is in."""
    content = whole[0]
    at = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["replace", "insert", "remove"]))
    byte = data.draw(st.binary(min_size=1, max_size=1))
    edited = content[:at] + (b"" if how == "remove" else byte) + content[at + (how != "insert") :]
    if edited == content:  # the same byte, or one like its neighbour: no edit, except that it is longer
        return
    verdict = checked(edited, tmp_path_factory.getbasetemp())
    number = content[:at].count(b"\n") + 1
    assert not verdict.intact
    assert {number - 1, number, number + 1} & set(lines_of(verdict))


@settings(max_examples=100, deadline=None)
@given(removed=st.sets(st.integers(0, ENTRIES - 1), min_size=1))
def test_any_removal_of_lines_is_found(whole, tmp_path_factory, removed):
    lines = whole[0].splitlines(keepends=True)
    left = b"".join(line for number, line in enumerate(lines) if number not in removed)
    assert not checked(left, tmp_path_factory.getbasetemp(), whole[1]).intact
    at_the_end = removed == set(range(min(removed), ENTRIES))
    # without an end that was kept, what is gone at the end leaves no trace
    assert checked(left, tmp_path_factory.getbasetemp()).intact == at_the_end


@settings(max_examples=100, deadline=None)
@given(order=st.permutations(range(ENTRIES)))
def test_any_other_order_is_found(whole, tmp_path_factory, order):
    lines = whole[0].splitlines(keepends=True)
    verdict = checked(b"".join(lines[number] for number in order), tmp_path_factory.getbasetemp())
    assert verdict.intact == (list(order) == sorted(order))


@settings(max_examples=100, deadline=None)
@given(
    at=st.integers(0, ENTRIES),
    line=st.one_of(st.binary(max_size=300), st.integers(0, ENTRIES - 1), st.just(b"")),
)
def test_any_inserted_line_is_found_where_it_is(whole, tmp_path_factory, at, line):
    lines = whole[0].splitlines(keepends=True)
    lines.insert(at, lines[line] if isinstance(line, int) else line.replace(b"\n", b"") + b"\n")
    verdict = checked(b"".join(lines), tmp_path_factory.getbasetemp())
    # a copy beside its original cannot be told from it
    assert {at, at + 1, at + 2} & set(lines_of(verdict))


def test_it_says_which_line_and_what(whole, tmp_path):
    lines = whole[0].splitlines(keepends=True)
    edited = [*lines[:4], lines[4].replace(b'"ok"', b'"no"'), *lines[5:]]
    (problem,) = checked(b"".join(edited), tmp_path).problems
    assert problem.line == 5
    assert "edited or inserted" in problem.what
    (problem,) = checked(b"".join([*lines[:4], *lines[6:]]), tmp_path).problems
    assert problem == (5, "holds entry 7, and entries 5 to 6 are not before it")
    first, second = checked(b"".join([*lines[:4], lines[5], lines[4], *lines[6:]]), tmp_path).problems
    assert first == (5, "holds entry 6, and entry 5 is not before it")
    assert second == (6, "holds entry 5, which belongs further up: moved or copied")
    (problem,) = checked(b"".join(lines[:-2]), tmp_path, whole[1]).problems
    assert problem == (ENTRIES - 1, f"is absent: entries {ENTRIES - 1} to {ENTRIES} are missing, and were there once")


def test_lines_of_another_chain_of_the_same_site_are_found(whole, tmp_path):
    with Audit(tmp_path / "other", KEY, ticking()) as audit:
        for _ in range(ENTRIES):
            audit.append("read")
    other = (tmp_path / "other").read_bytes()
    mine, theirs = (content.splitlines(keepends=True) for content in (whole[0], other))
    assert lines_of(checked(b"".join([*mine[:5], theirs[5], *mine[6:]]), tmp_path)) == [6, 7]
    assert lines_of(checked(b"".join([*mine[:5], *theirs[5:]]), tmp_path)) == [6]
    assert checked(other, tmp_path).intact  # a whole other one: only the end that was kept tells
    assert lines_of(checked(other, tmp_path, whole[1])) == [ENTRIES]


def test_entries_after_an_end_that_was_kept_are_welcome(whole, tmp_path):
    kept = Head(5, hash_of(whole[0].splitlines()[4]))
    assert checked(whole[0], tmp_path, kept).intact
    assert lines_of(checked(whole[0], tmp_path, Head(5, "0" * 64))) == [5]


# ---- going on -------------------------------------------------------------------------------------------------------


def test_opening_again_goes_on(tmp_path):
    path = tmp_path / "audit.jsonl"
    heads = [write(path, 3) for _ in range(3)]
    assert [head.entries for head in heads] == [3, 6, 9]
    assert verify(path, KEY, heads[1]).intact


def test_opening_reads_the_end_alone(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    write(path, 200)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: (read.append(arguments[1]), pread(*arguments))[1])
    write(path, 1)
    assert read == [2 * MAX_LINE]
    assert path.stat().st_size > 2 * MAX_LINE
    assert verify(path, KEY).head.entries == 201


@pytest.mark.parametrize("entries", [1, 5])
def test_a_torn_line_is_cut_off_and_that_is_an_entry(entries, tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, entries)
    content = path.read_bytes()
    last = len(content.splitlines()[-1])
    for cut in range(1, last + 1):
        path.write_bytes(content[: len(content) - cut])
        before = verify(path, KEY)
        assert lines_of(before) in ([entries], [])  # nothing is left of it: nothing to see
        head = write(path, 1)
        assert verify(path, KEY, head).intact
        entry = unseal(path.read_bytes().splitlines()[-2], derive_key(KEY))
        assert entry["event"] == "torn_line"
        assert entry["bytes_cut"] == (0 if cut == 1 else last + 1 - cut)
        assert head.entries == entries + (2 if cut == 1 else 1)  # with all but its end it is completed


@pytest.mark.parametrize("tail", [b"\0" * 50, b'{"seq":', b"garbage"])
def test_what_a_power_cut_leaves_is_cut_off(tail, tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    path.write_bytes(path.read_bytes() + tail)
    assert verify(path, KEY, write(path, 1)).intact


def test_a_file_that_is_no_audit_is_left_alone(tmp_path):
    for content in (b"notes", b"notes\n", b"a" * 50_000, whole_line() + b"\nnotes\n"):
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(AuditBrokenError, match="Nothing was changed") as caught:
            Audit(path, KEY)
        assert caught.value.exit_code == 4
        assert path.read_bytes() == content


def whole_line():
    return seal({"seq": 1, "prev": START.hash}, derive_key(KEY))


@pytest.mark.parametrize("key", [KEY, b"another"])
def test_nothing_is_added_to_a_chain_whose_last_line_was_edited(whole, key, tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(whole[0] if key != KEY else whole[0].replace(b'"used":11', b'"used":12'))
    before = path.read_bytes()
    with pytest.raises(AuditBrokenError):
        Audit(path, key)
    assert path.read_bytes() == before


def test_one_process_writes_at_a_time(tmp_path):
    with Audit(tmp_path / "a", KEY), pytest.raises(AuditWriteError, match="another medvit"):
        Audit(tmp_path / "a", KEY)
    Audit(tmp_path / "a", KEY).close()


def test_a_full_disk_fails_closed_and_costs_no_entry(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 3)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Audit(path, KEY, ticking()) as audit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(AuditWriteError, match="make room on the disk"):
                audit.append("sent", used=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(AuditWriteError, match="closed after an error"):
            audit.append("sent", used=1)
        assert audit.head.entries == 3
    assert path.read_bytes() == before
    assert verify(path, KEY, write(path, 1)).head.entries == 4


def test_a_disk_that_cannot_even_take_back_leaves_a_torn_line(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    write(path, 3)

    def broken(*_):
        raise OSError(5, "Input/output error")

    with Audit(path, KEY, ticking()) as audit, monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", broken)
        patch.setattr(os, "fsync", broken)
        with pytest.raises(AuditWriteError, match="Input/output error"):
            audit.append("sent")
    assert verify(path, KEY, write(path, 1)).intact


@pytest.mark.parametrize("number", range(5))
def test_a_killed_process_leaves_a_chain_that_goes_on(number, tmp_path):
    path = tmp_path / "audit.jsonl"
    program = f"""
        from pathlib import Path
        from medvit.deployment.audit import Audit
        with Audit(Path({str(path)!r}), {KEY!r}) as audit:
            while True:
                print(*audit.append("read", used=1), flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as process:
        told = [process.stdout.readline() for _ in range(3 + number * 7)][-1].split()
        process.send_signal(signal.SIGKILL)
    head = Head(int(told[0]), told[1].decode())
    write(path, 1)
    assert verify(path, KEY, head).intact


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVIT_SITE_KEY", KEY.decode())
    path = tmp_path / "audit.jsonl"
    return path, write(path)


def test_doctor_says_that_it_is_whole(site, capsys):
    path, (entries, end) = site
    assert doctor.main(["--audit", str(path)]) == 0
    said = capsys.readouterr().out
    assert "12 entries, none edited" in said
    assert f"{entries}:{end}" in said
    assert doctor.main(["--audit", str(path), "--audit-end", f"{entries}:{end}"]) == 0
    assert "Nor is any missing" in capsys.readouterr().out


def test_doctor_says_which_line_is_not_and_ends_with_4(site, capsys):
    path, head = site
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"used":3', b'"used":4'))
    assert doctor.main(["--audit", str(path)]) == 4
    assert "line 4 was edited" in capsys.readouterr().out
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
    assert doctor.main(["--audit", str(path)]) == 0
    assert doctor.main(["--audit", str(path), "--audit-end", f"{head.entries}:{head.hash}", "--json"]) == 4
    assert "is absent: entry 12" in capsys.readouterr().out


def test_doctor_json(site, capsys):
    path, head = site
    assert doctor.main(["--audit", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "intact": True, "entries": ENTRIES, "hash": head.hash, "problems": []
    }  # fmt: skip
    path.write_bytes(b"x\n" + path.read_bytes())
    assert doctor.main(["--audit", str(path), "--json"]) == 4
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["line"] == 1


def test_doctor_needs_a_file_a_key_and_an_end_of_its_form(site, capsys, monkeypatch, tmp_path):
    path, _ = site
    assert doctor.main(["--audit", str(tmp_path / "none")]) == 2
    assert doctor.main(["--audit", str(path), "--audit-end", "12"]) == 2
    monkeypatch.delenv("MEDVIT_SITE_KEY")
    monkeypatch.setattr("medvit.data.site_key_path", lambda: tmp_path / "site.key")
    assert doctor.main(["--audit", str(path)]) == 2
    assert "no site key" in capsys.readouterr().err
    assert not (tmp_path / "site.key").exists()
