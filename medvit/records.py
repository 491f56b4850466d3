"""The records that flow through medvit: Scan, Case, Preprocessing, Prediction, and the codes that explain a refusal.

Frozen, and valid once built: a constructor that returns has checked what the rest of the package relies on.
Only numpy, so that reading a folder starts fast and a decoding worker stays small.

One letter scheme for shapes everywhere: B batch, S slices, C channels, H rows, W columns, N tokens, D width, K classes,
Z Y X voxels of a volume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

AIR_HU = -1024.0
"""What padding is filled with: the lowest value of 12-bit CT, below air, outside every window."""

EXIT_DONE, EXIT_UNEXPECTED, EXIT_USAGE, EXIT_QUARANTINE, EXIT_REFUSED = range(5)
"""Exit codes: done; unexpected error; wrong usage, config or labels; done with input set aside; refused by a gate."""


class MedvitError(Exception):
    """Base of every error medvit raises on purpose: what was seen, what is needed, what to do."""

    exit_code: int = EXIT_UNEXPECTED


class UsageError(MedvitError):
    """Wrong usage, configuration, labels or weights."""

    exit_code = EXIT_USAGE


class GateError(MedvitError):
    """A gate refused to go on: leakage, fairness tolerance, self-test."""

    exit_code = EXIT_REFUSED


class Outcome(StrEnum):
    """What became of a file or a series."""

    OK = "ok"
    FLAG = "flag"  # used, with a warning that travels into every output
    QUARANTINE = "quarantine"  # a series (or study) that may not be used as it is
    REJECT = "reject"  # a single file that cannot be used
    SKIP = "skip"  # normal: not a CT volume, a copy, not the selected series

    @property
    def used(self) -> bool:
        """Whether it goes on to the model."""
        return self in (Outcome.OK, Outcome.FLAG)

    @property
    def bad(self) -> bool:
        """Whether somebody should look at it: a command that meets one ends with 3."""
        return self in (Outcome.QUARANTINE, Outcome.REJECT)


class ReasonCode(StrEnum):
    """Why a file or series is flagged or set aside. Closed list; `REASONS` gives outcome and remedy of each."""

    RESCALE_MISSING = "RESCALE_MISSING"
    RESCALE_INVALID = "RESCALE_INVALID"
    RESCALE_UNITS = "RESCALE_UNITS"
    PADDING_APPLIED = "PADDING_APPLIED"
    PIXELREP_CONFLICT = "PIXELREP_CONFLICT"
    MONO1 = "MONO1"
    HU_IMPLAUSIBLE = "HU_IMPLAUSIBLE"
    GANTRY_TILT = "GANTRY_TILT"
    SPACING_NONUNIFORM = "SPACING_NONUNIFORM"
    SLICE_MISSING = "SLICE_MISSING"
    SLICE_GAPS = "SLICE_GAPS"
    DUP_IDENTICAL = "DUP_IDENTICAL"
    DUP_CONFLICT = "DUP_CONFLICT"
    DUP_POSITION = "DUP_POSITION"
    MULTIPHASE = "MULTIPHASE"
    NOT_VOLUME = "NOT_VOLUME"
    MULTIFRAME_UNSUPPORTED = "MULTIFRAME_UNSUPPORTED"
    PHOTOMETRIC = "PHOTOMETRIC"
    TS_UNSUPPORTED = "TS_UNSUPPORTED"
    LOSSY = "LOSSY"
    PIXEL_TRUNCATED = "PIXEL_TRUNCATED"
    NO_PREAMBLE = "NO_PREAMBLE"
    TAG_INVALID = "TAG_INVALID"
    CHARSET = "CHARSET"
    RESOURCE_LIMIT = "RESOURCE_LIMIT"
    NESTING = "NESTING"
    UNSAFE_NAME = "UNSAFE_NAME"
    NOT_REGULAR = "NOT_REGULAR"
    ARCHIVE_LIMIT = "ARCHIVE_LIMIT"
    PREAMBLE_EXEC = "PREAMBLE_EXEC"
    INCOMPLETE = "INCOMPLETE"
    PATIENT_CONFLICT = "PATIENT_CONFLICT"
    LEAKAGE = "LEAKAGE"
    ORIENTATION_INVALID = "ORIENTATION_INVALID"
    NIFTI_AFFINE = "NIFTI_AFFINE"
    NIFTI_NONFINITE = "NIFTI_NONFINITE"
    NIFTI_SCALE = "NIFTI_SCALE"
    NIFTI_NDIM = "NIFTI_NDIM"
    GZIP_CORRUPT = "GZIP_CORRUPT"
    NIFTI_SHEAR = "NIFTI_SHEAR"
    ORIENT_SELFTEST = "ORIENT_SELFTEST"
    MATRIX_MISMATCH = "MATRIX_MISMATCH"
    NOT_SELECTED = "NOT_SELECTED"
    NOT_FOR_MODEL = "NOT_FOR_MODEL"
    NOT_DICOM = "NOT_DICOM"
    MODALITY = "MODALITY"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    MODEL_FAILED = "MODEL_FAILED"
    WORKER_DIED = "WORKER_DIED"
    DEADLINE = "DEADLINE"
    IO_ERROR = "IO_ERROR"


class Reason(NamedTuple):
    """What a code does to its file or series, and what a person can do about it."""

    outcome: Outcome
    remedy: str


_QUAR, _REJ, _FLAG, _SKIP = Outcome.QUARANTINE, Outcome.REJECT, Outcome.FLAG, Outcome.SKIP
_C = ReasonCode

REASONS: Mapping[ReasonCode, Reason] = MappingProxyType(
    {
        _C.RESCALE_MISSING: Reason(_QUAR, "no RescaleSlope/Intercept: re-export, or --assume-hu if values are HU"),
        _C.RESCALE_INVALID: Reason(_QUAR, "RescaleSlope is zero, negative or no number: re-export from the scanner"),
        _C.RESCALE_UNITS: Reason(_QUAR, "values are not Hounsfield units (RescaleType): send the HU reconstruction"),
        _C.PADDING_APPLIED: Reason(Outcome.OK, "padding outside the field of view was set to -1024 HU; nothing to do"),
        _C.PIXELREP_CONFLICT: Reason(_QUAR, "sign or bit depth of header and pixels disagree: re-export uncompressed"),
        _C.MONO1: Reason(_FLAG, "MONOCHROME1 is display only; HU are unchanged; nothing to do"),
        _C.HU_IMPLAUSIBLE: Reason(_QUAR, "values cannot be CT (constant, or range too wide): look at the series"),
        _C.GANTRY_TILT: Reason(_FLAG, "gantry tilt: slices were moved back in plane onto a straight grid"),
        _C.SPACING_NONUNIFORM: Reason(_QUAR, "slice distances differ: send one reconstruction with one increment"),
        _C.SLICE_MISSING: Reason(_QUAR, "a slice is missing: export the series again, completely"),
        _C.SLICE_GAPS: Reason(_FLAG, "slices lie farther apart than they are thick: is every other one missing?"),
        _C.DUP_IDENTICAL: Reason(_SKIP, "byte-identical copy of a file already read; nothing to do"),
        _C.DUP_CONFLICT: Reason(_QUAR, "two different files carry one SOPInstanceUID: find out which one is true"),
        _C.DUP_POSITION: Reason(_QUAR, "two slices at one position: export one reconstruction per folder or series"),
        _C.MULTIPHASE: Reason(_FLAG, "several volumes (phases, kernels, planes) shared one series: read separately"),
        _C.NOT_VOLUME: Reason(_SKIP, "localizer, report, secondary capture or other non-volume object; nothing to do"),
        _C.MULTIFRAME_UNSUPPORTED: Reason(_QUAR, "multi-frame CT: export as classic single-frame CT Image Storage"),
        _C.PHOTOMETRIC: Reason(_REJ, "a colour image has no HU; nothing to do unless it should be CT"),
        _C.TS_UNSUPPORTED: Reason(
            _QUAR, "no codec for this transfer syntax or encoding: see medvit-doctor; decompress"
        ),
        _C.LOSSY: Reason(_FLAG, "lossy compression: HU are approximate; prefer the original"),
        _C.PIXEL_TRUNCATED: Reason(_QUAR, "pixel data is not as long as the header says: transfer the file again"),
        _C.NO_PREAMBLE: Reason(_FLAG, "DICOM without its 128-byte preamble was read all the same"),
        _C.TAG_INVALID: Reason(_QUAR, "a needed tag or header is absent or unreadable: re-export from the archive"),
        _C.CHARSET: Reason(_FLAG, "text could not be decoded with the declared character set; kept as raw bytes"),
        _C.RESOURCE_LIMIT: Reason(_QUAR, "the header claims an absurd size: check the file, it may be hostile"),
        _C.NESTING: Reason(_QUAR, "sequences are nested too deeply: check the file, it may be hostile"),
        _C.UNSAFE_NAME: Reason(_REJ, "an identifier is no legal UID, or a header names data elsewhere: fix the source"),
        _C.NOT_REGULAR: Reason(_REJ, "a link, pipe or device is never followed: copy the file itself into the folder"),
        _C.ARCHIVE_LIMIT: Reason(_REJ, "archives are not opened: unpack first"),
        _C.PREAMBLE_EXEC: Reason(_FLAG, "the preamble holds an executable header: treat the source with suspicion"),
        _C.INCOMPLETE: Reason(_QUAR, "the file is still being written: run again later"),
        _C.PATIENT_CONFLICT: Reason(_QUAR, "patient identity differs within a series or study: correct it in the PACS"),
        _C.LEAKAGE: Reason(_QUAR, "one patient on both sides of a split: correct the split column"),
        _C.ORIENTATION_INVALID: Reason(_QUAR, "orientation or position absent or not orthonormal: re-export"),
        _C.NIFTI_AFFINE: Reason(_QUAR, "geometry unset, contradictory or in an unknown space: set it and rewrite"),
        _C.NIFTI_NONFINITE: Reason(_QUAR, "the volume holds NaN or infinity: convert it again"),
        _C.NIFTI_SCALE: Reason(_FLAG, "scl_slope is 0 or NaN: values taken unscaled, as the standard says"),
        _C.NIFTI_NDIM: Reason(_QUAR, "not one 3-D scalar volume: split or convert it"),
        _C.GZIP_CORRUPT: Reason(_REJ, "the compressed stream is damaged: transfer the file again"),
        _C.NIFTI_SHEAR: Reason(_QUAR, "the axes are not orthogonal: resample the volume"),
        _C.ORIENT_SELFTEST: Reason(_QUAR, "orientation self-test failed: do not use this installation; report it"),
        _C.MATRIX_MISMATCH: Reason(_QUAR, "slices of one series differ in rows, columns or spacing: re-export"),
        _C.NOT_FOR_MODEL: Reason(_QUAR, "unlike all scans that the model was trained on: read it without the model"),
        _C.NOT_SELECTED: Reason(_SKIP, "another series of this study was chosen; label series_uid to use this one"),
        _C.NOT_DICOM: Reason(_SKIP, "not an image medvit reads; nothing to do unless it should be CT"),
        _C.MODALITY: Reason(_SKIP, "not CT; nothing to do"),
        _C.OUT_OF_MEMORY: Reason(_QUAR, "more memory than this machine has free: free some, then try it again"),
        _C.MODEL_FAILED: Reason(_QUAR, "the model failed on it: see to the device, then --retry MODEL_FAILED"),
        _C.WORKER_DIED: Reason(_QUAR, "decoding crashed: check the file, then report it"),
        _C.DEADLINE: Reason(_QUAR, "decoding took too long: check the file, then report it"),
        _C.IO_ERROR: Reason(_REJ, "the file could not be read: check permissions and the disk"),
    }
)


class ScanError(MedvitError):
    """Reading one file or series failed; the rest of a batch goes on.

    Args:
        code: why, one of `ReasonCode`.
        detail: what was seen, without identity (no names, ids or paths).
        files: the files concerned, as given to the reader.
    """

    exit_code = EXIT_QUARANTINE

    def __init__(self, code: ReasonCode, detail: str, files: tuple[str, ...] = ()) -> None:
        self.code, self.detail, self.files = code, detail, tuple(files)
        super().__init__(f"{code}: {detail}. {REASONS[code].remedy}")

    def __reduce__(self) -> tuple[type[ScanError], tuple[ReasonCode, str, tuple[str, ...]]]:
        """Rebuild from the parts: a worker process sends this error to its parent."""
        return ScanError, (self.code, self.detail, self.files)


Window = tuple[float, float]
"""(level, width) in HU."""

WINDOWS: Mapping[str, Window] = MappingProxyType(
    {
        "lung": (-600, 1500),
        "soft_tissue": (40, 400),
        "bone": (500, 1800),
        "brain": (40, 120),
        "subdural": (40, 80),
        "blood": (60, 60),
        "stroke": (35, 40),
        "liver": (60, 160),
        "mediastinum": (40, 350),
        "abdomen": (50, 350),
        "angio": (300, 600),
    }
)
"""Presets, level/width in HU. Readers differ by tens of HU; fixed, so that a name means one thing."""


def resolve_window(window: str | Window) -> Window:
    """(level, width) in HU of a preset name or of a pair.

    Raises:
        ValueError: unknown name (the known ones are listed), or a width of 0 HU or less.
    """
    if isinstance(window, str):
        if window not in WINDOWS:
            raise ValueError(f"unknown window {window!r}: give [level, width] or one of {', '.join(WINDOWS)}")
        return WINDOWS[window]
    level, width = window
    if width <= 0:
        raise ValueError(f"window {window}: the width must be above 0 HU (order is [level, width])")
    return float(level), float(width)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanHeader:
    """Where a scan comes from: identity and acquisition. Empty string or None means absent in the source.

    `age` is in years. `site_source` says which DICOM attribute `site` was taken from. `phase` tells volumes apart that
    shared one series: "kernel B60f", "acquisition 2". What names the patient is not in the text of a header, which ends
    in logs and tracebacks.
    """

    patient_id: str = field(default="", repr=False)
    issuer: str = field(default="", repr=False)
    patient_name: str = field(default="", repr=False)
    birth_date: str = field(default="", repr=False)
    frame_of_reference: str = ""
    modality: str = ""
    phase: str = ""
    study_uid: str = ""
    series_uid: str = ""
    sop_uids: tuple[str, ...] = ()
    site: str = ""
    site_source: str = ""
    sex: str = ""
    age: float | None = None
    manufacturer: str = ""
    body_part: str = ""
    kernel: str = ""
    contrast: str = field(default="", repr=False)
    description: str = field(default="", repr=False)
    slice_thickness_mm: float | None = None

    def acquisition(self) -> Mapping[str, str]:
        """How it was scanned, as text, without identity; the same object for all that were scanned alike."""
        contrast = bool(self.contrast)  # free text, in which people write names
        return _acquisition(self.body_part, self.kernel, self.manufacturer, contrast, self.slice_thickness_mm)


@lru_cache(maxsize=1024)
def _acquisition(
    body_part: str, kernel: str, manufacturer: str, contrast: bool, thickness_mm: float | None
) -> Mapping[str, str]:
    return {
        "body_part": body_part,
        "kernel": kernel,
        "manufacturer": manufacturer,
        "contrast": "yes" if contrast else "",
        "slice_thickness_mm": "" if thickness_mm is None else f"{thickness_mm:g}",
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """One CT volume in Hounsfield units, with its geometry and provenance.

    Attributes:
        hu: float32, (Z, Y, X), finite, Hounsfield units; read-only.
        affine: float64, (4, 4), invertible: voxel (x, y, z, 1) -> patient LPS in mm.
        header: identity and acquisition.
        codes: flags; empty when there is nothing to say.
        padding_fraction: share of voxels that were padding, 0..1.
        files: the files it was read from, as given to the reader.
    """

    hu: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    header: ScanHeader = field(default_factory=ScanHeader)
    codes: tuple[ReasonCode, ...] = ()
    padding_fraction: float = 0.0
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hu.ndim != 3 or 0 in self.hu.shape or self.hu.dtype != np.float32:
            raise ValueError(f"hu must be a non-empty float32 (Z, Y, X) array, got {self.hu.dtype} {self.hu.shape}")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError(f"affine must be a finite (4, 4) array, got {self.affine.shape}")
        if abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
            raise ValueError("affine is singular: two voxel axes point the same way")
        self.hu.setflags(write=False)
        self.affine.setflags(write=False)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (x, y, z), mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def show(self, windows: tuple[str | tuple[float, float], ...] = ("lung", "soft_tissue", "bone")) -> Any:
        """Draw the middle slice in each window (preset name or (level, width) in HU); returns a matplotlib figure."""
        from matplotlib import pyplot as plt  # noqa: PLC0415  drawing is for notebooks: reading must not pay for it

        figure, axes = plt.subplots(1, len(windows), figsize=(4 * len(windows), 4), squeeze=False)
        middle = self.hu[len(self.hu) // 2]
        x_mm, y_mm, _ = self.spacing_mm
        for axis, window in zip(axes[0], windows, strict=True):
            level, width = resolve_window(window)
            axis.imshow(middle, cmap="gray", vmin=level - width / 2, vmax=level + width / 2, aspect=y_mm / x_mm)
            axis.set_title(f"{window if isinstance(window, str) else 'window'} {level:g}/{width:g} HU")
            axis.axis("off")
        return figure


class ClaheSettings(BaseModel):
    """Contrast-limited adaptive histogram equalisation, applied to each window after in-plane resizing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_limit: float = Field(2.0, gt=0, description="OpenCV's clip limit: higher gives more local contrast and noise")
    tiles: tuple[int, int] = Field((8, 8), description="tiles along rows and columns")


class Preprocessing(BaseModel):
    """How a scan becomes what the model sees. Travels inside the bundle: served as trained, or not at all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: tuple[str | Window, ...] = Field(
        ("lung", "soft_tissue", "bone"),
        min_length=1,
        description="HU windows, one channel each: preset names or [level, width]",
    )
    clahe: ClaheSettings | None = Field(None, description="null: off; {}: clip 2.0, 8x8 tiles")
    size: int = Field(224, gt=0, description="rows and columns after resizing, px; a multiple of the model's patch")
    train_slices: int = Field(8, gt=0, description="slices per scan in training, drawn anew each epoch")
    predict_slices: int = Field(32, gt=0, description="at most this many slices per scan in prediction, evenly spaced")
    orientation: Literal["LPS", "as_stored"] = Field(
        "LPS", description="LPS: x to the left, y to the back, z to the head, whatever the table position was"
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel, of values 0..1; null: the backbone's own")
    std: tuple[float, ...] | None = Field(None, description="per channel; null: the backbone's own")

    @field_validator("windows")
    @classmethod
    def _known_windows(cls, windows: tuple[str | Window, ...]) -> tuple[str | Window, ...]:
        for window in windows:
            resolve_window(window)
        return windows

    @model_validator(mode="after")
    def _both_or_neither(self) -> Preprocessing:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != len(self.windows):
                raise ValueError(f"{name} has {len(values)} values for {len(self.windows)} windows: one each")
        return self


@dataclass(frozen=True, kw_only=True)
class Case:
    """One CT series (or one slice of a labelled single-slice set) with its label and attributes.

    Attributes:
        case_id: hash; never an identifier of the source.
        patient_id: hash under the site's key.
        group: cases of one group never sit on both sides of a split (patient, or identical pixels).
        files: of the series, as in the inventory, relative to `root`.
        part: which volume of the files, where phases or kernels share them (as `Series.part`).
        identities: hashes of what else may name the patient (issuer and id, name and birth date, frame of reference).
        label: class name; None is unlabelled.
        acquisition: kernel, body part and so on, as far as the header tells.
        attributes: further columns of the labels table, for the report.
    """

    case_id: str
    patient_id: str
    group: str
    root: str
    files: tuple[str, ...]
    part: int = 0
    identities: tuple[str, ...] = ()
    label: str | None = None
    site: str = ""
    site_source: str = ""
    sex: str = ""
    age: float | None = None
    split: str = ""
    study_uid: str = ""
    series_uid: str = ""
    codes: tuple[ReasonCode, ...] = ()
    acquisition: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


IDENTIFIERS = ("case_id", "patient_id", "label", "predicted", "site", "sex", "age")
OPTIONAL = ("fold", "threshold", "study_uid", "series_uid", "flags", "spread", "ood_score", "model_sha256")
PREDICTION_COLUMNS = (*IDENTIFIERS, *OPTIONAL, "age_band")
"""Of predictions.csv beside those of classes (`p_*`), and what reports derive: no attribute may have such a name."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says about one case: one row of predictions.csv.

    Attributes:
        probabilities: by class name, each 0..1, sum 1 within 1e-4.
        threshold: operating point on the positive (last) class for two classes; None: highest probability wins.
        slice_weights: attention of each slice that was looked at (index into the volume as prepared for the model:
            oriented to LPS where `Preprocessing.orientation` says so, weight); weights sum to 1.
        flags: reason codes and other warnings.
        spread: standard deviation over the views of test-time augmentation of the class where it is largest; None:
            one view.
        ood_score: how far the case is from what the model knows; None: not measured.
    """

    case_id: str
    patient_id: str
    probabilities: Mapping[str, float]
    label: str | None = None
    site: str = ""
    sex: str = ""
    age: float | None = None
    fold: int | None = None
    threshold: float | None = None
    study_uid: str = ""
    series_uid: str = ""
    flags: tuple[str, ...] = ()
    spread: float | None = None
    ood_score: float | None = None
    slice_weights: tuple[tuple[int, float], ...] = ()
    model_sha256: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = np.array(list(self.probabilities.values()))
        if len(values) < 2 or not np.isfinite(values).all() or abs(values.sum() - 1) > 1e-4 or values.min() < 0:
            raise ValueError(f"probabilities of two or more classes must be 0..1 and sum to 1, got {values}")

    @property
    def predicted(self) -> str:
        """Class name: by the threshold for two classes with one, else the most probable."""
        names = list(self.probabilities)
        if self.threshold is not None and len(names) == 2:
            return names[int(self.probabilities[names[1]] >= self.threshold)]
        return max(names, key=lambda name: self.probabilities[name])

    def to_row(self) -> dict[str, Any]:
        """Flat, in the column order of predictions.csv (DESIGN section 4); no attribute takes the name of a column."""
        row = {
            "case_id": self.case_id,
            "patient_id": self.patient_id,
            "label": self.label,
            **{f"p_{name}": round(float(p), 6) for name, p in self.probabilities.items()},
            "predicted": self.predicted,
            "site": self.site,
            "sex": self.sex,
            "age": self.age,
            "fold": self.fold,
            "threshold": self.threshold,
            "study_uid": self.study_uid,
            "series_uid": self.series_uid,
            "flags": " ".join(self.flags),
            "spread": None if self.spread is None else round(self.spread, 6),
            "ood_score": None if self.ood_score is None else round(self.ood_score, 6),
            "model_sha256": self.model_sha256,
        }
        return row | {name: value for name, value in self.attributes.items() if name not in row}
