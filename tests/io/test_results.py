"""Results as DICOM: other people's validators find no error, other readers read them, and identity is the source's."""

import itertools
import warnings
from datetime import datetime
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pytest
from ct_builder import GRIDS, Ct, EnhancedCt, Grid, phantom_hu, put
from dicom_validators import dumped, errors_by_dciodvfy, false_alarm, said_by_pixelmed
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.config import IGNORE
from pydicom.config import settings as pydicom_settings

from medvit.io import (
    Finding,
    ResultContext,
    Source,
    deciding_slices,
    open_source,
    read,
    reorient_lps,
    result_uid,
    write_sc,
    write_sr,
)
from medvit.io.disk import DiskFullError
from medvit.io.phantom import make_patients, render, turn_prone, write_series
from medvit.io.results import MOST_DECIDING
from medvit.records import Prediction, ReasonCode, ScanError

CONTEXT = ResultContext(
    model_name="chest model",
    model_version="1.2.0",
    model_sha256="ab" * 32,
    config_sha256="cd" * 32,
    now=datetime(2025, 3, 4, 5, 6, 7, 890),
)

NAMES = {
    "german": (b"ISO_IR 100", b"M\xfcller^J\xf6rg"),
    "cyrillic": (b"ISO_IR 144", "Люкceмбypг".encode("iso8859_5")),
    "japanese": (
        rb"ISO 2022 IR 13\ISO 2022 IR 87",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
    ),
    "chinese": (b"GB18030", "Wang^XiaoDong=王^小东".encode("gb18030")),
    "korean": (rb"\ISO 2022 IR 149", b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab"),
    "unicode": (b"ISO_IR 192", "Yamada^Tarou=山田^太郎=やまだ^たろう".encode()),
    "empty": (b"", b"M\xfcller"),
    "undeclared": (None, "山田^太郎".encode()),
    "mislabelled": (b"ISO_IR 100", "山田^太郎".encode("cp932")),
    "unknown": (b"ISO_IR 999", b"\xff\xfe^\x80"),
}

IN_ERROR = {"empty", "undeclared", "mislabelled", "unknown"}
"""Names that are no text in the character set of the source: validators find that in a copy, too."""


def one_slice(folder, damage=None):
    """The source of the smallest series."""
    return open_source(Ct(hu=phantom_hu(1), damage=damage).write(folder))


def named(name):
    """An edit after encoding: this name, in its character set."""
    charset, raw = NAMES[name]

    def damage(dataset, index):
        put(dataset, "SpecificCharacterSet", charset if charset is None else charset + b" " * (len(charset) % 2))
        put(dataset, "PatientName", raw + b" " * (len(raw) % 2))

    return damage


def predicted(weights=((0, 0.2), (5, 0.5), (11, 0.3)), **changes):
    fields = {
        "case_id": "case",
        "patient_id": "hash",
        "probabilities": {"normal": 0.25, "bleed": 0.75},
        "threshold": 0.4,
        "flags": ("GANTRY_TILT", "SPACING_NONUNIFORM"),
        "slice_weights": tuple(weights),
    }
    return Prediction(**{**fields, **changes})


def picture(rows=128, columns=96):
    return np.random.default_rng(0).integers(0, 255, (rows, columns, 3)).astype(np.uint8)


def write_both(source, folder, prediction=None, context=CONTEXT):
    prediction = prediction or predicted()
    return write_sr(prediction, source, context, folder), write_sc(picture(), 5, source, context, folder)


def raw(path, keyword):
    """The bytes of an element as the file has them; None: absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown character sets
        element = dcmread(path).get_item(keyword)
    return None if element is None else element.value


# ---- other people's programs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Series of three sites, one of them of a prone patient, and what was written about each."""
    folder, series = tmp_path_factory.mktemp("hospital"), []
    for number, patient in enumerate(make_patients(3, 5)):
        hu, affine = render(patient, matrix=32, slices=6)
        if number == 1:
            hu, affine = turn_prone(hu, affine)
        source = open_source(write_series(folder / f"ct{number}", hu, affine, patient))
        prediction = predicted([(place, weight) for place, weight in enumerate((0.1, 0.1, 0.3, 0.2, 0.2, 0.1))])
        series.append(SimpleNamespace(source=source, written=write_both(source, folder / "out", prediction)))
    return series


def test_dciodvfy_finds_no_error(hospital):
    assert [errors_by_dciodvfy(path) for one in hospital for path in one.written] == [[]] * 6


def test_pixelmed_finds_no_error_in_the_template(tmp_path):
    """Japanese in name and finding, flags, operating point, deciding slices: one report, for this check is slow."""
    source = open_source(Ct(damage=named("japanese")).write(tmp_path / "ct"))
    report = write_sr(predicted(probabilities={"正常": 0.25, "出血": 0.75}), source, CONTEXT, tmp_path)
    assert hd.sr.srread(report).PatientName.ideographic == "山田^太郎"
    assert not [line for line in said_by_pixelmed(report) if not false_alarm(line)]


@pytest.mark.slow
def test_pixelmed_finds_no_error_in_any_kind_of_report(hospital, tmp_path):
    frames = open_source([EnhancedCt().write(tmp_path / "frames")])
    across = open_source(Ct(grid=GRIDS["coronal"]).write(tmp_path / "across"))
    several = predicted([], probabilities={"a": 0.2, "b": 0.3, "c": 0.5}, threshold=None, flags=())
    reports = [one.written[0] for one in hospital]
    reports += [write_sr(predicted(), source, CONTEXT, tmp_path) for source in (frames, across)]
    reports += [write_sr(several, one_slice(tmp_path / name, named(name)), CONTEXT, tmp_path / name) for name in NAMES]
    for report in reports:
        assert not [line for line in said_by_pixelmed(report) if not false_alarm(line)]


def test_dsrdump_shows_finding_probability_operating_point_flags_and_model(hospital):
    said = dumped(hospital[0].written[0])
    for line in (
        '"Finding")=(bleed,99MEDVIT,"bleed")',
        'NUM:(,,"Probability of bleed")="0.75"',
        'NUM:(,,"Probability of normal")="0.25"',
        'NUM:(,,"Operating point on bleed")="0.4"',
        '"Flag")=(GANTRY_TILT,99MEDVIT,"Gantry tilt")',
        '"Intended use")=(RESEARCH,99MEDVIT,"Research use")',
        '"Algorithm Name")="chest model"',
        '"Algorithm Version")="1.2.0"',
        '"Algorithm Parameters")="model sha256 abab',
    ):
        assert line in said


def test_highdicom_reads_the_report_as_tid_1500(hospital):
    for one in hospital:
        report = hd.sr.srread(one.written[0])
        assert type(report) is hd.sr.Comprehensive3DSR
        study, *slices = report.content.get_image_measurement_groups()
        assert study.finding_type.meaning == "bleed"
        assert [round(float(each.value), 6) for each in study.get_measurements()] == [0.25, 0.75, 0.4]
        assert [each.tracking_identifier for each in slices] == ["slice 3", "slice 4"]  # 0.3 + 0.2: half
        named = [group.source_images[0].referenced_sop_instance_uid for group in slices]
        assert named == [one.source.slices[place].sop_uid for place in (2, 3)]


def test_pydicom_reads_the_picture_with_the_words_in_it(hospital):
    capture = dcmread(hospital[0].written[1])
    before, after = picture(), capture.pixel_array
    assert after.shape == before.shape
    changed = (before != after).any(axis=2)
    assert changed.any()
    assert not changed[: len(changed) // 2].any()  # the lower edge alone
    assert capture.BurnedInAnnotation == "NO"
    assert "Research use" in capture.DerivationDescription
    (source,) = capture.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == hospital[0].source.slices[5].sop_uid


# ---- identity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_identity_is_that_of_the_source_to_the_byte(tmp_path, name):
    paths = Ct(damage=named(name)).write(tmp_path / "ct")
    written = write_both(open_source(paths), tmp_path / "out")
    for path, keyword in itertools.product(
        written, "SpecificCharacterSet PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID".split()
    ):
        assert (raw(path, keyword) or b"") == (raw(paths[0], keyword) or b""), keyword
    if name not in IN_ERROR:
        assert [errors_by_dciodvfy(path) for path in written] == [[], []]
    assert '99MEDVIT,"bleed"' in dumped(written[0])


LABELS = ("출혈", "出血", "Кровь", "Blutung über 5 ml", "😀")


@pytest.mark.parametrize("name", NAMES)
def test_a_finding_is_never_a_question_mark(tmp_path, name):
    """In its own letters where the source's character set has them, else spelled out."""
    source = one_slice(tmp_path / "ct", named(name))
    path = write_sr(predicted([], probabilities=dict.fromkeys(LABELS, 0.2), threshold=None), source, CONTEXT, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the source's character set may be unknown
        study, *_ = hd.sr.srread(path).content.get_image_measurement_groups()
        shown = [each.name.meaning.removeprefix("Probability of ") for each in study.get_measurements()]
    assert shown == [
        label if source.writes(label) else "".join(c if c < "~" else f"[U+{ord(c):04X}]" for c in label)
        for label in LABELS
    ]
    if name not in IN_ERROR:
        assert errors_by_dciodvfy(path) == []
    dumped(path)


def test_letters_of_a_character_set_are_written_in_it():
    def source(name):
        return Source((), False, {"SpecificCharacterSet": NAMES[name][0] or b""})

    assert all(source(name).writes("出血") for name in ("japanese", "chinese", "korean", "unicode"))
    assert not any(source(name).writes("出血") for name in ("german", "cyrillic", "undeclared", "unknown"))
    assert source("cyrillic").writes("Кровь")
    assert source("german").writes("über")
    assert not source("undeclared").writes("über")


def test_a_configured_code_names_the_finding(tmp_path):
    source = open_source(Ct().write(tmp_path / "ct"))
    code = Finding("50960005", "SCT", "Hemorrhage")
    context = ResultContext(**{**vars(CONTEXT), "findings": {"bleed": code}})
    report = hd.sr.srread(write_sr(predicted(), source, context, tmp_path))
    finding = report.content.get_image_measurement_groups()[0].finding_type
    assert (finding.value, finding.scheme_designator, finding.meaning) == tuple(code)


@settings(max_examples=25, deadline=None)
@given(value=st.binary(max_size=40).map(lambda some: some + b" " * (len(some) % 2)))
def test_any_bytes_of_name_and_ids_are_copied(tmp_path_factory, value):
    tmp_path = tmp_path_factory.mktemp("any")

    def damage(dataset, index):
        for keyword in ("PatientName", "PatientID", "AccessionNumber", "StudyID", "StudyDate"):
            put(dataset, keyword, value)

    source = one_slice(tmp_path / "ct", damage)
    path = write_sr(predicted([(0, 1.0)]), source, CONTEXT, tmp_path / "out")
    assert {raw(path, keyword) or b"" for keyword in ("PatientName", "PatientID", "StudyID")} == {value}


# ---- names and repetition -------------------------------------------------------------------------------------------

PARTS = st.lists(st.text(), min_size=1, max_size=5)


@given(PARTS, PARTS)
def test_result_uids_are_legal_and_as_different_as_what_they_name(one, other):
    uid = result_uid(*one)
    assert hd.UID(uid).is_valid
    assert len(uid) <= 64
    assert uid == result_uid(*one)
    assert (uid == result_uid(*other)) == (one == other)


def test_result_uids_stay_the_same_between_versions():
    """A PACS that holds results of last year must find this year's repeat equal."""
    assert result_uid("report", "1.2", "1.2.3") == "2.25.314270123209863469555859810093775236994"


def test_a_repeat_is_the_same_file_to_the_byte(tmp_path):
    paths = Ct().write(tmp_path / "ct")
    first = write_both(open_source(paths), tmp_path / "one")
    again = write_both(open_source(paths[::-1]), tmp_path / "two")  # files in another order
    assert [path.name for path in first] == [path.name for path in again]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    write_both(open_source(paths), tmp_path / "one")
    assert sorted((tmp_path / "one").iterdir()) == sorted(first)  # nothing added, no temporary file left


def test_another_model_or_configuration_is_another_result(tmp_path):
    source = open_source(Ct().write(tmp_path / "ct"))
    contexts = [
        ResultContext(**{**vars(CONTEXT), **change}) for change in ({}, {"model_sha256": "1"}, {"config_sha256": "1"})
    ]
    assert len({write_sr(predicted(), source, context, tmp_path) for context in contexts}) == 3


HOSTILE = [b"../../../etc/passwd", b"a\0b", rb"..\..\x", b"9" * 300, "😀\u202e".encode(), b"/abs", b"CON", b"=1+1"]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_ids_stay_inside_the_objects(tmp_path, value):
    value += b" " * (len(value) % 2)

    def damage(dataset, index):
        for keyword in ("PatientID", "PatientName", "AccessionNumber", "StudyID"):
            put(dataset, keyword, value)

    paths = Ct(damage=damage).write(tmp_path / "ct")
    before = set(tmp_path.rglob("*"))
    written = write_both(open_source(paths), tmp_path / "out")
    assert set(tmp_path.rglob("*")) - before == {*written, tmp_path / "out"}
    for path in written:
        assert path.parent == tmp_path / "out"
        assert path.name.removesuffix(".dcm").replace(".", "").isdigit()
        assert raw(path, "PatientID") == value


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
@pytest.mark.parametrize("value", HOSTILE)
def test_nothing_is_written_about_a_series_with_hostile_uids(tmp_path, keyword, value):
    with pytest.raises(ScanError) as caught:
        one_slice(tmp_path, lambda dataset, index: put(dataset, keyword, value + b"\0" * (len(value) % 2)))
    assert caught.value.code is ReasonCode.UNSAFE_NAME


def test_uids_that_are_harmless_but_illegal_are_copied_without_a_word(tmp_path, caplog):
    """Leading zeros are common; a warning would carry them into logs."""

    def damage(dataset, index):
        put(dataset, "StudyInstanceUID", b"1.02.3")
        put(dataset, "SOPInstanceUID", f"1.02.{index:03d} ".encode()[:8])

    source = open_source(Ct(damage=damage).write(tmp_path / "ct"))
    modes = pydicom_settings.reading_validation_mode, pydicom_settings.writing_validation_mode
    report, _ = write_both(source, tmp_path / "out")
    assert not caplog.records
    assert (pydicom_settings.reading_validation_mode, pydicom_settings.writing_validation_mode) == modes
    assert raw(report, "StudyInstanceUID") == b"1.02.3"
    assert IGNORE not in modes


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    source = open_source(Ct().write(tmp_path / "ct"))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(DiskFullError, match="the disk is full"):
        write_sr(predicted(), source, CONTEXT, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- which image is which slice -------------------------------------------------------------------------------------

FROM_BELOW = Grid(column=(0, -1, 0), step=(0, 0, -2.5))  # rows × columns point to the feet: a model sees it backwards


@pytest.mark.parametrize("grid", [GRIDS["axial"], GRIDS["head_last"], GRIDS["prone"], GRIDS["oblique"], FROM_BELOW])
def test_a_slice_of_a_prediction_is_the_image_at_its_place(tmp_path, grid):
    paths = Ct(grid=grid).write(tmp_path)
    source, oriented = open_source(paths), reorient_lps(read(tmp_path))
    places = {dataset.SOPInstanceUID: dataset.ImagePositionPatient for dataset in map(dcmread, paths)}
    for number in (0, 3, 11):
        corner = (oriented.affine @ (0, 0, number, 1))[:3]
        assert grid.normal @ (corner - places[source.image(number).sop_uid]) == pytest.approx(0, abs=1e-3)


def test_slices_as_stored_are_not_turned(tmp_path):
    paths = Ct(grid=FROM_BELOW).write(tmp_path)
    turned, stored = open_source(paths), open_source(paths, as_stored=True)
    assert turned.slices == stored.slices[::-1]


@pytest.mark.parametrize("grid", [GRIDS["coronal"], GRIDS["sagittal"]])
def test_where_slices_cut_across_images_none_is_named(tmp_path, grid):
    source = open_source(Ct(grid=grid).write(tmp_path / "ct"))
    report, capture = write_both(source, tmp_path)
    assert len(hd.sr.srread(report).content.get_image_measurement_groups()) == 1
    assert "SourceImageSequence" not in dcmread(capture)
    assert [errors_by_dciodvfy(path) for path in (report, capture)] == [[], []]


def test_frames_of_a_multiframe_image_are_named(tmp_path):
    order = (3, 1, 0, 2, 5, 4, 6, 7, 11, 9, 10, 8)
    path = EnhancedCt(frames=order).write(tmp_path / "ct")
    source = open_source([path])
    report, capture = write_both(source, tmp_path, predicted([(5, 1.0)]))
    (image,) = hd.sr.srread(report).content.get_image_measurement_groups()[1].source_images
    assert image.referenced_frame_numbers == [order.index(5) + 1]
    assert dcmread(capture).SourceImageSequence[0].ReferencedFrameNumber == order.index(5) + 1
    evidence = hd.sr.srread(report).get_evidence()
    assert [uid for _, _, uid, _ in evidence] == [dcmread(path).SOPInstanceUID]
    assert [errors_by_dciodvfy(each) for each in (report, capture)] == [[], []]


def test_the_fewest_slices_that_hold_half_of_the_attention_decide():
    assert deciding_slices(predicted([(0, 0.2), (4, 0.35), (9, 0.35), (11, 0.1)])) == ((4, 0.35), (9, 0.35))
    assert len(deciding_slices(predicted([(number, 1 / 12) for number in range(12)]))) == MOST_DECIDING < 6
    assert len(deciding_slices(predicted([(number, 1 / 6) for number in range(6)]))) == 3
    assert deciding_slices(predicted([])) == ()


# ---- what may be missing --------------------------------------------------------------------------------------------


def test_absent_patient_and_study_attributes_are_empty_not_invented(tmp_path):
    absent = "StudyDate PatientName PatientBirthDate PatientSex PatientAge SpecificCharacterSet PatientID".split()
    paths = Ct(damage=lambda dataset, index: [put(dataset, keyword, None) for keyword in absent]).write(tmp_path / "ct")
    written = write_both(open_source(paths), tmp_path)
    assert [errors_by_dciodvfy(path) for path in written] == [[], []]
    assert {raw(path, "StudyDate") for path in written} == {None, b""} - {None}
    assert not any("PatientAge" in dcmread(path) for path in written)


def test_no_report_about_another_series(tmp_path):
    source = one_slice(tmp_path / "ct")
    write_sr(predicted([(0, 1.0)], series_uid=source.uids[1]), source, CONTEXT, tmp_path)
    with pytest.raises(ValueError, match="another series"):
        write_sr(predicted([(0, 1.0)], series_uid="1.2.3"), source, CONTEXT, tmp_path)


def test_no_result_without_a_study(tmp_path):
    paths = Ct(edit=lambda dataset, index: dataset.pop("StudyInstanceUID")).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        open_source(paths)
    assert caught.value.code is ReasonCode.TAG_INVALID


def test_pictures_of_lossy_images_say_so(tmp_path):
    def edit(dataset, index):
        dataset.LossyImageCompression, dataset.LossyImageCompressionRatio = "01", 7.5

    _, capture = write_both(open_source(Ct(edit=edit).write(tmp_path / "ct")), tmp_path)
    assert (dcmread(capture).LossyImageCompression, dcmread(capture).LossyImageCompressionRatio) == ("01", 7.5)
    assert errors_by_dciodvfy(capture) == []


@pytest.mark.parametrize("shape", [(1, 1), (20, 24), (33, 77)])
def test_pictures_of_any_size(tmp_path, shape):
    source = open_source(Ct().write(tmp_path / "ct"))
    capture = write_sc(picture(*shape), 0, source, CONTEXT, tmp_path)
    assert dcmread(capture).pixel_array.shape == (*shape, 3)
    assert errors_by_dciodvfy(capture) == []


def test_what_is_no_picture_is_refused(tmp_path):
    source = open_source(Ct().write(tmp_path / "ct"))
    with pytest.raises(ValueError, match="uint8"):
        write_sc(picture().astype(np.float32), 0, source, CONTEXT, tmp_path)


@pytest.mark.parametrize("name", ["", "模型", "a\\b", "a\nb", "x" * 65])
def test_a_model_needs_a_name_that_every_character_set_can_write(name):
    with pytest.raises(ValueError, match="ASCII"):
        ResultContext(**{**vars(CONTEXT), "model_name": name})


def test_any_class_name_has_a_legal_code(tmp_path):
    labels = ["x" * 200, "x" * 201, "a\\b", "\0", " ", "../../x", "1"]
    prediction = predicted([], probabilities=dict.fromkeys(labels, 1 / 7), threshold=None)
    report = write_sr(prediction, one_slice(tmp_path / "ct"), CONTEXT, tmp_path)
    assert errors_by_dciodvfy(report) == []
    study, *_ = hd.sr.srread(report).content.get_image_measurement_groups()
    assert len({each.name.value for each in study.get_measurements()}) == 7
    assert study.finding_type.scheme_designator == "99MEDVIT"
