"""How integers reach the kernels, so that an image of another size has none of them compiled anew.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16; for one in a tuple nothing can turn that
off. So every integer that depends on the size of an image is packed at the launch (`pack`), into a number that is
neither, and each kernel unpacks what it gets before it does anything else (`unpack`). Two things about strides the
compiler must know to read 16 bytes at once; both depend on the layout and hardly on the size: along which axis the
stride is 1, and whether all others are multiples of 16 (`multiple_of`). That travels as a tl.constexpr.

Integers that stay the same throughout a training, the number of classes and ignore_index, go as they are: that the
compiler knows more about them costs nothing. Floats are never specialised, but arrive as fp32 unless the kernel
declares them as tl.float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


def pack(value: int) -> int:
    """An integer that is neither 1 nor a multiple of 16. It has 32 bits for values below 2^29."""
    return 4 * value + 2


def pack_known_one(value: int) -> int | tl.constexpr:
    """A packed integer; if it is 1, the compiler knows, where that is worth a variant of the kernel."""
    return tl.constexpr(pack(1)) if value == 1 else pack(value)


@triton.jit
def unpack(packed, MULTIPLE: tl.constexpr = 1):
    """The integer that was packed, after it was divided by MULTIPLE."""
    value = packed >> 2
    return value * MULTIPLE if MULTIPLE != 1 else value


@triton.jit
def unpack_side(packed, MULTIPLE: tl.constexpr = 1):
    """A number of rows or columns, below 2^30, in 32 bits."""
    return unpack(packed, MULTIPLE).to(tl.int32)


def multiple_of(by_rows: bool, *values: int) -> int:
    """16 if all values are multiples of that, and the kernel works on rows of neighbours, which gains by knowing it;
    otherwise 1. The values are then divided by it before they are packed; those that need 64 bits must not seem to need
    32."""
    return 16 if by_rows and all(value % 16 == 0 and value < 2**31 for value in values) else 1
