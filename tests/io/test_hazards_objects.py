"""What lies beside slices in a study, and slices in one multi-frame object."""

import warnings
from functools import partial

import numpy as np
import pytest
from ct_builder import (
    ENHANCED_CT,
    GRIDS,
    LEGACY_CONVERTED_CT,
    SLICES,
    Ct,
    EnhancedCt,
    both,
    change,
    phantom_hu,
    put,
    save,
)
from hazard_cases import (
    GEOMETRIES,
    C,
    Expected,
    Truth,
    assert_never_silently_wrong,
    ct_on,
    object_of,
    refused,
    right,
)
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

# ---- objects without slices -----------------------------------------------------------------------------------------
from medvit.io import scan_folder

STORAGE = "1.2.840.10008.5.1.4.1.1"
NOT_VOLUMES = {
    "dose report": (f"{STORAGE}.88.67", "SR"),
    "comprehensive SR": (f"{STORAGE}.88.33", "SR"),
    "encapsulated PDF": (f"{STORAGE}.104.1", "DOC"),
    "encapsulated PDF that says CT": (f"{STORAGE}.104.1", "CT"),
    "secondary capture": (f"{STORAGE}.7", "CT"),
    "key object selection": (f"{STORAGE}.88.59", "KO"),
    "presentation state": (f"{STORAGE}.11.1", "PR"),
    "RT structure set": (f"{STORAGE}.481.3", "RTSTRUCT"),
    "RT dose": (f"{STORAGE}.481.2", "RTDOSE"),
    "RT plan": (f"{STORAGE}.481.5", "RTPLAN"),
    "segmentation": (f"{STORAGE}.66.4", "SEG"),
    "registration": (f"{STORAGE}.66.1", "REG"),
    "waveform": (f"{STORAGE}.9.1.1", "ECG"),
    "raw data": (f"{STORAGE}.66", "CT"),
}
OTHER_IMAGES = {"MR": f"{STORAGE}.4", "PT": f"{STORAGE}.128", "US": f"{STORAGE}.6.1", "DX": f"{STORAGE}.1.1"}


@pytest.mark.parametrize("series", ["its own series", "the series of the CT"])
@pytest.mark.parametrize("name", NOT_VOLUMES)
def test_objects_without_slices_are_skipped_and_counted(tmp_path, name, series):
    Ct().write(tmp_path)
    stray = object_of(*NOT_VOLUMES[name])
    if series == "the series of the CT":
        stray.SeriesInstanceUID = Ct().dataset(0).SeriesInstanceUID
    save(stray, tmp_path / "stray.dcm")
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.NOT_VOLUME: 1}))


@pytest.mark.parametrize("modality", OTHER_IMAGES)
def test_images_of_other_modalities_are_skipped(tmp_path, modality):
    Ct().write(tmp_path)
    save(object_of(OTHER_IMAGES[modality], modality), tmp_path / "stray.dcm")
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.MODALITY: 1}))


@pytest.mark.parametrize("sop_class", [f"{STORAGE}.4", f"{STORAGE}.128"])
def test_what_an_image_is_follows_from_its_class_not_from_its_modality_tag(tmp_path, sop_class):
    """A PET volume whose Modality says CT has no Hounsfield units."""
    Ct(edit=change(SOPClassUID=sop_class)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused((C.MODALITY, C.NOT_VOLUME)))


COLOURS = {
    "RGB": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
    "YBR": {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL", "PlanarConfiguration": 0},
    "palette": {"PhotometricInterpretation": "PALETTE COLOR"},
    "none": {"PhotometricInterpretation": None},
}


@pytest.mark.parametrize("where", ["all slices", "beside the series"])
@pytest.mark.parametrize("name", COLOURS)
def test_colour_has_no_hounsfield_units(tmp_path, name, where):
    edit = change(**COLOURS[name])
    if COLOURS[name].get("SamplesPerPixel"):
        edit = both(edit, change(BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=lambda index: bytes(1440)))
    codes = (C.PHOTOMETRIC, C.TAG_INVALID) if name == "none" else C.PHOTOMETRIC
    if where == "all slices":
        Ct(edit=edit).write(tmp_path)
        assert_never_silently_wrong(tmp_path, refused(codes))
    else:
        Ct().write(tmp_path)
        Ct(uid=2, edit=edit).write(tmp_path, "colour{}", only=[0])
        assert_never_silently_wrong(tmp_path, right(Ct(), aside={codes: 1}))


# ---- multi-frame ----------------------------------------------------------------------------------------------------

SHUFFLED = (7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6)
LAYOUTS = {
    "as usual": {},
    "frames shuffled": {"frames": SHUFFLED},
    "frames from head to feet": {"frames": tuple(range(SLICES))[::-1]},
    "everything per frame": {"shared": ()},
    "everything but positions shared": {"shared": ("measures", "orientation", "rescale")},
    "legacy converted": {"sop_class": LEGACY_CONVERTED_CT, "shared": ()},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_object_with_many_frames_is_a_volume(tmp_path, name, geometry):
    ct = ct_on(geometry)
    EnhancedCt(ct, **LAYOUTS[name]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


@pytest.mark.parametrize("frames", [range(SLICES), SHUFFLED], ids=["in order", "shuffled"])
def test_each_frame_has_its_own_rescale(tmp_path, frames):
    ct = Ct(slopes=(1.0, 0.5, 0.25), bits_stored=16)
    EnhancedCt(ct, frames=tuple(frames), shared=("measures", "orientation")).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda syntax: syntax.name.split(",")[0],
)
@pytest.mark.parametrize("signed", [False, True])
def test_frames_in_any_transfer_syntax(tmp_path, syntax, signed):
    ct = Ct(transfer_syntax=syntax, signed=signed, bits_stored=16, intercept=0.0 if signed else -1024.0)
    EnhancedCt(ct, frames=SHUFFLED).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


@pytest.mark.parametrize("order", ["phase by phase", "slice by slice", "shuffled"])
def test_phases_of_one_object_are_volumes_of_their_own(tmp_path, order):
    later = phantom_hu() + 25
    frames = [(n, phase) for phase in (1, 2) for n in range(SLICES)]
    if order == "slice by slice":
        frames.sort()
    elif order == "shuffled":
        frames = [frames[index * 7 % 24] for index in range(24)]
    whole = Ct(hu=np.concatenate([phantom_hu(), later]))

    def back_to_first_phase(dataset):
        for item in dataset.PerFrameFunctionalGroupsSequence:
            position = item.PlanePositionSequence[0]
            x, y, z = position.ImagePositionPatient
            position.ImagePositionPatient = [x, y, 107.25 + (float(z) - 107.25) % 30]

    EnhancedCt(
        whole,
        frames=[n + SLICES * (phase - 1) for n, phase in frames],
        phases=[phase for _, phase in frames],
        edit=back_to_first_phase,
    ).write(tmp_path)
    split = frozenset({C.MULTIPHASE})
    truths = (Truth(whole.grid, phantom_hu(), codes=split), Truth(whole.grid, later, codes=split))
    scans = assert_never_silently_wrong(tmp_path, Expected(truths))
    assert len({scan.header.phase for scan in scans}) == 2


def test_flags_and_padding_of_frames(tmp_path):
    outside, filled = phantom_hu(), phantom_hu()
    outside[:, :4, :5], filled[:, :4, :5] = -3024, -1024

    def tags(dataset):
        put(dataset, "PixelPaddingValue", -2000, "SS")
        dataset.PhotometricInterpretation = "MONOCHROME1"

    ct = Ct(hu=outside, signed=True, bits_stored=16)
    EnhancedCt(ct, damage=tags).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct, C.PADDING_APPLIED, C.MONO1, hu=filled))


def test_a_tilted_gantry_in_frames_is_straightened(tmp_path):
    ct = ct_on("axial")
    ct = ct.but(grid=ct.grid.tilted(15))
    EnhancedCt(ct).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct, C.GANTRY_TILT, straightened=True))


INCOMPLETE_GROUPS = {
    "position": (C.ORIENTATION_INVALID,),
    "orientation": (C.ORIENTATION_INVALID,),
    "measures": (C.TAG_INVALID,),
    "rescale": (C.RESCALE_MISSING,),
}


@pytest.mark.parametrize("name", INCOMPLETE_GROUPS)
def test_frames_without_a_needed_group_are_refused(tmp_path, name):
    EnhancedCt(without=[name]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused((C.MULTIFRAME_UNSUPPORTED, *INCOMPLETE_GROUPS[name]), 1))


def without_shared(dataset):
    del dataset.SharedFunctionalGroupsSequence


def without_per_frame(dataset):
    del dataset.PerFrameFunctionalGroupsSequence


def one_item_less(dataset):
    del dataset.PerFrameFunctionalGroupsSequence[-1]


def one_frame_without_position(dataset):
    del dataset.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence


def empty_item(dataset):
    dataset.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence = []


def one_frame_less_declared(dataset):
    dataset.NumberOfFrames = 11


def one_frame_more_declared(dataset):
    dataset.NumberOfFrames = 13


def a_billion_frames_declared(dataset):
    dataset.NumberOfFrames = 10**9


def no_frames_declared(dataset):
    dataset.NumberOfFrames = None


MULTIFRAME_LIES = [
    without_shared,
    without_per_frame,
    one_item_less,
    one_frame_without_position,
    empty_item,
    one_frame_less_declared,
    one_frame_more_declared,
    a_billion_frames_declared,
    no_frames_declared,
]
ANY_OF = (
    C.MULTIFRAME_UNSUPPORTED,
    C.ORIENTATION_INVALID,
    C.TAG_INVALID,
    C.RESCALE_MISSING,
    C.PIXEL_TRUNCATED,
    C.RESOURCE_LIMIT,
)


@pytest.mark.parametrize("lie", MULTIFRAME_LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=["native", "RLE"])
def test_frames_that_do_not_add_up_are_refused(tmp_path, lie, syntax):
    EnhancedCt(Ct(transfer_syntax=syntax), damage=lie).write(tmp_path)
    codes = (C.RESOURCE_LIMIT, C.MULTIFRAME_UNSUPPORTED) if lie is a_billion_frames_declared else ANY_OF
    assert_never_silently_wrong(tmp_path, refused(codes, 1))


OFFSETS = {
    "two exchanged": lambda table: [*table[:4], table[5], table[4], *table[6:]],
    "one twice": lambda table: [*table[:5], table[4], *table[6:]],
    "all zero": lambda table: [0] * len(table),
    "into a frame": lambda table: [*table[:5], table[5] + 2, *table[6:]],
    "behind the end": lambda table: [*table[:-1], 10**6],
}


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
@pytest.mark.parametrize("name", OFFSETS)
def test_an_offset_table_that_does_not_lead_to_the_frames_is_refused(tmp_path, name, syntax):
    path = EnhancedCt(Ct(transfer_syntax=syntax)).write(tmp_path)
    raw = bytearray(path.read_bytes())
    start = raw.index(b"\xfe\xff\0\xe0", raw.index(b"\xe0\x7f\x10\0OB")) + 8
    table = np.frombuffer(bytes(raw[start : start + 4 * SLICES]), "<u4").tolist()
    assert (table[0], len(set(table))) == (0, SLICES)
    raw[start : start + 4 * SLICES] = np.array(OFFSETS[name](table), "<u4").tobytes()
    path.write_bytes(raw)
    assert_never_silently_wrong(tmp_path, refused(C.PIXEL_TRUNCATED, 1))


def test_a_gap_between_frames_is_refused(tmp_path):
    EnhancedCt(frames=[index for index in range(SLICES) if index != 6]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.SLICE_MISSING, 1))


def test_frames_at_one_position_are_refused(tmp_path):
    EnhancedCt(frames=[*range(SLICES), 4]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused((C.DUP_POSITION, C.MULTIFRAME_UNSUPPORTED), 1))


@pytest.mark.parametrize("cut", [10, 480 * 2, 480 * 2 * 6])
def test_cut_frames_are_refused(tmp_path, cut):
    path = EnhancedCt().write(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert_never_silently_wrong(tmp_path, refused(C.PIXEL_TRUNCATED, 1))


def test_one_volume_in_two_objects_is_whole_or_refused(tmp_path):
    """A concatenation (PS3.3 C.7.6.16.1.4): half of the frames in each; half a volume alone would be silent."""
    for half in (0, 1):
        frames = tuple(range(6 * half, 6 * half + 6))
        part = EnhancedCt(frames=frames, edit=lambda d, half=half: setattr(d, "SOPInstanceUID", f"1.2.3.{half}"))
        part.write(tmp_path, f"part{half}.dcm")
    assert_never_silently_wrong(tmp_path, right(Ct()), refused(C.MULTIFRAME_UNSUPPORTED, 2))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=["little", "big"])
def test_phases_in_an_object_each_are_volumes_of_their_own(tmp_path, syntax):
    """One multi-frame object for each phase, in one series: as scanners with a wide detector write them."""
    for phase in (1, 2):
        edit = partial(put, keyword="SOPInstanceUID", value=f"1.2.3.{phase}")
        ct = Ct(hu=phantom_hu() + 100 * phase, transfer_syntax=syntax)
        one = EnhancedCt(ct, phases=[phase] * SLICES, edit=edit)
        one.write(tmp_path, f"phase{phase}.dcm")
    flags = frozenset({C.MULTIPHASE})
    truths = tuple(Truth(GRIDS["axial"], phantom_hu() + 100 * phase, flags) for phase in (1, 2))
    assert_never_silently_wrong(tmp_path, Expected(truths))
    phases = [one.header.phase for one in scan_folder(tmp_path).series]
    assert phases == ["temporal position 1", "temporal position 2"]


def test_an_object_and_the_slices_it_was_made_of_are_two_volumes(tmp_path):
    """A legacy converted object that kept its series; a scout of the slices stays one."""
    Ct().write(tmp_path)
    Ct(edit=change(SOPInstanceUID="1.2.3.4", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])).write(
        tmp_path, "scout{}", only=[0]
    )
    EnhancedCt().write(tmp_path)
    truth = Truth(GRIDS["axial"], codes=frozenset({C.MULTIPHASE}))
    assert_never_silently_wrong(tmp_path, Expected((truth, truth), {C.NOT_VOLUME: 1}))


def test_classic_ct_that_claims_frames_is_refused(tmp_path):
    Ct(damage=change(NumberOfFrames=12)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused((C.MULTIFRAME_UNSUPPORTED, C.PIXEL_TRUNCATED)))


@pytest.mark.parametrize("frames", [1, b"1 ", None])
def test_classic_ct_with_one_frame_is_a_slice(tmp_path, frames):
    Ct(damage=change(NumberOfFrames=frames)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


@pytest.mark.parametrize("frames", [0, -1, b"many"])
def test_classic_ct_with_a_senseless_number_of_frames_is_a_slice_or_refused(tmp_path, frames):
    Ct(damage=change(NumberOfFrames=frames)).write(tmp_path)
    assert_never_silently_wrong(
        tmp_path, right(Ct()), refused((C.MULTIFRAME_UNSUPPORTED, C.TAG_INVALID, C.PIXEL_TRUNCATED))
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_series_converted_by_somebody_else_is_the_same_volume(tmp_path, geometry):
    """Written by highdicom from the classic slices: nothing of this test's own builder of frames."""
    legacy = pytest.importorskip("highdicom.legacy")
    ct = ct_on(geometry, edit=change(AccessionNumber="", StudyID="", ReferringPhysicianName="", StudyTime="101010"))
    slices = [dcmread(path) for path in ct.write(tmp_path / "classic")]
    for one in slices:
        one.PositionReferenceIndicator, one.SeriesNumber = "", 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = legacy.LegacyConvertedEnhancedCTImage(
            slices, series_instance_uid="1.2.3.5", series_number=5, sop_instance_uid="1.2.3.5.1", instance_number=1
        )
        (tmp_path / "converted").mkdir()
        converted.save_as(tmp_path / "converted" / "legacy.dcm")
    assert converted.SOPClassUID == LEGACY_CONVERTED_CT != ENHANCED_CT
    assert_never_silently_wrong(tmp_path / "converted", right(ct))
