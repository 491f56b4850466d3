"""Text and identity: names in any character set come out right or flagged; two patients are never one."""

import pytest
from ct_builder import SLICES, Ct, both, change, phantom_hu
from hazard_cases import C, Expected, Truth, assert_never_silently_wrong, refused, right

from medvit.io import read, scan_folder

# ---- character sets -------------------------------------------------------------------------------------------------

JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"
HALF_WIDTH = "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"
RIGHT_NAMES = {
    # name: (SpecificCharacterSet, encoded name, the name)
    "Latin-1": ("ISO_IR 100", "Müller^Jürgen".encode("latin-1"), "Müller^Jürgen"),
    "Latin-2": ("ISO_IR 101", "Wałęsa^Żółw".encode("iso8859-2"), "Wałęsa^Żółw"),
    "Cyrillic": ("ISO_IR 144", "Люкceмбypг".encode("iso8859-5"), "Люкceмбypг"),
    "Greek": ("ISO_IR 126", "Διονυσιος".encode("iso8859-7"), "Διονυσιος"),
    "Hebrew": ("ISO_IR 138", "שרון^דבורה".encode("iso8859-8"), "שרון^דבורה"),
    "UTF-8": ("ISO_IR 192", "Wang^XiaoDong=王^小東".encode(), "Wang^XiaoDong=王^小東"),
    "GB18030": ("GB18030", "Wang^XiaoDong=王^小东".encode("gb18030"), "Wang^XiaoDong=王^小东"),
    "GBK": ("GBK", "Wang^XiaoDong=王^小东".encode("gbk"), "Wang^XiaoDong=王^小东"),
    "Thai": ("ISO_IR 166", "สมชาย".encode("tis-620"), "สมชาย"),
    # PS3.5 H.3.1: the standard's own example
    "Japanese, kanji by escape": (
        "\\ISO 2022 IR 87",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        JAPANESE,
    ),
    # PS3.5 H.3.2
    "Japanese, half-width katakana": (
        "ISO 2022 IR 13\\ISO 2022 IR 87",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
        HALF_WIDTH,
    ),
    # PS3.5 I.2
    "Korean": (
        "\\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    "Japanese, supplementary kanji": (
        "\\ISO 2022 IR 87\\ISO 2022 IR 159",
        b"Doi=\x1b$B;3\x1b(B^" + "丂".encode("iso2022_jp_2"),
        "Doi=山^丂",
    ),
}
WRONG_NAMES = {
    "Japanese as Latin-1": ("ISO_IR 100", JAPANESE.encode(), JAPANESE),
    "Cyrillic of Windows as Latin-1": ("ISO_IR 100", "Иванов".encode("cp1251"), "Иванов"),
    "Latin-1 as UTF-8": ("ISO_IR 192", "Müller".encode("latin-1"), "Müller"),
    "Latin-1 undeclared": (None, "Müller".encode("latin-1"), "Müller"),
    "UTF-8 undeclared": (None, "王^小東".encode(), "王^小東"),
    "empty declaration": ("", "Müller".encode("latin-1"), "Müller"),
    "unknown declaration": ("ISO_IR 999", "Müller".encode("latin-1"), "Müller"),
    "nonsense declaration": ("utf8 or so", "王^小東".encode(), "王^小東"),
    "cut in the middle of a character": ("ISO_IR 192", "王^小東".encode()[:-1] + b" ", "王^小東"),
    "bytes of no Latin-1 letter": ("ISO_IR 6", b"M\xfcller ", "Müller"),
}
FIELDS = ("PatientName", "SeriesDescription", "InstitutionName")


def named(charset, raw):
    """A series whose name, description and institution are these bytes."""
    padded = raw + b" " * (len(raw) % 2)
    text = {"PatientName": padded, "SeriesDescription": padded.replace(b"=", b"-"), "InstitutionName": padded}
    declared = None if charset is None else charset.encode() + b" " * (len(charset) % 2)
    return Ct(damage=change(SpecificCharacterSet=declared, **text))


@pytest.mark.parametrize("name", RIGHT_NAMES)
def test_declared_text_is_decoded(tmp_path, name):
    charset, raw, text = RIGHT_NAMES[name]
    named(charset, raw).write(tmp_path)
    (scan,) = assert_never_silently_wrong(tmp_path, right(Ct()))
    assert (scan.header.patient_name, scan.header.site) == (text, text)
    (series,) = scan_folder(tmp_path).series
    assert series.header.patient_name == text


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_text_that_contradicts_its_declaration_is_right_or_flagged_and_never_a_question_mark(tmp_path, name):
    charset, raw, text = WRONG_NAMES[name]
    named(charset, raw).write(tmp_path)
    (scan,) = assert_never_silently_wrong(tmp_path, right(Ct(), may=frozenset({C.CHARSET})))
    plausible = (scan.header.patient_name, scan.header.site) == (text, text)
    mislabelled = charset == "ISO_IR 100"  # any byte is a Latin-1 character: nobody can see that it is none
    assert plausible or C.CHARSET in scan.codes or mislabelled
    for shown in (scan.header.patient_name, scan.header.site, scan.header.description):
        assert "?" not in shown
        assert shown.strip()


@pytest.mark.parametrize("at", [0, 7])
def test_one_undecodable_slice_flags_the_series(tmp_path, at):
    Ct(damage=change(at, SpecificCharacterSet=b"ISO_IR 192", PatientName=b"M\xfcller")).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct(), C.CHARSET), refused(C.PATIENT_CONFLICT))


def test_question_marks_of_the_source_are_kept(tmp_path):
    Ct(damage=change(SeriesDescription=b"Thorax ?")).write(tmp_path)
    (scan,) = assert_never_silently_wrong(tmp_path, right(Ct()))
    assert scan.header.description == "Thorax ?"


@pytest.mark.parametrize("charset", ["ISO_IR 192", "ISO_IR 100", "GB18030", "\\ISO 2022 IR 87"])
def test_plain_text_is_the_same_in_any_set(tmp_path, charset):
    named(charset, b"Miller^John").write(tmp_path)
    (scan,) = assert_never_silently_wrong(tmp_path, right(Ct()))
    assert scan.header.patient_name == "Miller^John"


# ---- two patients ---------------------------------------------------------------------------------------------------

OTHER_PATIENT = {
    "id": {"PatientID": "Schmidt-7"},
    "birth date": {"PatientBirthDate": "19700102"},
    "sex": {"PatientSex": "M"},
}


@pytest.mark.parametrize("at", [0, 6, 11])
@pytest.mark.parametrize("name", OTHER_PATIENT)
def test_one_slice_of_another_patient_refuses_the_series(tmp_path, name, at):
    Ct(edit=change(at, **OTHER_PATIENT[name])).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.PATIENT_CONFLICT))


@pytest.mark.parametrize("name", OTHER_PATIENT)
def test_another_patient_in_the_study_refuses_all_of_it_and_nothing_else(tmp_path, name):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2, edit=change(**OTHER_PATIENT[name])).write(tmp_path, "b{}")
    bystander = Ct(study=2, patient="Schmidt-7")
    bystander.write(tmp_path, "c{}")
    assert_never_silently_wrong(tmp_path, right(bystander, aside={C.PATIENT_CONFLICT: 2 * SLICES}))


def test_a_stray_slice_in_a_third_series_refuses_the_study(tmp_path):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2).write(tmp_path, "b{}")
    Ct(uid=3, patient="Schmidt-7").write(tmp_path, "c{}", only=[4])
    assert_never_silently_wrong(tmp_path, refused(C.PATIENT_CONFLICT, 2 * SLICES + 1))


@pytest.mark.parametrize("phase", ["kernel", "orientation"])
def test_parts_of_one_series_must_show_one_patient(tmp_path, phase):
    """A split must not hide that the series held two patients."""
    tags = {"ConvolutionKernel": "B60f"} if phase == "kernel" else {"FrameOfReferenceUID": "1.2.77"}
    Ct(edit=change(ConvolutionKernel="B30f")).write(tmp_path, "a{}")
    other = both(change(SOPInstanceUID=lambda index: f"1.2.3.{index}"), change(**tags))
    Ct(patient="Schmidt-7", hu=phantom_hu() + 25, edit=other).write(tmp_path, "b{}")
    assert_never_silently_wrong(tmp_path, refused(C.PATIENT_CONFLICT, 2 * SLICES))


SAME_PATIENT = {
    "padded id": {"PatientID": b"Mueller-0815  "},
    "NUL-padded id": {"PatientID": b"Mueller-0815\0"},
    "name in another case": {"PatientName": "MUELLER^ANNA"},
    "age differs": {"PatientAge": "062Y"},
}


@pytest.mark.parametrize("name", SAME_PATIENT)
def test_one_patient_written_in_two_ways_is_no_conflict(tmp_path, name):
    Ct(damage=change(6, **SAME_PATIENT[name])).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


def test_two_studies_of_two_patients_are_no_conflict(tmp_path):
    Ct().write(tmp_path, "a{}")
    Ct(study=2, patient="Schmidt-7", hu=phantom_hu() + 25).write(tmp_path, "b{}")
    assert_never_silently_wrong(tmp_path, Expected((Truth(Ct().grid), Truth(Ct().grid, phantom_hu() + 25))))
    first, second = scan_folder(tmp_path).series
    assert read(first).header.patient_id != read(second).header.patient_id
