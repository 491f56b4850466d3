"""Enhanced and legacy-converted CT: the functional groups of a multi-frame object (PS3.3 C.7.6.16) -> flat values."""

from __future__ import annotations

from medvit.io.elements import Values
from medvit.io.values import integer


def frame_values(values: Values, *, little: bool) -> list[Values]:
    """Flat values of each frame of an Enhanced CT object: its own functional groups over the shared ones.

    `little` is the byte order of binary values.
    Returns a single item, the values as they are, where the groups are not one for each frame: `file_fault` refuses it.
    """
    groups = values.get("PerFrameFunctionalGroupsSequence", [])
    shared = values.get("SharedFunctionalGroupsSequence", [])
    top = {name: value for name, value in values.items() if not name.endswith("FunctionalGroupsSequence")}
    if not groups or len(groups) != integer(values, "NumberOfFrames", 1, little=little):
        return [{**top, "NumberOfFrames": b"0"}]
    base = {
        **top,
        **_flattened(shared[0] if shared else {}, little=little),
        "NumberOfFrames": str(len(groups)).encode(),
    }
    return [{**base, **_flattened(group, little=little)} for group in groups]


def _flattened(group: Values, *, little: bool) -> Values:
    flat: Values = {}
    for items in group.values():
        for item in items[:1]:
            flat.update(item)
    for ours, theirs in {
        "TemporalPositionIdentifier": "TemporalPositionIndex",
        "AcquisitionNumber": "FrameAcquisitionNumber",
    }.items():
        if theirs in flat:
            flat[ours] = str(int.from_bytes(flat.pop(theirs)[:4], "little" if little else "big")).encode()
    if "FrameType" in flat:
        flat["ImageType"] = flat.pop("FrameType")
    return flat
