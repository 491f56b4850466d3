"""The patients of the phantom hospital, their anatomy, and what each site's scanner makes of it. No DICOM here.

A chest of ellipsoids and tubes is drawn in patient coordinates (LPS, mm), so that every site images the same kind of
patient and only the physics differs: slice thickness averages, the kernel blurs or sharpens image and noise alike, and
the calibration drifts. All randomness comes from the patient's seed; arithmetic is float64 so that rounding to whole HU
gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medvit.records import AIR_HU

Volume = npt.NDArray[np.float64]
Grid = tuple[Volume, Volume, Volume]
"""x, y and z of voxel centres, LPS mm, shaped (1, 1, X), (1, Y, 1) and (Z, 1, 1)."""

FIELD_OF_VIEW_MM = 372.0
"""Rows and columns of every image cover this square."""

COVERAGE_MM = 96.0
"""Head-feet range of a complete series, centred on the finding's level."""

SUBSLICE_MM = 2.0
"""Anatomy is drawn this finely and averaged over the slice thickness (a multiple of it)."""

FINDING_MM = (-82.0, 28.0, 0.0)
"""Where the finding is, give or take `FINDING_JITTER_MM`: the back of the right lower lobe (LPS)."""

FINDING_JITTER_MM = 5.0
"""Half width of the uniform jitter of the finding along x, y and z."""

FINDING_HU, FAINT_FINDING_HU, HAZE_HU = (400.0, 700.0), (40.0, 160.0), (0.0, 100.0)
"""Density added to the lung, uniform between: by the finding, by a faint one, and by haze in those who have neither."""

FAINT_SHARE = 0.2
"""Share of findings that are faint and overlap with haze: what keeps every model from being perfect."""


@dataclass(frozen=True, kw_only=True)
class SitePhysics:
    """One hospital's scanner.

    Attributes:
        blur_px: standard deviation of the kernel's Gaussian; 0 keeps the detail.
        sharpening: gain of unsharp masking after it; 0 is none.
        noise_hu: standard deviation of the noise after the kernel.
        hu_offset: calibration drift, added to every voxel above air.
        slice_thickness_mm: also the slice distance; a multiple of `SUBSLICE_MM`.
        table_mm: how far below the isocentre patients lie: the picture is not centred on them. Positions stay true.
        padding: stored value outside the circular field of view (GE writes -2000); None images the whole square.
    """

    name: str
    manufacturer: str
    model: str
    kernel: str
    blur_px: float
    sharpening: float
    noise_hu: float
    hu_offset: float
    slice_thickness_mm: float
    table_mm: float = 0.0
    padding: int | None = None


SITES: tuple[SitePhysics, ...] = (
    SitePhysics(
        name="North Clinic",
        manufacturer="SIEMENS",
        model="Phantom 16",
        kernel="B30f",
        blur_px=0.8,
        sharpening=0.0,
        noise_hu=10.0,
        hu_offset=-40.0,
        slice_thickness_mm=6.0,
    ),
    SitePhysics(
        name="Harbour Hospital",
        manufacturer="SIEMENS",
        model="Phantom 64",
        kernel="B70f",
        blur_px=0.0,
        sharpening=1.5,
        noise_hu=50.0,
        hu_offset=60.0,
        slice_thickness_mm=4.0,
        table_mm=8.0,
    ),
    SitePhysics(
        name="Hill University",
        manufacturer="GE MEDICAL SYSTEMS",
        model="Phantom VCT",
        kernel="STANDARD",
        blur_px=0.4,
        sharpening=0.0,
        noise_hu=30.0,
        hu_offset=0.0,
        slice_thickness_mm=4.0,
        padding=-2000,
    ),
)
"""Invented hospitals. Same patients, different pictures."""


@dataclass(frozen=True, kw_only=True)
class PhantomPatient:
    """One invented person and the truth about them.

    Attributes:
        sex: "F" or "M", as in PatientSex.
        age: years.
        finding: whether the finding is there: the label.
        finding_mm: where it is, or would be; LPS.
        seed: of everything random about the anatomy and the noise.
    """

    patient_id: str
    name: str
    sex: str
    age: int
    site: SitePhysics
    finding: bool
    finding_mm: tuple[float, float, float]
    seed: int


FAMILY_NAMES = ("Åkesson", "Baker", "Çelik", "Dvořák", "Egede", "Fischer", "García", "Hansen", "Ito", "Jensen", "Kaya")
"""Invented patients have real alphabets: DICOM text is written as UTF-8 (ISO_IR 192)."""


def make_patients(
    n: int, seed: int, *, sites: tuple[SitePhysics, ...] = SITES, prevalence: float = 0.5
) -> tuple[PhantomPatient, ...]:
    """Draw patients whose label cannot be guessed from site or sex.

    Patients go round the site-by-sex cells; within a cell labels come at even distance. With 12 patients per three
    sites (or a multiple) and a prevalence of one half all cells are exactly balanced.

    Args:
        n: how many.
        seed: same seed, same patients; another seed, other people (ids differ as well).
        sites: the scanners to distribute them over.
        prevalence: share with the finding, 0..1.
    """
    return tuple(_make_patient(i, seed, sites, prevalence) for i in range(n))


def _make_patient(i: int, seed: int, sites: tuple[SitePhysics, ...], prevalence: float) -> PhantomPatient:
    rng = np.random.default_rng([seed, i])
    turn, cell = divmod(i, 2 * len(sites))
    site, sex = cell % len(sites), cell // len(sites)
    start = 0.5 * ((site + sex) % 2)  # neighbouring cells start with opposite labels: small sets are balanced as well
    x, y, z = np.array(FINDING_MM) + rng.uniform(-FINDING_JITTER_MM, FINDING_JITTER_MM, 3)
    return PhantomPatient(
        patient_id=f"PH{seed:04d}-{i:04d}",
        name=f"{FAMILY_NAMES[i % len(FAMILY_NAMES)]}^{'Robin Toni'.split()[sex]}",
        sex="FM"[sex],
        age=int(rng.integers(35, 86)),
        site=sites[site],
        finding=bool(np.floor((turn + 1) * prevalence + start) > np.floor(turn * prevalence + start)),
        finding_mm=(round(float(x), 3), round(float(y), 3), round(float(z), 3)),
        seed=int(rng.integers(2**31)),
    )


def render(
    patient: PhantomPatient, *, matrix: int = 96, slices: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Scan a patient at their site.

    Args:
        patient: anatomy, truth, site and seed.
        matrix: rows and columns.
        slices: how many, centred on the finding's level; None covers `COVERAGE_MM`.

    Returns:
        HU, float32 (Z, Y, X), feet to head, not below -1024; affine (4, 4), voxel (x, y, z, 1) -> LPS mm.
    """
    site = patient.site
    depth = slices or round(COVERAGE_MM / site.slice_thickness_mm)
    fine = round(site.slice_thickness_mm / SUBSLICE_MM)
    pixel_mm = FIELD_OF_VIEW_MM / matrix
    x, y = centred(matrix, pixel_mm), centred(matrix, pixel_mm) - site.table_mm
    z = centred(depth * fine, SUBSLICE_MM) + FINDING_MM[2]

    truth = draw_anatomy(patient, (x[None, None, :], y[None, :, None], z[:, None, None]))
    thick = truth.reshape(depth, fine, matrix, matrix).mean(axis=1)
    hu = acquire(thick, site, np.random.default_rng([patient.seed, 1]))

    affine = np.diag([pixel_mm, pixel_mm, site.slice_thickness_mm, 1.0])
    affine[:3, 3] = x[0], y[0], z[:fine].mean()
    return hu.astype(np.float32), affine


def centred(n: int, spacing_mm: float) -> Volume:
    """Positions of `n` voxel centres about 0, mm."""
    positions: Volume = np.arange(n, dtype=np.float64)
    return (positions - (n - 1) / 2) * spacing_mm


def acquire(truth: Volume, site: SitePhysics, rng: np.random.Generator) -> Volume:
    """What the site's scanner makes of `truth` (HU, (Z, Y, X)): kernel, noise through the same kernel, drift."""
    noise = apply_kernel(rng.standard_normal(truth.shape), site)
    image = apply_kernel(truth, site) + noise * (site.noise_hu / noise.std()) + site.hu_offset
    hu: Volume = np.maximum(np.round(image), AIR_HU)
    return hu


def apply_kernel(image: Volume, site: SitePhysics) -> Volume:
    """Reconstruction kernel in plane: Gaussian blur, then unsharp masking."""
    smooth: Volume = ndimage.gaussian_filter(image, (0, site.blur_px, site.blur_px), mode="nearest")
    smoother: Volume = ndimage.gaussian_filter(smooth, (0, 1, 1), mode="nearest")
    return smooth + site.sharpening * (smooth - smoother)


def draw_anatomy(patient: PhantomPatient, at: Grid) -> Volume:
    """The patient before any scanner: HU (Z, Y, X)."""
    rng = np.random.default_rng([patient.seed, 0])
    width, depth = rng.normal((158, 108) if patient.sex == "M" else (148, 102), 5)
    fat_mm = rng.uniform(8, 16) + (4 if patient.sex == "F" else 0)
    x, y, _ = at
    plane = (x, y, np.zeros((1, 1, 1)))  # what does not change along z is drawn once
    hu = np.full(np.broadcast_shapes(*(grid.shape for grid in at)), -1000.0)

    paint(hu, np.maximum(abs(y - 128) - 6, abs(x) - 170), -150)  # table
    paint(hu, ellipsoid(plane, (0, 0, 0), (width, depth, np.inf)), -100)  # fat
    paint(hu, ellipsoid(plane, (0, 0, 0), (width - fat_mm, depth - fat_mm, np.inf)), rng.normal(45, 6))  # muscle
    lung_hu = rng.normal(-850, 18)
    for side in (-1, 1):
        centre = (side * rng.normal(76, 2), rng.normal(-4, 2), rng.normal(20, 6))
        paint(hu, ellipsoid(at, centre, (rng.normal(50, 2), rng.normal(74, 3), 130)), lung_hu)
    paint(hu, ellipsoid(at, (22, -30, -10), rng.normal((46, 44, 60), 3)), rng.normal(50, 8))  # heart
    paint(hu, ellipsoid(plane, (16, 48, 0), (12, 12, np.inf)), rng.normal(55, 8))  # descending aorta
    paint(hu, ellipsoid(plane, (0, 68, 0), (19, 17, np.inf)), rng.normal(300, 40))  # vertebra
    paint(hu, ellipsoid(plane, (0, 88, 0), (8, 7, np.inf)), 30)  # spinal canal
    for start, end, radius in vessels(rng):
        paint_tube(hu, at, start, end, radius, rng.normal(20, 30))
    paint_finding(hu, at, patient)
    return hu + texture(hu.shape, rng)


def vessels(rng: np.random.Generator) -> Iterator[tuple[Volume, Volume, float]]:
    """Branches from each hilum outwards, as bright as the finding but long: start and end (LPS mm), radius (mm)."""
    for side in (-1, 1):
        for _ in range(12):
            start = np.array([side * 45, 0, 15]) + rng.normal(0, 8, 3)
            reach = rng.uniform(-1, 1, 3) * (35, 60, 60) + (side * 40, 0, -10)
            yield start, start + reach, rng.uniform(1.5, 3.5)


def paint_finding(hu: Volume, at: Grid, patient: PhantomPatient) -> None:
    """Add a ground-glass opacity, 26-36 mm across and longer head to feet, at the patient's place for it.

    Everybody has some haze there (blood pools in the dependent lung), and some findings are hardly denser.
    """
    rng = np.random.default_rng([patient.seed, 2])
    axes = rng.uniform(13, 18) * rng.uniform(0.85, 1.15, 3) * (1, 1, 1.8)
    finding_hu = FAINT_FINDING_HU if rng.random() < FAINT_SHARE else FINDING_HU
    density = rng.uniform(*(finding_hu if patient.finding else HAZE_HU))
    hu += density * coverage(ellipsoid(at, patient.finding_mm, axes), edge_mm=8.0)


def texture(shape: tuple[int, ...], rng: np.random.Generator) -> Volume:
    """Tissue is not uniform: smooth random field, 8 HU standard deviation, (Z, Y, X)."""
    field: Volume = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    return field * float(8 / field.std())


def ellipsoid(at: Grid, centre: tuple[float, float, float], axes: npt.ArrayLike) -> Volume:
    """Roughly the signed distance to an ellipsoid's surface, mm, negative inside; an infinite axis is a cylinder."""
    x, y, z = (((p - c) / a) ** 2 for p, c, a in zip(at, centre, np.asarray(axes), strict=True))
    surface: Volume = (np.sqrt(x + y + z) - 1) * np.min(axes)
    return surface


def paint_tube(hu: Volume, at: Grid, start: Volume, end: Volume, radius_mm: float, value: float) -> None:
    """Paint a round-ended tube between two LPS points. Only its bounding box is touched: a full volume is slow."""
    box, offset = [], []
    for grid, low, high, origin in zip(at, np.minimum(start, end), np.maximum(start, end), start, strict=True):
        line = grid.ravel()
        inside = slice(*np.searchsorted(line, (low - radius_mm - 4, high + radius_mm + 4)))
        box.append(inside)
        offset.append(line[inside] - origin)
    p = np.stack(np.broadcast_arrays(offset[0], offset[1][:, None], offset[2][:, None, None]), axis=-1)
    along = np.clip(p @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    distance = np.linalg.norm(p - along[..., None] * (end - start), axis=-1) - radius_mm
    paint(hu[tuple(reversed(box))], distance, value)


def paint(hu: Volume, distance_mm: Volume, value: float) -> None:
    """Fill `hu` in place with `value` where `distance_mm` to a surface is negative."""
    hu += (value - hu) * coverage(distance_mm)


def coverage(distance_mm: Volume, edge_mm: float = 4.0) -> Volume:
    """Share of each voxel (0..1) inside a surface at a signed distance: partial volume, over `edge_mm`."""
    share: Volume = np.clip(0.5 - distance_mm / edge_mm, 0, 1)
    return share
