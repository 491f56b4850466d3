"""No text of another library reaches stderr or any handler while a command runs; what medvit says does."""

import io
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pydicom
import pytest
from ct_builder import Ct, put
from pydicom import dcmread

from medvit.cli.console import command
from medvit.cli.logs import identity_withheld, outline
from medvit.io import read_files
from medvit.records import MedvitError

CANARY = "Canary^Anna"
LEVELS = [1, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, 60]


@pytest.fixture(params=["", "1"], ids=["", "debug"])
def anyhow(request, monkeypatch):
    """With and without MEDVIT_DEBUG."""
    monkeypatch.setenv("MEDVIT_DEBUG", request.param)


@pytest.fixture
def library():
    """A logger with a handler of its own that shows all and passes nothing on, as many libraries have."""
    logger, stream = logging.getLogger("pynetdicom.test"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s %(msg)s"))
    logger.addHandler(handler)
    logger.setLevel(1)
    yield logger, stream
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def told(run, capfd):
    """What a command that does this prints, on both streams."""
    status = command(lambda argv: run() or 0)([])
    out, err = capfd.readouterr()
    return status, out + err


def raise_canary():
    raise ValueError(CANARY)


@pytest.mark.usefixtures("anyhow")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("propagate", [True, False])
def test_no_text_of_a_library_at_any_level(level, propagate, library, capfd):
    logger, stream = library
    logger.propagate = propagate

    def run():
        logger.log(level, CANARY)
        logger.log(level, "name %s", CANARY)
        logger.log(level, "name %(name)s", {"name": CANARY})
        logger.log(level, "%d", CANARY)  # logging prints what it cannot format
        logger.log(level, ValueError(CANARY))
        logger.log(level, "", stack_info=True)
        logging.getLogger().log(max(level, logging.WARNING), CANARY)  # through logging.warning

    status, said = told(run, capfd)
    assert status == 0
    assert "Canary" not in said + stream.getvalue()
    assert "test_logs.py" not in said + stream.getvalue()
    assert (f"pynetdicom.test: {logging.getLevelName(level).lower()}" in said) == (propagate and level >= 30)


@pytest.mark.usefixtures("anyhow")
def test_no_text_of_an_exception_and_only_our_lines(library, capfd, tmp_path):
    logger, stream = library

    def run():
        for speaker in (logger, logging.getLogger("medvit.test"), logging.getLogger("medvit")):
            try:
                try:
                    raise_canary()
                except ValueError as error:
                    raise KeyError(CANARY) from error
            except KeyError as error:
                speaker.exception("it failed: %s", error)
                speaker.error(error)
                speaker.error("again", exc_info=error)
                speaker.warning("%s", CANARY if speaker is logger else "", exc_info=True)
        try:
            read_files([tmp_path / CANARY])
        except Exception:
            logging.getLogger("medvit.test").exception("reading failed")

    status, said = told(run, capfd)
    assert status == 0
    assert "Canary" not in said + stream.getvalue()
    assert "it failed: KeyError" in said
    assert "KeyError\nValueError" in said
    assert "test_logs.py" not in said
    assert "  medvit/io/" in said
    assert "KeyError" in stream.getvalue()


@pytest.mark.usefixtures("anyhow")
def test_warnings_are_not_shown_whatever_a_library_does_to_filters(capfd, library):
    def run():
        warnings.warn(CANARY, stacklevel=1)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(CANARY, stacklevel=1)
            warnings.warn_explicit(CANARY, UserWarning, CANARY, 1)
        warnings.simplefilter("always")
        warnings.warn(CANARY, stacklevel=1)
        logging.captureWarnings(True)
        warnings.warn(CANARY, stacklevel=1)
        logging.captureWarnings(False)

    status, said = told(run, capfd)
    assert status == 0
    assert "Canary" not in said


def test_an_exception_that_ends_a_thread_is_shown_by_kind(capfd):
    class Dying:
        def __del__(self):
            raise_canary()

    def stray():
        thread = threading.Thread(target=raise_canary, name=CANARY)
        thread.start()
        thread.join()
        one = Dying()
        del one

    status, said = told(stray, capfd)
    assert status == 0
    assert said.count("unexpected error beside the run: ValueError") == 2
    assert "Canary" not in said


def test_records_made_elsewhere_lose_their_text_too(capfd):
    def run():
        try:
            raise_canary()
        except ValueError:
            made = {"msg": "from %s", "args": ("a queue",), "exc_info": sys.exc_info(), "stack_info": CANARY}
        made |= {"levelno": 40, "levelname": "ERROR"}
        for name in ("pydicom", "medvit.worker"):
            logging.getLogger().handle(logging.makeLogRecord({**made, "name": name}))

    status, said = told(run, capfd)
    assert status == 0
    assert "Canary" not in said
    assert "pydicom: error" in said
    assert "from a queue\nValueError" in said


def test_what_medvit_says_passes(capfd):
    def run():
        logging.getLogger("medvit.cache").warning("cache entry %s is damaged (%d)", "0123", 7)
        logging.getLogger("medvit.cache").info("not shown")
        logging.getLogger("medvit").error("refused: %s", MedvitError("say what to do"))
        logging.getLogger("medvit").error("%d", CANARY)  # our mistake
        logging.getLogger("medvitx").error("not ours")

    _, said = told(run, capfd)
    assert said.splitlines() == [
        "cache entry 0123 is damaged (7)",
        "refused: say what to do",
        "medvit: error (cannot be formatted)",
        "medvitx: error (text withheld, for it may name a patient)",
    ]


def test_a_library_is_named_once_for_each_level(capfd):
    def run():
        for _ in range(1000):
            logging.getLogger("pydicom").warning(CANARY)
            logging.getLogger("pydicom").error(CANARY)

    _, said = told(run, capfd)
    assert len(said.splitlines()) == 2


def test_all_is_as_before_after_a_command(capfd):
    hooks = logging.getLogRecordFactory(), logging.raiseExceptions, threading.excepthook, sys.unraisablehook
    handlers, shown = list(logging.getLogger().handlers), warnings.showwarning

    def nested():
        with identity_withheld():
            told(raise_canary, capfd)
        logging.getLogger("pydicom").error(CANARY)

    _, said = told(nested, capfd)
    assert said.count("pydicom: error") == 1
    assert "Canary" not in said
    assert hooks == (logging.getLogRecordFactory(), logging.raiseExceptions, threading.excepthook, sys.unraisablehook)
    assert logging.getLogger().handlers == handlers
    assert warnings.showwarning is shown


def test_an_outline_ends_where_causes_form_a_ring():
    one, other = ValueError(CANARY), KeyError(CANARY)
    one.__cause__, other.__cause__ = other, one
    assert outline(one) == "ValueError\nKeyError"
    assert outline(None) == ""


def test_the_header_of_a_patient_that_pydicom_complains_about_is_not_shown(capfd, tmp_path):
    """The case that this is for: pydicom's own words about an illegal value and an unknown character set."""

    def damage(dataset, index):
        put(dataset, "SpecificCharacterSet", b"ISO_IR 999")
        put(dataset, "PatientBirthDate", b"CANARY01")
        put(dataset, "PatientName", b"Canary^\xff ")
        put(dataset, "StudyInstanceUID", b"1.2.Canary.4")

    path, *_ = Ct(damage=damage).write(tmp_path)

    def run():
        pydicom.config.debug(True)
        try:
            str(dcmread(path))
        finally:
            pydicom.config.debug(False)

    status, said = told(run, capfd)
    assert status in (0, 1)
    assert "canary" not in said.lower()
    assert "pydicom: " in said


@pytest.mark.parametrize("debug", ["", "1"])
def test_unexpected_errors_are_as_documented(debug, tmp_path):
    """By kind, and with MEDVIT_DEBUG where; in a process of its own, down to its stderr."""
    program = """
        import sys
        from medvit.cli.console import command
        def run(argv):
            import logging, warnings
            logging.getLogger("pydicom").warning("Canary^Log")
            warnings.warn("Canary^Warning")
            warnings.simplefilter("always")
            warnings.warn("Canary^Warning")
            raise ValueError("Canary^Error")
        sys.exit(command(run)([]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "MEDVIT_DEBUG": debug}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Canary^Log" not in done.stderr
    assert "Canary^Warning" not in done.stderr
    assert ("Canary^Error" in done.stderr) == bool(debug)
    assert ("MEDVIT_DEBUG=1 shows where" in done.stderr) == (not debug)
