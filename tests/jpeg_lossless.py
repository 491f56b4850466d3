"""A small encoder of JPEG lossless, first-order prediction (ISO/IEC 10918-1 process 14, selection value 1).

The codecs that medvit uses decode this format but cannot write it. Here one fixed Huffman table gives each of the 17
difference categories a code of five bits: no compression to speak of, and a legal stream.
"""

import struct

import numpy as np

CATEGORIES = 17
CODE_LENGTH = 5


def encode(plane: np.ndarray, bits: int) -> bytes:
    """One (H, W) plane of unsigned stored values below 2**bits -> a JPEG stream of even length."""
    rows, columns = plane.shape
    values = plane.astype(np.int64)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]  # the neighbour on the left
    predicted[1:, 0] = values[:-1, 0]  # at the line's start the one above
    predicted[0, 0] = 1 << (bits - 1)
    # differences are modulo 2**16 (H.1.2.1): from -32767 to 32768
    difference = (values - predicted + 32767) % 65536 - 32767
    table = bytes([0, *(CATEGORIES if length == CODE_LENGTH else 0 for length in range(1, 17)), *range(CATEGORIES)])
    stream = (
        b"\xff\xd8"
        + _segment(0xC3, struct.pack(">BHHB3B", bits, rows, columns, 1, 1, 0x11, 0))
        + _segment(0xC4, table)
        + _segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
        + _entropy_coded(difference.ravel())
        + b"\xff\xd9"
    )
    return stream + b"\0" * (len(stream) % 2)


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def _entropy_coded(differences: np.ndarray) -> bytes:
    text = []
    for difference in differences.tolist():
        category = abs(difference).bit_length()
        text.append(format(category, f"0{CODE_LENGTH}b"))
        if 0 < category < 16:  # category 16 is 32768 alone and has no further bits
            text.append(format(difference if difference > 0 else difference + (1 << category) - 1, f"0{category}b"))
    bits = "".join(text)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
