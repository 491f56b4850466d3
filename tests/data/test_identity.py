"""One person is one group, whatever the ids: 50 planted duplicates found, 200 different people kept apart (G13)."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest

from medvit.data import group_cases, slice_prints
from medvit.data.copies import near_copies
from medvit.data.identity import identities
from medvit.data.pipelines import prepare_slices
from medvit.io import phantom, read_files, scan_folder
from medvit.records import Case, Preprocessing, ReasonCode, Scan, ScanHeader

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


def case(number, header, series=""):
    return Case(
        case_id=f"c{number}",
        patient_id=header.patient_id,
        group=header.patient_id,
        root="",
        files=(),
        identities=identities(header, header.patient_id),
        series_uid=series or f"s{number}",
    )


def people(*headers):
    """Cases of headers given as dicts; each has an id of its own unless it says so."""
    return [case(n, ScanHeader(**({"patient_id": f"id{n}"} | header))) for n, header in enumerate(headers)]


def prints_of(hu):
    scan = Scan(hu=np.ascontiguousarray(hu, np.float32), affine=AFFINE)
    return slice_prints(prepare_slices(scan, Preprocessing(size=64)))


def body(seed, slices=6, matrix=48):
    (person,) = phantom.make_patients(1, seed)
    return phantom.render(person, matrix=matrix, slices=slices)[0]


def jpeg2000(hu, ratio):
    planes = np.clip(hu + 1024, 0, 65535).astype(np.uint16)
    setting = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000 // ratio]
    decoded = [cv2.imdecode(cv2.imencode(".jp2", p, setting)[1], cv2.IMREAD_UNCHANGED) for p in planes]
    return np.stack(decoded).astype(np.float32) - 1024


# ---- the whole: 200 people, 50 of them twice ------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A second appearance of a person: what its header says, and its pixels; None has others (another visit)."""

    header: ScanHeader
    hu: np.ndarray | None


def again(kind, header, hu, number):
    """What a second site makes of a person's scan."""
    stranger = ScanHeader(patient_id=f"new{number}", patient_name=f"SUBJ{number}", frame_of_reference=f"2.25.9{number}")
    match kind:
        case "same id at two sites":
            punctuated = header.patient_id.lower().replace("-", " ")
            return Planted(replace(stranger, patient_id=punctuated, issuer="South", patient_name="ANON"), None)
        case "another id, same name and birth date":
            name = header.patient_name.upper().replace("^", ", ")
            return Planted(replace(stranger, patient_name=name, birth_date=header.birth_date), None)
        case "new UIDs":
            return Planted(stranger, hu)
        case "compressed without loss":
            return Planted(stranger, jpeg2000(hu, 1))
        case "compressed with loss":
            return Planted(stranger, jpeg2000(hu, 10))
        case "some slices":
            return Planted(stranger, hu[2:4][::-1])
        case "some slices with loss":
            return Planted(stranger, jpeg2000(hu[1:3], 10))


KINDS = [
    "same id at two sites",
    "another id, same name and birth date",
    "new UIDs",
    "compressed without loss",
    "compressed with loss",
    "some slices",
    "some slices with loss",
]


def test_fifty_planted_duplicates_are_found_and_two_hundred_people_stay_apart():
    cases, prints = [], {}

    def add(header, hu):
        cases.append(case(len(cases), header))
        prints[cases[-1].case_id] = prints_of(hu)

    planted = []
    for number, person in enumerate(phantom.make_patients(200, 5)):
        kind = KINDS[number % len(KINDS)] if number < 50 else ""
        # lossy codecs are judged at a matrix more like a scanner's: on few pixels they leave little
        hu, _ = phantom.render(person, matrix=256 if "with loss" in kind else 48, slices=4)
        header = ScanHeader(
            patient_id=person.patient_id,
            patient_name=person.name,
            birth_date=f"{2024 - person.age}{number % 12 + 1:02d}{number % 27 + 2:02d}",
            frame_of_reference=f"1.2.{number}",
        )
        add(header, hu)
        if kind:
            planted.append((kind, len(cases) - 1, again(kind, header, hu, number)))
    for number, (_, _, copy) in enumerate(planted):
        add(copy.header, body(1000 + number, slices=4) if copy.hu is None else copy.hu)
    grouped = group_cases(cases, prints).cases
    missed = [kind for n, (kind, first, _) in enumerate(planted) if grouped[first].group != grouped[200 + n].group]
    assert (len(planted), missed) == (50, [])
    assert len({one.group for one in grouped}) == 200  # nobody was joined with anybody else


# ---- names ----------------------------------------------------------------------------------------------------------

ANNA = {"patient_name": "Müller^Anna", "birth_date": "19600302"}
SAME = [
    ({"patient_id": "PAT-01"}, {"patient_id": "pat 01", "issuer": "South"}),
    (ANNA, {"patient_name": "MULLER, ANNA", "birth_date": "1960.03.02"}),
    (ANNA, {"patient_name": "Ｍüller^Anna^^", "birth_date": "19600302"}),  # full-width, as some systems write
    (
        {"patient_name": "Yamada^Tarou=山田^太郎=やまだ^たろう", "birth_date": "19600302"},
        {"patient_name": "=山田^太郎", "birth_date": "19600302"},
    ),
    ({"frame_of_reference": "1.2.3"}, {"frame_of_reference": "1.2.3"}),
]
OTHER = [
    (ANNA, ANNA | {"birth_date": "19600303"}),
    (ANNA, {"patient_name": "Müller^Anna"}),  # a name alone names many
    ({"patient_name": "Müller^Anna"}, {"patient_name": "Müller^Anna"}),
    ({"birth_date": "19600302"}, {"birth_date": "19600302"}),
    ({"patient_name": "ANONYMOUS^PATIENT", "birth_date": "19600302"},) * 2,
    ({"patient_name": "xxx", "birth_date": "19600302"},) * 2,
    (ANNA | {"birth_date": "19600101"},) * 2,
    ({"frame_of_reference": "1.2.840.10008.1.4.1.1"},) * 2,
    ({"frame_of_reference": ""}, {}),
]


@pytest.mark.parametrize(("one", "two"), SAME)
def test_one_person_however_written_is_one_group(one, two):
    result = group_cases(people(one, two), {})
    assert len({c.group for c in result.cases}) == 1
    assert len(result.bonds) == 1


@pytest.mark.parametrize(("one", "two"), OTHER)
def test_what_names_nobody_joins_nobody(one, two):
    assert len({c.group for c in group_cases(people(one, two), {}).cases}) == 2


def test_groups_join_through_others_in_any_order():
    chain = people(ANNA, ANNA | {"frame_of_reference": "1.2"}, {"frame_of_reference": "1.2"}, {})
    forward, backward = group_cases(chain, {}), group_cases(chain[::-1], {})
    assert len({c.group for c in forward.cases}) == 2
    assert forward.cases == backward.cases[::-1]
    assert sorted(bond.reason for bond in forward.bonds) == ["frame of reference", "name and birth date"]


def test_an_identity_that_many_patients_share_is_told_and_not_used():
    many = people(*[{"frame_of_reference": "1.2.3"}] * 12, *[{}] * 30)
    result = group_cases(many, {})
    assert [c.group for c in result.cases] == [c.group for c in many]
    ((reason, patients),) = [(bond.reason, bond.patients) for bond in result.unused]
    assert (reason, len(patients), result.bonds) == ("frame of reference", 12, ())


def test_identities_hold_no_identity():
    told = str(people(ANNA | {"patient_id": "Mueller-0815", "frame_of_reference": "1.22.333"})[0].identities).casefold()
    assert not [word for word in ("müller", "muller", "anna", "0815", "1960", "1.22.333") if word in told]


# ---- pixels ---------------------------------------------------------------------------------------------------------


def pixels(*volumes):
    cases = people(*[{}] * len(volumes))
    return group_cases(cases, {c.case_id: prints_of(hu) for c, hu in zip(cases, volumes, strict=True)})


def test_shared_slices_are_flagged_and_the_reason_is_told():
    result = pixels(body(1), body(1)[4:], body(2))
    assert [ReasonCode.DUP_IDENTICAL in c.codes for c in result.cases] == [True, True, False]
    assert [(bond.reason, bond.patients) for bond in result.bonds] == [("identical slices", ("id0", "id1"))]
    assert [c.patient_id for c in result.cases] == ["id0", "id1", "id2"]


def test_a_copy_in_another_matrix_or_with_other_padding_is_found():
    hu = body(1, matrix=128)
    cut = np.where(hu < -980, -1024, hu)
    assert len(pixels(hu, cut).bonds) == 1
    assert len(pixels(hu, np.repeat(np.repeat(hu, 2, 1), 2, 2)).bonds) == 1


def test_slices_that_show_nothing_are_no_evidence():
    air = np.full((3, 48, 48), -1000.0)
    table = air.copy()
    table[:, 40:42, 8:40] = -150
    assert pixels(air, air).bonds == pixels(table, table).bonds == pixels(air + 1040, air + 1040).bonds == ()
    assert pixels(np.concatenate([table, body(1)]), np.concatenate([table, body(2)])).bonds == ()


def test_a_few_slices_alike_join_no_long_series():
    noise = np.random.default_rng(0).normal(0, 1, (2, 48, 48))
    one, two = body(1, slices=6), body(2, slices=6)
    two[:2] = one[:2] + noise
    assert pixels(one, two).bonds == ()
    assert len(pixels(one, two[:3]).bonds) == 1


def test_single_slices_as_cases_are_judged_with_their_series():
    noise = np.random.default_rng(0).normal(0, 1, (48, 48))
    one, two = body(1, slices=4), body(2, slices=4)
    two[0] = one[0] + noise
    cases = [case(f"{p}{n}", ScanHeader(patient_id=p), series=p) for p in "ab" for n in range(4)]
    prints = {c.case_id: prints_of(plane[None]) for c, plane in zip(cases, (*one, *two), strict=True)}
    assert near_copies(cases, prints) == []
    kept = [c for c in cases if c.case_id in ("ca0", "cb0", "cb1")]
    assert near_copies(kept, {c.case_id: prints[c.case_id] for c in kept}) == [("ca0", "cb0")]


def test_cases_without_pixels_stay_as_they_are():
    cases = people({}, {}, {})
    assert group_cases(cases, {}).cases == tuple(cases)


@pytest.mark.realdata
def test_no_two_real_patients_are_joined(real_data):
    """The heads of the hardest set and the chests: every 5th slice, so that it takes seconds."""
    cases, prints = [], {}
    for folder in ("ct_ich/hospital", "siim_ct_100/dicom_dir"):
        for series in scan_folder(real_data / folder).series:
            for name in series.files[::5]:
                cases.append(case(len(cases), series.header, series=series.uid))
                scan = read_files([series.root / name])
                prints[cases[-1].case_id] = slice_prints(prepare_slices(scan, Preprocessing(size=128)))
    assert len({c.patient_id for c in cases}) == 136
    result = group_cases(cases, prints)
    assert (result.bonds, result.unused) == ((), ())
