"""Random valid CT series with a known answer, and the accounts that must add up whatever else lies in a folder.

`any_series(random, syntax)` draws what real exports vary without being wrong: orientation, direction of travel, slice
distance, sign, bits, a rescale of its own for each slice, file names, folders, InstanceNumber. The values are those of
`ct_builder`: HU = -1000 + 11 col + 3 row + 40 slice. A flip, a shift, an exchange of slices all show in world space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from random import Random

import numpy as np
from ct_builder import Ct, Grid, save, world_points
from pydicom import Dataset

from medvit.io import FileEntry, Inventory, Series, read
from medvit.records import REASONS, Outcome, ReasonCode, Scan, ScanError

ROWS, COLUMNS = 33, 36  # OpenJPEG's encoder wants 32 at least
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"
SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "big endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG lossless": JPEG_LOSSLESS,
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
}

_UNITS = [tuple(float(sign * (k == axis)) for k in range(3)) for axis in range(3) for sign in (1, -1)]
ORIENTATIONS = [(row, column) for row, column in permutations(_UNITS, 2) if np.dot(row, column) == 0]
"""The 24 pairs of row and column direction along the patient's axes."""

NAMINGS: tuple[Callable[[int], str], ...] = (
    "IM{:05d}".format,
    "{}.dcm".format,
    "slice {}.DCM".format,
    "1.2.826.0.1.{}".format,
    "Schädel–{}".format,
    "{:x}.txt".format,
)


@dataclass(frozen=True)
class AnySeries:
    """A series before it is written.

    Attributes:
        slices: how each slice is written: one `Ct` each, for each has its own rescale.
        names: path of each slice below the folder.
    """

    grid: Grid
    hu: np.ndarray  # (Z, Y, X)
    slices: tuple[Ct, ...]
    names: tuple[str, ...]

    def write(self, root: Path, names: tuple[str, ...] | None = None) -> list[Path]:
        """Write each slice under its name, or under others; returns the paths in the order of the slices."""
        paths = [root / name for name in names or self.names]
        for index, (ct, path) in enumerate(zip(self.slices, paths, strict=True)):
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset = ct.dataset(index)
            ct.edit(dataset, index)
            save(dataset, path)
        return paths


def any_series(
    random: Random, syntax: str, *, orientation: tuple | None = None, uid: int = 1, study: int = 1, folder: str = ""
) -> AnySeries:
    """Draw a series.

    Args:
        random: decides everything that is not given.
        syntax: transfer syntax UID.
        orientation: (row, column) directions; None: an axis or, as often, an oblique one.
        uid: number of the series, and `study` of its study and patient.
        folder: its files lie below.
    """
    count = random.randint(3, 7)
    grid = any_grid(random, orientation)
    z, y, x = np.indices((count, ROWS, COLUMNS))
    hu = -1000 + 11 * x + 3 * y + 40 * z
    signed, bits = random.choice([(False, 12), (False, 16), (True, 12), (True, 16)])
    # signed 12 bits hold -2048..2047: no room for -1000 HU in quarters
    slopes = (1.0, 0.5, 1.5) if signed and bits == 12 else (1.0, 0.5, 0.25, 1.5)
    intercepts = (0.0, -8.0) if signed else (-1024.0, -1000.0, -1031.25)
    edit = any_edit(random, count)
    slices = tuple(
        Ct(
            grid=grid,
            hu=hu,
            uid=uid,
            study=study,
            patient=f"Patient-{study}",
            signed=signed,
            bits_stored=bits,
            slopes=(random.choice(slopes),),
            intercept=random.choice(intercepts),
            transfer_syntax=syntax,
            edit=edit,
        )
        for _ in range(count)
    )
    return AnySeries(grid, hu, slices, any_names(random, count, folder))


def any_grid(random: Random, orientation: tuple | None = None) -> Grid:
    if orientation is None:
        orientation = random.choice(ORIENTATIONS) if random.random() < 0.5 else oblique(random)
    row, column = orientation
    step = random.choice((0.6, 1.25, 2.5, 3.7)) * random.choice((1, -1))  # mm; at most 1.5 times the thickness
    return Grid(
        row=row,
        column=column,
        step=tuple(step * np.cross(row, column)),
        origin=tuple(round(random.uniform(-300, 300), 4) for _ in range(3)),
    )


def oblique(random: Random) -> tuple:
    """(row, column) of a random rotation."""
    a, b, c = (random.uniform(0, 2 * math.pi) for _ in range(3))
    turn_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    turn_z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    turn_y = np.array([[math.cos(c), 0, math.sin(c)], [0, 1, 0], [-math.sin(c), 0, math.cos(c)]])
    rotation = turn_x @ turn_z @ turn_y
    return tuple(rotation[:, 0].tolist()), tuple(rotation[:, 1].tolist())


def any_names(random: Random, count: int, folder: str = "") -> tuple[str, ...]:
    """Names in an order that says nothing, over one to three folders."""
    naming = random.choice(NAMINGS)
    folders = [f"{folder}/{part}".strip("/") for part in ("", "b", "a/deeper")][: random.randint(1, 3)]
    return tuple(f"{random.choice(folders)}/{naming(n)}".lstrip("/") for n in random.sample(range(1000), count))


def any_edit(random: Random, count: int) -> Callable[[Dataset, int], None]:
    """InstanceNumber shuffled, all equal or absent; private elements now and then."""
    numbers = random.choice((random.sample(range(1, count + 1), count), [1] * count, None))
    private = random.random() < 0.5

    def edit(dataset: Dataset, index: int) -> None:
        if numbers is None:
            del dataset.InstanceNumber
        else:
            dataset.InstanceNumber = numbers[index]
        if private:
            block = dataset.private_block(0x0029, "ACME 1.1", create=True)
            block.add_new(0x10, "OB", bytes(range(256)))
            block.add_new(0x11, "LO", f"protocol {index}")

    return edit


# ---- what must hold -------------------------------------------------------------------------------------------------


def assert_known_answer(scan: Scan, series: AnySeries) -> None:
    """Each voxel of the series once, where it lies in the patient within 0.1 mm, with its value within 1 HU."""
    inverse = np.linalg.inv(series.grid.affine)
    voxel = world_points(scan.affine, scan.hu.shape) @ inverse[:3, :3].T + inverse[:3, 3]
    nearest = np.rint(voxel)
    off_mm = np.linalg.norm((voxel - nearest) @ series.grid.affine[:3, :3].T, axis=-1)
    assert off_mm.max() <= 0.1
    x, y, z = np.moveaxis(nearest.astype(int), -1, 0)
    found = np.full(series.hu.shape, np.nan)
    found[z, y, x] = scan.hu
    np.testing.assert_allclose(found, series.hu, atol=1)


def assert_conserved(inventory: Inventory, root: Path) -> None:
    """Used and set aside are the files seen: one entry each, with a reason where it is not used."""
    seen = sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    assert [entry.path for entry in inventory.files] == seen
    assert sum(inventory.counts().values()) == len(seen)
    for entry in inventory.files:
        assert entry.outcome in Outcome
        assert entry.outcome is Outcome.OK or entry.code in ReasonCode, entry
    used = sorted(entry.path for entry in inventory.files if entry.outcome.used)
    assert used == sorted(name for series in inventory.series if series.usable for name in series.files)


def settle(inventory: Inventory) -> tuple[dict[tuple, tuple[Series, Scan]], dict[str, FileEntry]]:
    """Read every usable series: the scans by series key, and the files that did not get into one.

    A fault that only decoding shows sets the files of its series aside, with its code.
    """
    scans, late = {}, {}
    for series in inventory.series:
        if series.usable:
            try:
                scans[series.key] = series, read(series)
            except ScanError as error:
                late |= dict.fromkeys(series.files, error.code)
    aside = {}
    for entry in inventory.files:
        code = late.get(entry.path)
        if code is not None:
            entry = FileEntry(entry.path, REASONS[code].outcome, code, "", entry.series_uid)  # noqa: PLW2901
        if code is not None or not entry.outcome.used:
            aside[entry.path] = entry
    return scans, aside


def same(one: Scan, other: Scan) -> bool:
    """Bit for bit the same volume, geometry, provenance and flags; file names may differ."""
    return (
        one.hu.shape == other.hu.shape
        and one.hu.tobytes() == other.hu.tobytes()
        and one.affine.tobytes() == other.affine.tobytes()
        and one.header == other.header
        and one.codes == other.codes
        and one.padding_fraction == other.padding_fraction
    )
