"""Results without identity: canaries in every tag of the confidentiality profile, and none in what is written.

Validators and `write_both` are those of test_results.
"""

import hashlib
import hmac
import logging
import re
import warnings
from dataclasses import replace

import highdicom as hd
import pytest
from ct_builder import GRIDS, Ct, EnhancedCt, put
from dicomanonymizer import simpledicomanonymizer as library
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.uid import UID
from test_results import (
    CONTEXT,
    LABELS,
    NAMES,
    dumped,
    errors_by_dciodvfy,
    false_alarm,
    one_slice,
    predicted,
    raw,
    said_by_pixelmed,
    write_both,
)

from medvit.io import open_source, write_sr
from medvit.io.deidentify import KEPT, SHAPES, TABLE, deidentify, keyed_uid
from medvit.io.results import encode, unjudged
from medvit.records import ScanError

TEXT = {"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
TAGS = sorted(
    keyword_for_tag(tag) for tag in TABLE if len(tag) == 2 and tag[0] > 8 and keyword_for_tag(tag)
    and dictionary_VR(tag) in TEXT | {"DA", "TM", "DT", "UI"}
)  # fmt: skip
TAGS += "PatientComments TextValue PersonName AccessionNumber StudyDescription InstitutionName TypeOfPatientID".split()
TAGS += "LossyImageCompressionRatio LossyImageCompressionMethod PatientAge StudyDate StudyTime".split()
CANARY = re.compile(rb"canary|(?<!\d)(?:1899\d{4}|031859)(?!\d)|\.498\.77", re.IGNORECASE)


def keyed(key):
    """Pseudonyms as a site makes them."""
    return lambda kind, value: hmac.new(key, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()[:16]


def anonymous(key=b"site"):
    return replace(CONTEXT, pseudonym=keyed(key))


def canary(keyword):
    return {
        "UI": b"1.2.826.0.1.3680043.8.498.777\0",
        "DA": b"18990203",
        "TM": b"031859",
        "DT": b"18990203031859",
        "AS": b"CANA",
        "DS": b"18990203",
        "CS": b"CANARY",
        "PN": b"Canary^Zo\xeb",
    }.get(dictionary_VR(keyword), b"CANARY")


def stamp(dataset, index=0):
    """A canary in each tag, in two sequences, in private elements."""
    for keyword in TAGS:
        put(dataset, keyword, canary(keyword) + b" " * (len(canary(keyword)) % 2))
    item = Dataset()
    for keyword in ("PatientID", "PatientName", "TextValue", "RequestedProcedureDescription"):
        put(item, keyword, b"CANARY")
    item.private_block(0x0029, "CANARY", create=True).add_new(1, "LO", "CANARY")
    dataset.OtherPatientIDsSequence = [item]
    dataset.RequestAttributesSequence = [item]
    dataset.private_block(0x0029, "CANARY", create=True).add_new(1, "PN", "Canary^Zoe")
    put(dataset, "SpecificCharacterSet", b"ISO_IR 100")


def stamp_source(dataset, index):
    """Canaries wherever the series stays readable; no stray study, whose result is refused."""
    uids = {keyword: dataset[keyword].value for keyword in "StudyInstanceUID SeriesInstanceUID SOPInstanceUID".split()}
    kept = {keyword: dataset[keyword].value for keyword in ("FrameOfReferenceUID",) if keyword in dataset}
    stamp(dataset)
    for keyword, value in {**uids, **kept}.items():
        setattr(dataset, keyword, value.replace(".498.", ".498.77") if keyword in uids else value)


def written_bytes(paths):
    return b"".join(path.name.encode() + b"\n" + path.read_bytes() for path in paths)


def test_no_canary_of_the_source_is_in_a_result_or_its_name(tmp_path, caplog, capfd):
    assert len(TAGS) > 60
    paths = Ct(damage=stamp_source).write(tmp_path / "ct")
    assert len(CANARY.findall(paths[0].read_bytes())) > 60
    source = open_source(paths)
    plain = write_both(source, tmp_path / "plain")
    assert CANARY.search(written_bytes(plain))  # else the rest proves nothing
    written = write_both(source, tmp_path / "out", context=anonymous())
    assert not CANARY.findall(written_bytes(written))
    assert [errors_by_dciodvfy(path) for path in written] == [[], []]
    assert not CANARY.search("".join(capfd.readouterr()).encode() + caplog.text.encode())


SPELLINGS = "utf-8 utf-16-le utf-16-be latin-1 cp932 euc_jp iso2022_jp gb18030 big5 euc_kr iso8859_5".split()


def spellings(raw_name):
    """Pieces of a name in all bytes that could stand for them."""
    texts = set()
    for encoding in SPELLINGS:
        try:
            texts |= set(re.findall(r"\w{2,}", raw_name.decode(encoding)))
        except UnicodeDecodeError:
            continue
    pieces = {raw_name} | {piece for piece in re.split(rb"[\^=\\ ]|\x1b[$()-][()]?.", raw_name) if len(piece) > 2}
    for text, encoding in ((text, encoding) for text in texts for encoding in SPELLINGS):
        try:
            piece = text.encode(encoding)
        except UnicodeEncodeError:
            continue
        pieces.add(piece.removeprefix(b"\x1b$B").removesuffix(b"\x1b(B"))
    return {piece for piece in pieces if len(piece) > 2}


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_left_in_any_spelling(tmp_path, name):
    charset, value = NAMES[name]

    def damage(dataset, index):
        put(dataset, "SpecificCharacterSet", charset if charset is None else charset + b" " * (len(charset) % 2))
        for keyword in ("PatientName", "PatientID", "StudyDescription", "ReferringPhysicianName", "AccessionNumber"):
            put(dataset, keyword, value + b" " * (len(value) % 2))

    paths = Ct(damage=damage).write(tmp_path / "ct")
    source = open_source(paths)
    looked_for = spellings(value)
    assert any(piece in paths[0].read_bytes() for piece in looked_for)
    written = write_both(source, tmp_path / "out", context=anonymous())
    # a picture's noise holds any three bytes
    headers = [path.read_bytes().partition(b"\xe0\x7f\x10\x00")[0] for path in written]
    assert not [piece for piece in looked_for for header in headers if piece in header]
    assert {raw(path, "SpecificCharacterSet") for path in written} == {"ISO_IR 192"}
    assert [errors_by_dciodvfy(path) for path in written] == [[], []]


@pytest.mark.parametrize("name", ["german", "unknown"])
def test_findings_keep_their_letters_whatever_the_source_has(tmp_path, name):
    def damage(dataset, index):
        put(dataset, "SpecificCharacterSet", NAMES[name][0])

    source = one_slice(tmp_path / "ct", damage)
    prediction = predicted([], probabilities=dict.fromkeys(LABELS, 0.2), threshold=None)
    path = write_sr(prediction, source, anonymous(), tmp_path)
    study, *_ = hd.sr.srread(path).content.get_image_measurement_groups()
    assert [one.name.meaning.removeprefix("Probability of ") for one in study.get_measurements()] == list(LABELS)
    assert errors_by_dciodvfy(path) == []
    dumped(path)


# ---- the profile ----------------------------------------------------------------------------------------------------


def every(dataset):
    """All datasets of an object, the outermost first."""
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from every(item)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(as in the source, without identity): report and picture each."""
    folder = tmp_path_factory.mktemp("deidentified")
    source = open_source(Ct().write(folder / "ct"))
    return write_both(source, folder / "plain"), write_both(source, folder / "out", context=anonymous())


def test_canaries_at_every_level_of_a_finished_object_are_gone(results, tmp_path):
    """What `deidentify` is given, here with more than medvit ever puts there."""
    for path in results[0]:
        document = dcmread(path)
        images = document.get("CurrentRequestedProcedureEvidenceSequence", document.get("SourceImageSequence"))
        for dataset in [document, images[0], *document.get("ContentSequence", [])[6:]]:
            here = {keyword: dataset.get(keyword) for keyword in dataset.dir() if keyword in KEPT}
            with unjudged():
                stamp(dataset)
                for keyword, value in here.items():
                    setattr(dataset, keyword, value)
        document.SOPInstanceUID = UID("1.2.826.0.1.3680043.8.498.77.1")
        for value_type, keyword in {"PNAME": "PersonName", "TEXT": "TextValue", "DATE": "Date"}.items():
            item = Dataset()
            item.ValueType = value_type
            put(item, keyword, canary(keyword))
            document.setdefault("ContentSequence", []).value.append(item)
        with unjudged():
            deidentify(document, keyed(b"site"), "0123456789abcdef")
            found = CANARY.findall(written_bytes([encode(document).write(tmp_path)]))
        assert not found, dcmread(tmp_path / f"{document.SOPInstanceUID}.dcm")


def test_it_says_that_identity_is_gone_and_how(results):
    for path in results[1]:
        document = dcmread(path)
        assert document.PatientIdentityRemoved == "YES"
        assert document.DeidentificationMethod
        codes = [item.CodeValue for item in document.DeidentificationMethodCodeSequence]
        assert codes == ["113100", "113104", "113105"]
        assert document.LongitudinalTemporalInformationModified == "REMOVED"
        assert document.PatientID == str(document.PatientName) == keyed(b"site")("patient", "Mueller-0815")
        assert {document.StudyDate, document.PatientBirthDate, document.PatientSex, document.AccessionNumber} == {""}
        assert document.ContentDate == "19000101"
        assert "research use" in document.SeriesDescription


def test_nothing_else_is_lost(results):
    """Attributes of each level are those of the plain result, less what the table takes."""
    for plain, clean in zip(*results, strict=True):
        for before, after in zip(every(dcmread(plain)), every(without_method(dcmread(clean))), strict=True):
            taken = {keyword for keyword in before.dir() if keyword not in KEPT and keyword not in SHAPES}
            assert set(before.dir()) - set(after.dir()) <= taken
            assert {keyword for keyword in after.dir() if TABLE.get(tuple(divmod(after[keyword].tag, 65536)))} <= {
                *before.dir(), "PatientName", "PatientID"
            }  # fmt: skip


def without_method(document):
    del document.DeidentificationMethodCodeSequence
    return document


def test_the_walk_of_the_library_does_not_suffice_for_reports_and_pictures(results):
    """Why `deidentify` reads its table alone; a version that does better may take over."""
    report, capture = (dcmread(path) for path in results[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls what pydicom 4 removes
        for document in (report, capture):
            library.anonymize_dataset(document, base_rules_gen=lambda: library.initialize_actions("dicomfields_2026c"))
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == dcmread(results[0][0]).StudyInstanceUID  # identity: not replaced in sequences
    assert report.ContentSequence[0].ValueType == "ANONYMIZED"  # nor is what is left a report
    assert report.ContentDate == "00010101"  # dciodvfy: invalid
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == ""
    assert "PatientIdentityRemoved" not in report


def test_other_programs_read_the_report(results):
    report = results[1][0]
    content = hd.sr.srread(report).content
    study, *slices = content.get_image_measurement_groups()
    assert study.finding_type.meaning == "bleed"
    assert slices
    assert 'NUM:(,,"Probability of bleed")="0.75"' in dumped(report)
    assert [errors_by_dciodvfy(path) for path in results[1]] == [[], []]
    assert not [line for line in said_by_pixelmed(report) if not false_alarm(line)]


def test_kinds_of_source_stay_valid(tmp_path):
    frames = open_source([EnhancedCt().write(tmp_path / "frames")])
    across = open_source(Ct(grid=GRIDS["coronal"]).write(tmp_path / "across"))
    absent = "StudyDate PatientName PatientBirthDate PatientSex PatientAge SpecificCharacterSet PatientID".split()
    bare = open_source(Ct(damage=lambda d, index: [put(d, one, None) for one in absent]).write(tmp_path / "bare"))
    for source in (frames, across, bare):
        written = write_both(source, tmp_path / "out", context=anonymous())
        assert [errors_by_dciodvfy(path) for path in written] == [[], []]


# ---- UIDs -----------------------------------------------------------------------------------------------------------


def instance_uids(path):
    """Every UID of an object that is no code of the standard's."""
    uids = {str(element.value) for dataset in every(dcmread(path)) for element in dataset if element.VR == "UI"}
    return {uid for uid in uids if not uid.startswith("1.2.840.10008.")}


def test_results_of_one_study_stay_together(tmp_path):
    paths = Ct().write(tmp_path / "ct")
    source = open_source(paths)
    other_model = replace(anonymous(), model_sha256="ef" * 32)
    first, second = (write_both(source, tmp_path / "out", context=one) for one in (anonymous(), other_model))
    read = [dcmread(path) for path in (*first, *second)]
    assert len({one.StudyInstanceUID for one in read}) == 1
    assert len({one.SOPInstanceUID for one in read}) == len({one.SeriesInstanceUID for one in read}) == 4
    assert len({one.PatientID for one in read}) == 1
    report, capture = read[:2]
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == report.StudyInstanceUID
    images = {one.ReferencedSOPInstanceUID for one in evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence}
    assert images == {keyed_uid(dcmread(path).SOPInstanceUID, keyed(b"site")) for path in paths}
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID in images
    shown = hd.sr.srread(first[0]).content.get_image_measurement_groups()[1].source_images[0]
    assert shown.referenced_sop_instance_uid in images


def test_no_uid_of_the_source_or_of_the_plain_result_is_left_and_keys_share_none(tmp_path):
    paths = Ct().write(tmp_path / "ct")
    source = open_source(paths)
    plain = write_both(source, tmp_path / "plain")
    one, other = (write_both(source, tmp_path / key, context=anonymous(key.encode())) for key in ("one", "other"))
    uids = [set().union(*map(instance_uids, each)) for each in ([*paths, *plain], one, other)]
    assert not any(uids[a] & uids[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert len({path.name for path in (*plain, *one, *other)}) == 6
    assert all(path.name == f"{dcmread(path).SOPInstanceUID}.dcm" for path in (*one, *other))
    assert all(dcmread(path).file_meta.MediaStorageSOPInstanceUID in path.name for path in (*one, *other))


def test_a_repeat_is_the_same_file_to_the_byte(tmp_path):
    source = open_source(Ct().write(tmp_path / "ct"))
    later = replace(anonymous(), now=CONTEXT.now.replace(year=2031))
    runs = [write_both(source, tmp_path / name, context=one) for name, one in (("a", anonymous()), ("b", later))]
    assert written_bytes(runs[0]) == written_bytes(runs[1])  # when it was made is not in it either


@given(st.text(), st.text(), st.binary(min_size=1))
def test_new_uids_are_legal_and_as_different_as_the_old(one, other, key):
    new = keyed_uid(one, keyed(key)) if one.isascii() else keyed_uid("1", keyed(key))
    assert UID(new).is_valid
    assert len(new) <= 64
    if one.isascii() and other.isascii():
        assert (new == keyed_uid(other, keyed(key))) == (one == other)


def test_a_new_uid_has_more_bits_than_one_pseudonym():
    seen = {keyed_uid("1.2", lambda kind, value, changed=changed: f"{kind == changed:08d}") for changed in KINDS}
    assert len(seen) == len(KINDS)


KINDS = ("uid", "uid, other half", "neither")


@pytest.mark.parametrize("leak", [lambda kind, value: value, lambda kind, value: "", lambda kind, value: "é" * 9])
def test_what_is_no_pseudonym_is_refused_before_anything_is_written(tmp_path, leak):
    source = open_source(Ct().write(tmp_path / "ct"))
    with pytest.raises(ValueError, match="pseudonym"):
        write_both(source, tmp_path / "out", context=replace(CONTEXT, pseudonym=leak))
    assert not list(tmp_path.glob("out/*"))


def test_names_in_unknown_character_sets_reach_no_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    source = one_slice(tmp_path / "ct", lambda d, index: [put(d, "SpecificCharacterSet", b"ISO_IR 99"), stamp_name(d)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_sr(predicted([(0, 1.0)]), source, anonymous(), tmp_path / "out")
    assert "canary" not in caplog.text.lower()


def stamp_name(dataset):
    put(dataset, "PatientName", b"Canary^\xff\xfe ")


def test_a_refusal_names_nobody(tmp_path):
    with pytest.raises(ScanError) as caught:
        one_slice(tmp_path, lambda dataset, index: [stamp(dataset), put(dataset, "StudyInstanceUID", None)])
    assert "canary" not in str(caught.value).lower()
