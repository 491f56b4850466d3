"""MedvitReader in stock MONAI pipelines: the phantom lies where it should after Orientationd and Spacingd."""

import nibabel as nib
import numpy as np
import pytest
import torch
from ct_builder import COLUMNS, GRIDS, ROWS, SLICES, Ct, Grid, change, phantom_at, phantom_hu
from monai.data import DataLoader, Dataset, PersistentDataset, set_track_meta
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged, Orientationd, SaveImage, Spacingd

from medvit.data import MedvitReader
from medvit.io import scan_folder
from medvit.records import ReasonCode, ScanError, UsageError

# MONAI makes all its readers with each LoadImage, and one of them warns that there is no GPU decoder
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
CANARIES = ("Mueller", "Anna", "0815", "19600102")


def nifti(path, grid=None):
    affine = LPS_TO_RAS @ (grid or Grid()).affine
    image = nib.Nifti1Image(phantom_hu().astype(np.int16).transpose(2, 1, 0), affine)
    image.header.set_slope_inter(1, 0)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def faulty(folder):
    """A series without its fifth slice, which MONAI's own readers put together all the same."""
    Ct().write(folder, only=[0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11])
    return folder


def sources(folder, grid=None):
    """One volume in all the forms that a pipeline may be given."""
    paths = Ct(grid=grid or Grid()).write(folder / "dicom")
    return {
        "folder": folder / "dicom",
        "folder as text": str(folder / "dicom"),
        "files": paths[::-1],
        "series": scan_folder(folder / "dicom").series[0],
        "nifti": nifti(folder / "ct.nii.gz", grid),
    }


FORMS = ["folder", "folder as text", "files", "series", "nifti"]


def load(source, **options):
    return LoadImaged("image", reader=MedvitReader, expanduser=False, **options)({"image": source})["image"]


def world_lps(affine, shape):
    """(X, Y, Z, 3) patient points, mm LPS, of a grid whose affine leads to RAS."""
    points = np.stack(np.indices(shape), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    return points * (-1, -1, 1)


def inside(points, grid):
    """Which points lie within the phantom's outermost voxel centres."""
    inverse = np.linalg.inv(grid.affine)
    voxels = points @ inverse[:3, :3].T + inverse[:3, 3]
    return ((voxels >= 0) & (voxels <= (COLUMNS - 1, ROWS - 1, SLICES - 1))).all(axis=-1)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSL"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["axial", "head_last", "prone", "sagittal", "oblique"])
def test_a_stock_pipeline_keeps_every_voxel_where_it_is_in_the_patient(tmp_path, name, form, codes):
    grid = GRIDS[name]
    pipeline = Compose(
        [
            LoadImaged("image", reader=MedvitReader, expanduser=False),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes=codes, labels=None),
            Spacingd("image", pixdim=(1.1, 1.3, 1.7), mode="bilinear"),
        ]
    )
    image = pipeline({"image": sources(tmp_path, grid)[form]})["image"]
    affine = image.affine.numpy()
    assert nib.aff2axcodes(affine) == tuple(codes)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (1.1, 1.3, 1.7))
    points = world_lps(affine, image.shape[1:])
    interior = inside(points, grid)
    assert interior.sum() > 0.5 * interior.size
    # HU is linear in the patient, so linear interpolation is exact
    np.testing.assert_allclose(image.numpy()[0][interior], phantom_at(points, grid)[interior], atol=0.2)


@pytest.mark.parametrize("name", GRIDS)
def test_it_loads_what_nibabel_reader_loads(tmp_path, name):
    path = nifti(tmp_path / "ct.nii", GRIDS[name])
    ours, theirs = load(path), LoadImage(reader="NibabelReader")(path)
    torch.testing.assert_close(ours.as_tensor(), theirs.as_tensor(), rtol=0, atol=0)
    torch.testing.assert_close(ours.affine, theirs.affine)
    for key in ("space", "filename_or_obj"):
        assert ours.meta[key] == theirs.meta[key]
    for key in ("original_affine", "spatial_shape", "original_channel_dim"):
        np.testing.assert_allclose(ours.meta[key], theirs.meta[key])


def test_all_forms_of_one_volume_are_the_same_image(tmp_path):
    images = {form: load(source) for form, source in sources(tmp_path).items()}
    for image in images.values():
        assert image.shape == (COLUMNS, ROWS, SLICES)
        torch.testing.assert_close(image.as_tensor(), images["nifti"].as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(image.affine, images["nifti"].affine)


def test_flags_and_acquisition_ride_along_and_identity_does_not(tmp_path):
    def edit(dataset, _):
        dataset.PhotometricInterpretation, dataset.ConvolutionKernel = "MONOCHROME1", "B30f"

    paths = Ct(edit=edit).write(tmp_path)
    for source in (tmp_path, paths):
        meta = load(source).meta
        assert meta["codes"] == ReasonCode.MONO1
        assert meta["acquisition"]["kernel"] == "B30f"
        assert not any(canary in str(meta) for canary in CANARIES)
        assert "PHOTOMETRIC" not in str(meta)


def test_a_series_brings_no_identity_either(tmp_path):
    meta = load(sources(tmp_path)["series"]).meta
    assert not any(canary in str(meta) for canary in CANARIES)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_medvit_refuses_no_other_reader_of_monai_takes(tmp_path):
    """LoadImage tries its other readers when one fails: they read this series without a word."""
    folder = faulty(tmp_path)
    assert LoadImage(reader="PydicomReader")(folder).shape[-1] == SLICES - 1
    for source in (folder, sorted(folder.iterdir())):
        with pytest.raises(ScanError, match="SLICE_MISSING"):
            load(source)


def test_inside_compose_the_code_is_the_cause(tmp_path):
    pipeline = Compose([LoadImaged("image", reader=MedvitReader)])
    with pytest.raises(RuntimeError) as caught:
        pipeline({"image": faulty(tmp_path)})
    assert isinstance(caught.value.__cause__, ScanError)
    assert caught.value.__cause__.code is ReasonCode.SLICE_MISSING


@pytest.mark.parametrize("workers", [0, 2])
def test_the_code_comes_out_of_a_data_loader(tmp_path, workers):
    dataset = Dataset([{"image": faulty(tmp_path)}], LoadImaged("image", reader=MedvitReader))
    with pytest.raises((ScanError, RuntimeError)) as caught:
        list(DataLoader(dataset, batch_size=1, num_workers=workers))
    assert "SLICE_MISSING" in f"{caught.value} {caught.value.__cause__}"


def test_several_volumes_are_not_taken_for_one(tmp_path):
    forms = sources(tmp_path)
    for several in (
        [forms["nifti"]] * 2,
        [forms["folder"]] * 2,
        [forms["series"]] * 2,
        [forms["nifti"], forms["files"][0]],
    ):
        with pytest.raises(UsageError, match="one volume"):
            load(several)


def test_a_listed_series_that_is_quarantined_is_refused(tmp_path):
    (series,) = scan_folder(faulty(tmp_path)).series
    with pytest.raises(ScanError, match="SLICE_MISSING"):
        load(series)


# --- datasets, workers, names ----------------------------------------------------------------------------------------


def many(folder):
    """Scans that differ in form, flags and acquisition: their metadata must collate."""

    def edit(dataset, _):
        dataset.PhotometricInterpretation, dataset.ConvolutionKernel = "MONOCHROME1", "B30f"

    Ct().write(folder / "a")
    Ct(edit=edit).write(folder / "b")
    items = [
        folder / "a",
        sorted((folder / "b").iterdir()),
        scan_folder(folder / "a").series[0],
        nifti(folder / "c.nii"),
    ]
    return [{"image": item} for item in items]


def pipeline():
    return Compose([LoadImaged("image", reader=MedvitReader, expanduser=False), EnsureChannelFirstd("image")])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_data_loader(tmp_path, workers):
    (batch,) = DataLoader(Dataset(many(tmp_path), pipeline()), batch_size=4, num_workers=workers)
    assert batch["image"].shape == (4, 1, COLUMNS, ROWS, SLICES)
    assert (batch["image"] == batch["image"][:1]).all()
    assert list(batch["image"].meta["codes"]) == ["", "MONO1", "", ""]


@pytest.mark.parametrize("options", [{}, {"track_meta": True, "weights_only": False}])
def test_a_persistent_dataset_keeps_what_was_read(tmp_path, options):
    items = many(tmp_path)
    dataset = PersistentDataset(items, pipeline(), cache_dir=tmp_path / "cache", **options)
    first = [item["image"] for item in dataset]
    assert len(list((tmp_path / "cache").iterdir())) == len(items)
    again = [batch["image"][0] for batch in DataLoader(dataset, batch_size=1, num_workers=2)]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0)


def test_a_plain_tensor_where_metadata_is_not_tracked(tmp_path):
    set_track_meta(False)
    try:
        assert type(load(nifti(tmp_path / "ct.nii"))) is torch.Tensor
    finally:
        set_track_meta(True)


def test_the_dotted_name_works_and_the_short_one_is_not_monais(tmp_path):
    path = nifti(tmp_path / "ct.nii")
    by_name = LoadImaged("image", reader="medvit.data.MedvitReader")
    assert by_name({"image": path})["image"].meta["codes"] == ""
    with pytest.raises(ValueError, match="medvitreader"):
        LoadImaged("image", reader="MedvitReader")


def test_registered_it_is_chosen_for_what_it_reads(tmp_path):
    loader = LoadImage()
    loader.register(MedvitReader())
    forms = sources(tmp_path)
    for form in ("folder", "files", "nifti"):
        assert "acquisition" in loader(forms[form]).meta
    np.save(tmp_path / "values.npy", np.arange(8.0))
    assert "acquisition" not in loader(tmp_path / "values.npy").meta


@pytest.mark.parametrize(
    ("name", "content", "ours"), [("IM0001", bytes(128) + b"DICM", True), ("a.png", b"png", False)]
)
def test_a_dicom_file_is_known_by_its_content(tmp_path, name, content, ours):
    (tmp_path / name).write_bytes(content)
    assert MedvitReader().verify_suffix(tmp_path / name) is ours
    assert MedvitReader().verify_suffix([tmp_path, tmp_path / name]) is ours
    assert not MedvitReader().verify_suffix(tmp_path / "missing.dcm")


def test_volumes_that_share_a_series_are_saved_under_names_of_their_own(tmp_path):
    """Named by nothing that a header or a path says, and told from each other without their files."""
    folder = tmp_path / "Mueller"
    for number, phase in enumerate(("B30f", "B70f")):
        uids = change(ConvolutionKernel=phase, SOPInstanceUID=lambda index, n=number: f"1.2.3.{n}.{index}")
        Ct(edit=uids, hu=phantom_hu() + 100 * number).write(folder, f"{phase}_{{}}")
    series = scan_folder(folder).series
    saving = SaveImage(output_dir=tmp_path / "out", separate_folder=False, resample=False, print_log=False)
    for one in series:
        image = load(one, ensure_channel_first=True)
        assert not [word for word in (*CANARIES, str(tmp_path), "B30f_") if word in f"{image.meta} {one!r}"]
        saving(image)
    lowest = [nib.load(path).get_fdata().min() for path in (tmp_path / "out").iterdir()]
    assert sorted(lowest) == [-1000, -900]
