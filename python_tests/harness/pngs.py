"""PNG files of every colour type, depth and interlacing, written byte by byte: Pillow writes some of them only."""

from __future__ import annotations

import struct
import zlib

import numpy as np

COLOUR_TYPES = {  # Each has its number, samples per pixel, and the depths that it may have.
    "grey": (0, 1, (1, 2, 4, 8, 16)),
    "RGB": (2, 3, (8, 16)),
    "palette": (3, 1, (1, 2, 4, 8)),
    "grey with alpha": (4, 2, (8, 16)),
    "RGBA": (6, 4, (8, 16)),
}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(
    samples: np.ndarray,
    colour_type: str,
    depth: int,
    *,
    palette: np.ndarray | None = None,
    transparent: bytes | None = None,
    interlaced: bool = False,
) -> bytes:
    """samples: (H, W, samples per pixel), as they are stored. palette: (n, 3). transparent: what tRNS holds."""
    height, width, _ = samples.shape
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [samples]
    rows = b"".join(b"\0" + _packed(row, depth) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[colour_type][0], 0, 0, interlaced)
    parts = [(b"IHDR", header)]
    if palette is not None:
        parts.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    if transparent is not None:
        parts.append((b"tRNS", transparent))
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _packed(row: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
