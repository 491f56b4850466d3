"""Windows and CLAHE: exact, in floating point, and at home in a MONAI pipeline."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, ScaleIntensity
from pydicom import Dataset
from pydicom.pixels import apply_windowing
from skimage.exposure import equalize_adapthist

from medvit.data import intensity
from medvit.data.intensity import (
    Clahe,
    Clahed,
    HounsfieldWindow,
    HounsfieldWindowd,
    apply_clahe,
    apply_window,
    apply_windows,
)
from medvit.records import WINDOWS

RAMP = np.arange(-1500, 3000, dtype=np.float32)
AFFINE = torch.tensor([[0.0, -0.9, 0, 3], [0.7, 0, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1]], dtype=torch.float64)


def picture(shape=(64, 64), seed=0):
    """Smooth structure with little contrast, 0..1."""
    rng = np.random.default_rng(seed)
    noise = rng.random((*shape[:-2], 8, 8)).astype(np.float32)
    planes = noise.reshape(-1, 8, 8)
    big = np.stack([cv2.resize(plane, shape[-1:-3:-1], interpolation=cv2.INTER_CUBIC) for plane in planes])
    return np.clip(0.4 + 0.2 * big.reshape(shape), 0, 1)


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "width"), [(40, 400), (-600, 1500), (40, 81), (40.5, 401), (60, 1)])
def test_window_is_pydicoms_linear_exact(level, width):
    dataset = Dataset()
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = level, width, "LINEAR_EXACT"
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 16, 1
    expected = apply_windowing(RAMP.astype(np.float64), dataset)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(apply_window(RAMP, level, width), expected, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(level=st.floats(-1000, 1000), width=st.floats(1, 4000), hu=st.floats(-2000, 4000))
def test_window_follows_its_formula(level, width, hu):
    expected = min(1.0, max(0.0, (hu - (level - width / 2)) / width))
    assert float(apply_window(np.array([hu]), level, width)[0]) == pytest.approx(expected, abs=2e-3)


def test_odd_width_is_not_halved_to_an_integer():
    """Width 5 at level 0 begins at -2.5 HU; integer halving would begin at -2."""
    np.testing.assert_allclose(apply_window(np.array([-2.5, -2, 0, 2, 2.5]), 0, 5), [0, 0.1, 0.5, 0.9, 1], atol=1e-6)


def test_window_does_not_go_through_8_bit():
    assert len(np.unique(apply_window(np.linspace(-1000, 1000, 50_000), 0, 2000))) > 40_000


def test_integers_are_not_divided_as_integers():
    assert apply_window(np.array([39, 40, 41], np.int16), 40, 400).tolist() == pytest.approx([0.4975, 0.5, 0.5025])


@pytest.mark.parametrize("width", [0, -400])
def test_window_without_width_raises(width):
    with pytest.raises(ValueError, match="width"):
        apply_window(RAMP, 40, width)


def test_windows_are_channels_in_the_order_given():
    result = apply_windows(RAMP, ["bone", (0, 10), "lung"])
    assert (result.shape, result.dtype) == ((3, len(RAMP)), np.float32)
    for channel, window in zip(result, [WINDOWS["bone"], (0, 10), WINDOWS["lung"]], strict=True):
        np.testing.assert_array_equal(channel, apply_window(RAMP, *window))


def test_unknown_window_lists_the_known_ones():
    with pytest.raises(ValueError, match="soft_tissue"):
        HounsfieldWindow(["soft tissue"])


# ---- CLAHE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "tiles"), [(2.0, (8, 8)), (40.0, (8, 8)), (60.0, (2, 4)), (100.0, (4, 2))])
def test_clahe_is_opencvs_on_16_bit(clip, tiles):
    """The picture is not square and the tiles are not either: exchanged axes would show."""
    image = picture((64, 96))
    levels = np.round(image * 65535).astype(np.uint16)
    expected = cv2.createCLAHE(clipLimit=clip, tileGridSize=(tiles[1], tiles[0])).apply(levels) / 65535
    np.testing.assert_allclose(apply_clahe(image, clip, tiles), expected, atol=1e-6)


def test_clahe_raises_contrast_as_scikit_image_does():
    image = picture((128, 128))
    ours, other = apply_clahe(image, 40.0), equalize_adapthist(image, kernel_size=16, clip_limit=0.01)
    assert ours.std() > 1.2 * image.std()
    assert np.corrcoef(ours.ravel(), other.ravel())[0, 1] > 0.8


def test_clahe_keeps_more_than_256_levels():
    image = picture((128, 128))
    assert len(np.unique(apply_clahe(image))) > 2000


@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, np.nan])
def test_clahe_refuses_values_outside_0_to_1(bad):
    image = picture()
    image[3, 3] = bad
    with pytest.raises(ValueError, match=r"0\.\.1"):
        apply_clahe(image)


def test_clahe_refuses_what_is_no_slice():
    with pytest.raises(ValueError, match="slices"):
        apply_clahe(np.zeros(5))


def test_clahe_treats_each_slice_alone():
    volume = picture((3, 64, 64))
    result = apply_clahe(volume)
    for plane, expected in zip(result, volume, strict=True):
        np.testing.assert_array_equal(plane, apply_clahe(expected))


# ---- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 3, 16, 16), (16, 16)])
def test_a_batch_is_not_taken_for_a_volume(shape):
    with pytest.raises(ValueError, match="dimensions"):
        Clahe()(np.full(shape, 0.5, np.float32))


def test_a_windowed_picture_or_a_batch_is_not_windowed_again():
    with pytest.raises(ValueError, match="one channel"):
        HounsfieldWindow()(np.zeros((3, 16, 16)))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda a: MetaTensor(torch.as_tensor(a), affine=AFFINE)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16])
def test_array_kind_is_kept_and_the_result_is_float32(kind, dtype):
    hu = kind(np.linspace(-1000, 1000, 32 * 32 * 4).reshape(1, 32, 32, 4).astype(dtype))
    windowed = HounsfieldWindow(["lung", "bone"])(hu)
    equalised = Clahe()(windowed)
    for result in (windowed, equalised):
        assert type(result) is type(hu)
        assert result.shape == (2, 32, 32, 4)
        assert str(result.dtype).endswith("float32")
        if isinstance(result, MetaTensor):
            assert torch.equal(result.affine, AFFINE)


def test_input_is_not_changed():
    hu = torch.linspace(-1000, 1000, 1024).reshape(1, 32, 32)
    before = hu.clone()
    Clahe()(HounsfieldWindow()(hu))
    assert torch.equal(hu, before)


@pytest.mark.parametrize("slice_axis", [0, 1, 2, -1, -3])
def test_clahe_works_in_the_plane_of_the_slices(slice_axis):
    volume = picture((5, 64, 64))  # slices first
    laid = np.moveaxis(volume, 0, slice_axis)[None]
    result = Clahe(40.0, slice_axis=slice_axis)(laid)
    np.testing.assert_array_equal(np.moveaxis(result[0], slice_axis, 0), apply_clahe(volume, 40.0))


def test_dictionary_form_does_the_same_in_a_stock_compose():
    hu = MetaTensor(torch.linspace(-1000, 1000, 32 * 32 * 4).reshape(1, 32, 32, 4), affine=AFFINE)
    pipeline = Compose(
        [HounsfieldWindowd("ct", windows=["lung", (40, 400)]), Clahed(["ct"], clip_limit=3.0, tiles=(4, 4))]
    )
    result = pipeline({"ct": hu, "label": 1})
    expected = Compose([HounsfieldWindow(["lung", (40, 400)]), Clahe(3.0, (4, 4))])(hu)
    assert torch.equal(result["ct"], expected)
    assert torch.equal(result["ct"].affine, AFFINE)
    assert result["label"] == 1


def test_array_form_runs_among_stock_transforms():
    result = Compose([HounsfieldWindow(), Clahe(), ScaleIntensity()])(
        torch.linspace(-500, 500, 1024).reshape(1, 32, 32)
    )
    assert (float(result.min()), float(result.max())) == (0, 1)


def test_missing_keys_raise_unless_allowed():
    with pytest.raises(KeyError):
        HounsfieldWindowd("ct")({"mr": torch.zeros(1, 4, 4)})
    assert set(Clahed("ct", allow_missing_keys=True)({"mr": 1})) == {"mr"}


def test_front_door():
    from medvit.data import intensity as again  # noqa: PLC0415

    assert again is intensity
