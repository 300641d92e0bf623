"""Every opcode of harness/ptx does what the PTX ISA says, in all lanes: against NumPy and Python's integers."""

from __future__ import annotations

import json
import math
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from harness import ptx
from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(ptx.why_not() is not None, reason=str(ptx.why_not()))

Array = NDArray[Any]
THREADS = 103
"""Of a block: three full warps, and one with few lanes."""

# ----------------------------------------------------------------------------------------------------------------------
# Texts


REGISTERS = {"pred": "%p", "b16": "%rs", "b32": "%r", "b64": "%rd", "f32": "%f", "f64": "%fd"}


def bits_of(type: str) -> int:
    return 1 if type == "pred" else int(type.lstrip("bfnsu"))


def dtype_of(type: str) -> np.dtype[Any]:
    """n32, a number of bits, is a u32; NumPy has no bf16."""
    special = {"pred": "?", "bf16": "u2", "n32": "u4"}
    kind = {"b": "u", "s": "i"}.get(type[0], type[0])
    return np.dtype(special.get(type) or f"{kind}{bits_of(type) // 8}")


def register(type: str, number: int) -> str:
    return f"{REGISTERS.get(type) or REGISTERS[f'b{max(16, bits_of(type))}']}{number}"


def kernel(body: str, parameters: int = 0, before: str = "", first: str = ".u64 test_param_0") -> str:
    """A module of one kernel, as nvcc writes it. %r90 is the thread's number among all; registers go up to 99."""
    names = [first, *(f".u64 test_param_{i}" for i in range(1, parameters))][:parameters]
    parameter_lines = ",\n".join(f"\t.param {name}" for name in names)
    register_lines = "\n".join(f"\t.reg .{type} \t{letters}<100>;" for type, letters in REGISTERS.items())
    return f"""
.version 9.0
.target sm_80
.address_size 64
{before}
.visible .entry test(
{parameter_lines}
)
{{
{register_lines}
	mov.u32 %r91, %ctaid.x;
	mov.u32 %r92, %ntid.x;
	mov.u32 %r93, %tid.x;
	mad.lo.s32 %r90, %r91, %r92, %r93;
{body}
	ret;
}}
"""


def address(parameter: int, size: int, of: str = "%r90") -> str:
    """Sets %rd90 to where the entry of a thread is."""
    return f"""
	ld.param.u64 %rd90, [test_param_{parameter}];
	cvta.to.global.u64 %rd90, %rd90;
	mul.wide.u32 %rd91, {of}, {size};
	add.s64 %rd90, %rd90, %rd91;
"""


def vector(names: Sequence[str]) -> str:
    return f"{{{', '.join(names)}}}"


def load(parameter: int, type: str, to: str) -> str:
    size = dtype_of(type).itemsize
    if type == "pred":
        return address(parameter, size) + f"ld.global.u8 %rs99, [%rd90];\nsetp.ne.s16 {to}, %rs99, 0;\n"
    return address(parameter, size) + f"ld.global.b{8 * size} {to}, [%rd90];\n"


def store(parameter: int, type: str, value: str, offset: int = 0) -> str:
    size = dtype_of(type).itemsize
    if type == "pred":
        return address(parameter, 1) + f"selp.u16 %rs99, 1, 0, {value};\nst.global.u8 [%rd90+{offset}], %rs99;\n"
    return address(parameter, size) + f"st.global.b{8 * size} [%rd90+{offset}], {value};\n"


# ----------------------------------------------------------------------------------------------------------------------
# Operands


def integer_edges(type: str) -> list[int]:
    bits = bits_of(type)
    top = 1 << (bits - 1)
    edges = [0, 1, -1, top, top - 1, 2, top + 1, top - 2, -2, 3, -3, 7, 100, -100]
    edges += [1 << i for i in range(bits)]
    return edges + [(1 << i) + one for i in (7, 8, 15, 16, 24, 31, 32, 53) for one in (-1, 1) if i < bits]


def float_edges(dtype: np.dtype[Any]) -> list[Any]:
    info = np.finfo(dtype)
    edges = [0.0, 1, np.inf, info.max, info.smallest_normal, info.smallest_subnormal, 1 + info.eps, 1.5, 0.5, 2, 2.5, 3]
    edges += [info.smallest_normal - info.smallest_subnormal, 1 - info.eps / 2, 0.1, 0.75, 126.5, 127.9, 149, 150, 1024]
    edges += [2.0**e for e in (-150, -149, -133, -126, -25, -24, -14, 11, 15, 16, 24, 31, 32, 53, 63, 64, 127)]
    below = [np.nextafter(dtype.type(2.0**e), dtype.type(0)) for e in (31, 32, 63, 64) if 2.0**e < info.max]
    edges += [*below, 65504, 65519, 65520, 2.0**24 + 1, 2.0**31 - 0.5, 2.0**53 + 1]
    return [np.nan, *(sign * edge for edge in edges for sign in (1, -1))]


def edges_of(type: str) -> Array:
    """Where an instruction may go wrong, the most dangerous first."""
    if type == "pred":
        return np.array([False, True])
    if type == "n32":
        return np.array([0, 1, 31, 32, 33, 256, 255, 2**32 - 1, 5, 15, 16, 17, 63, 64, 65, 257, 1 << 31], "u4")
    if type == "bf16":
        return (edges_of("f32").view("u4") >> 16).astype("u2")
    if type[0] == "f":
        with np.errstate(all="ignore"):
            edges = np.array(float_edges(dtype_of(type))).astype(dtype_of(type))
        return np.append(edges, np.array(-1, f"i{edges.itemsize}").view(edges.dtype))  # a NaN of which every bit is set
    mask = (1 << bits_of(type)) - 1
    return np.array([edge & mask for edge in integer_edges(type)], f"u{bits_of(type) // 8}").view(dtype_of(type))


def random_of(type: str, rng: np.random.Generator, count: int = 2000) -> Array:
    """Any bits; numbers halfway between two of fewer digits, or just beside that; of floats also usual ones."""
    if type == "pred":
        return rng.random(4 * count) < 0.5
    if type == "n32":
        return rng.integers(0, 70, 4 * count, "u4")
    if type == "bf16":
        return (random_of("f32", rng, count).view("u4") >> 16).astype("u2")
    bits, dtype = bits_of(type), dtype_of(type)
    some = rng.integers(0, 1 << bits, (2, count), "u8")
    if dtype.kind == "f":
        length = np.full(count, np.finfo(dtype).nmant + 1)
        halfway = halved(some[0], length, rng)
        usual = rng.standard_normal(count) * 2.0 ** rng.integers(-30, 12, count)
        return np.concatenate([np.ravel([*some, halfway]).astype(f"u{bits // 8}").view(dtype), usual.astype(dtype)])
    some[0] >>= rng.integers(0, bits, count, "u8")  # of any magnitude
    halfway = halved(some[0], np.frexp(some[0].astype(np.longdouble))[1], rng)
    return np.ravel([*some, halfway, -halfway]).astype(f"u{bits // 8}").view(dtype)


def halved(values: Array, length: Array, rng: np.random.Generator) -> Array:
    """Makes the last of so many digits 10…0, or one more or less: those that a bf16, f16, f32 or f64 has no room for,
    or any."""
    lost = length - rng.choice([8, 11, 24, 53], len(values))
    lost = np.where(lost > 0, lost, rng.integers(1, 53, len(values)) % np.maximum(length - 1, 1) + 1).astype("u8")
    return (values >> lost << lost) + (np.uint64(1) << lost - 1) + rng.integers(0, 3, len(values), "u8") - 1


def operands_of(opcode: str) -> list[Array]:
    """Every combination of edges, of those of three or more only the first; and random operands."""
    types = TABLE[opcode].operands
    rng = np.random.default_rng(len(opcode))
    most = {1: None, 2: None, 3: 17, 4: 8}[len(types)]
    crossed = np.meshgrid(*(edges_of(type)[:most] for type in types), indexing="ij")
    operands = [np.concatenate([x.ravel(), random_of(type, rng)]) for x, type in zip(crossed, types, strict=True)]
    if opcode.startswith(("div.", "rem.")) and types[1][0] != "f":
        operands[1][operands[1] == 0] = 3  # a division by 0 is an error
    lanes = -(-len(operands[0]) // THREADS) * THREADS
    return [np.resize(x, lanes) for x in operands]


# ----------------------------------------------------------------------------------------------------------------------
# What the PTX ISA says


class Opcode(NamedTuple):
    """Its types, and a function of arrays, which may give integers of any size."""

    operands: list[str]
    result: str
    compute: Callable[..., Array]

    def expected(self, operands: Sequence[Array]) -> Array:
        """The result, in its type: what that has no bits for is lost."""
        with np.errstate(all="ignore"):
            values = np.asarray(self.compute(*operands))
        dtype = dtype_of(self.result)
        if values.dtype != object:
            assert values.dtype == dtype
            return values
        return (values & (1 << bits_of(self.result)) - 1).astype(f"u{dtype.itemsize}").view(dtype)


TABLE: dict[str, Opcode] = {}


def define(opcode: str, signature: str, compute: Callable[..., Array]) -> None:
    """signature: such as "s32 s32 -> s64"."""
    operands, result = signature.split(" -> ")
    TABLE[opcode] = Opcode(operands.split(), result, compute)


def exact(function: Callable[..., Any]) -> Callable[..., Array]:
    """A function of Python's numbers, of which none is the largest, lane by lane."""

    def of_arrays(*operands: Array) -> Array:
        return np.asarray(np.frompyfunc(function, len(operands), 1)(*(x.astype(object) for x in operands)))

    return of_arrays


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def define_integer(t: str) -> None:
    bits, unary, binary, ternary = bits_of(t), f"{t} -> {t}", f"{t} {t} -> {t}", f"{t} {t} {t} -> {t}"
    define(f"add.{t}", binary, exact(operator.add))
    define(f"sub.{t}", binary, exact(operator.sub))
    define(f"mul.lo.{t}", binary, exact(operator.mul))
    define(f"mul.hi.{t}", binary, exact(lambda a, b: a * b >> bits))
    define(f"mad.lo.{t}", ternary, exact(lambda a, b, c: a * b + c))
    define(f"div.{t}", binary, exact(quotient))
    define(f"rem.{t}", binary, exact(lambda a, b: a - b * quotient(a, b)))
    define(f"min.{t}", binary, exact(min))
    define(f"max.{t}", binary, exact(max))
    define(f"shr.{t}", f"{t} n32 -> {t}", exact(lambda a, n: a >> min(n, bits)))
    if bits < 64:
        wide = f"{t[0]}{2 * bits}"
        define(f"mul.wide.{t}", f"{t} {t} -> {wide}", exact(operator.mul))
        define(f"mad.wide.{t}", f"{t} {t} {wide} -> {wide}", exact(lambda a, b, c: a * b + c))
    if t[0] == "s":
        define(f"neg.{t}", unary, exact(operator.neg))
        define(f"abs.{t}", unary, exact(abs))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        define(f"setp.{name}.{t}", f"{t} {t} -> pred", exact(getattr(operator, name)))


def define_logic(t: str) -> None:
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        define(f"{name}.{t}", f"{t} {t} -> {t}", exact(function))
    define(f"not.{t}", f"{t} -> {t}", exact(lambda a: -1 - a))


def selected(a: Array, b: Array, choice: Array) -> Array:
    return np.where(choice, a, b)


def define_moves(t: str) -> None:
    define(f"mov.{t}", f"{t} -> {t}", lambda a: a)
    if t != "pred":
        define(f"selp.{t}", f"{t} {t} pred -> {t}", selected)


def define_bits(t: str) -> None:
    bits = bits_of(t)
    define(f"shl.{t}", f"{t} n32 -> {t}", exact(lambda a, n: a << min(n, bits)))
    define(f"setp.eq.{t}", f"{t} {t} -> pred", np.equal)
    define(f"setp.ne.{t}", f"{t} {t} -> pred", np.not_equal)
    if bits >= 32:
        define(f"popc.{t}", f"{t} -> u32", exact(lambda a: f"{a:b}".count("1")))
        define(f"clz.{t}", f"{t} -> u32", exact(lambda a: bits - a.bit_length()))
        define(f"brev.{t}", f"{t} -> {t}", exact(lambda a: int(f"{a:0{bits}b}"[::-1], 2)))


def permuted(a: int, b: int, selector: int) -> int:
    octets = struct.pack("<II", a, b)
    chosen = [(octets[number & 7], number & 8) for number in (selector >> 4 * i & 15 for i in range(4))]
    return int.from_bytes(bytes((byte >> 7) * 255 if sign else byte for byte, sign in chosen), "little")


def inserted(a: int, b: int, position: int, length: int, bits: int) -> int:
    for i in range(length & 255):
        at = (position & 255) + i
        if i < bits and at < bits:
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def smaller(a: Array, b: Array) -> Array:  # the sum of two zeros is -0 if both are
    return np.where((a == 0) & (b == 0), -(-a + -b), np.fmin(a, b))


def larger(a: Array, b: Array) -> Array:
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in whole numbers of 2**-2148, rounded once: to the nearest float, of two the even one."""
    info = np.finfo(a.dtype)

    def whole(x: float) -> int:
        numerator, denominator = x.as_integer_ratio()
        return numerator * (2**1074 // denominator)

    def one(x: float, y: float, z: float) -> float:
        if not (math.isfinite(x) and math.isfinite(y)):
            return x * y + z
        if not math.isfinite(z):
            return z
        total = whole(x) * whole(y) + (whole(z) << 1074)
        if total == 0:
            return x * y + z  # for its sign
        dropped = max(abs(total).bit_length() - info.nmant - 1, int(info.minexp) - info.nmant + 2148)
        digits, rest = divmod(abs(total), 1 << dropped)
        digits += 2 * rest + digits % 2 > 1 << dropped
        sign = 1.0 if total > 0 else -1.0
        try:
            return sign * math.ldexp(digits, dropped - 2148)
        except OverflowError:
            return sign * math.inf

    return np.frompyfunc(one, 3, 1)(*(x.astype(float) for x in (a, b, c))).astype(float).astype(a.dtype)


def define_float(t: str) -> None:
    unary, binary = f"{t} -> {t}", f"{t} {t} -> {t}"
    for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        define(f"{name}.{t}", binary, function)
        define(f"{name}.rn.{t}", binary, function)
    define(f"div.rn.{t}", binary, np.divide)
    define(f"fma.rn.{t}", f"{t} {t} {t} -> {t}", fused)
    define(f"rcp.rn.{t}", unary, np.reciprocal)
    define(f"sqrt.rn.{t}", unary, np.sqrt)
    define(f"min.{t}", binary, smaller)
    define(f"max.{t}", binary, larger)
    define(f"neg.{t}", unary, np.negative)
    define(f"abs.{t}", unary, np.abs)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        define_comparison(name, t)
    define(f"setp.num.{t}", f"{t} {t} -> pred", lambda a, b: ~unordered(a, b))
    define(f"setp.nan.{t}", f"{t} {t} -> pred", unordered)


def define_comparison(name: str, t: str) -> None:
    compare = getattr(operator, name)
    define(f"setp.{name}.{t}", f"{t} {t} -> pred", lambda a, b: compare(a, b) & ~unordered(a, b))
    define(f"setp.{name}u.{t}", f"{t} {t} -> pred", lambda a, b: compare(a, b) | unordered(a, b))


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(x.dtype).smallest_normal, np.copysign(x.dtype.type(0), x), x)


def power_of_two(x: Array) -> Array:
    return flushed(np.exp2(flushed(x).astype(np.longdouble)).astype("f4"))


def upper_half(x: Array) -> Array:
    return (x.view("u8") >> 32 << 32).view("f8")


def coarse_reciprocal(x: Array) -> Array:  # its subnormal numbers are zeros, and its lower 32 bits are zeros, too
    return upper_half(flushed(np.reciprocal(upper_half(flushed(x)))))


def truncated(source: str, result: str) -> Callable[..., Array]:
    bits, is_signed = bits_of(result), result[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    of_nan = 0 if source == "f32" and bits == 32 else 1 << bits - 1

    def one(x: float) -> int:
        if math.isnan(x):
            return of_nan
        return min(max(int(x), low), high) if math.isfinite(x) else high if x > 0 else low

    return exact(one)


def to_bf16(x: Array) -> Array:
    """To eight binary digits, or to the digits of subnormal numbers."""
    digit = np.ldexp(1.0, np.maximum(np.frexp(x)[1], -125) - 8)
    nearest = (np.rint(x.astype(float) / digit) * digit).astype("f4")
    return (np.where(np.isfinite(x), nearest, x).view("u4") >> 16).astype("u2")


def two_of(half_bits: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Both operands in a word, the first one in its upper half; a NaN has all bits but the sign there."""

    def word(a: Array, b: Array) -> Array:
        upper, lower = (np.where(np.isnan(x), 0x7FFF, half_bits(x)).astype("u4") for x in (a, b))
        return upper << 16 | lower

    return word


def define_conversions() -> None:
    for to in ("u16", "s16", "u32", "s32", "u64", "s64"):
        for source in ("u16", "s16", "u32", "s32", "u64", "s64"):
            if bits_of(to) != bits_of(source):
                define(f"cvt.{to}.{source}", f"{source} -> {to}", exact(operator.pos))
    define("cvt.s64.s32 of b64", "b64 -> s64", exact(lambda a: (a + 2**31) % 2**32 - 2**31))
    for source in ("u16", "s16", "u32", "s32", "u64", "s64"):  # which all fit into a long double
        define(f"cvt.rn.f32.{source}", f"{source} -> f32", lambda a: a.astype(np.longdouble).astype("f4"))
        define(f"cvt.rn.f64.{source}", f"{source} -> f64", lambda a: a.astype(np.longdouble).astype("f8"))
    for to in ("u32", "s32", "u64", "s64"):
        define(f"cvt.rzi.{to}.f32", f"f32 -> {to}", truncated("f32", to))
        define(f"cvt.rzi.{to}.f64", f"f64 -> {to}", truncated("f64", to))
    define("cvt.f64.f32", "f32 -> f64", lambda a: a.astype("f8"))
    define("cvt.rn.f32.f64", "f64 -> f32", lambda a: a.astype("f4"))
    define("cvt.f32.f16", "f16 -> f32", lambda a: a.astype("f4"))
    define("cvt.rn.f16.f32", "f32 -> f16", lambda a: a.astype("f2"))
    define("cvt.f32.bf16", "bf16 -> f32", lambda a: (a.astype("u4") << 16).view("f4"))
    define("cvt.rn.bf16.f32", "f32 -> bf16", to_bf16)
    define("cvt.rn.f16x2.f32", "f32 f32 -> b32", two_of(lambda a: a.astype("f2").view("u2")))
    define("cvt.rn.bf16x2.f32", "f32 f32 -> b32", two_of(to_bf16))


def define_all() -> None:
    for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
        define_integer(t)
    for t in ("b16", "b32", "b64"):
        define_bits(t)
    for t in ("b16", "b32", "b64", "pred"):
        define_logic(t)
    for t in ("u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64", "f32", "f64", "pred"):
        define_moves(t)
    define("bfind.u32", "u32 -> u32", exact(lambda a: a.bit_length() - 1))
    define("bfind.shiftamt.u32", "u32 -> u32", exact(lambda a: 32 - a.bit_length() if a else -1))
    define("prmt.b32", "b32 b32 b32 -> b32", exact(permuted))
    define("shf.l.wrap.b32", "b32 b32 n32 -> b32", exact(lambda a, b, n: (b << 32 | a) << (n & 31) >> 32))
    define("shf.r.wrap.b32", "b32 b32 n32 -> b32", exact(lambda a, b, n: (b << 32 | a) >> (n & 31)))
    define("bfi.b32", "b32 b32 n32 n32 -> b32", exact(partial(inserted, bits=32)))
    define("bfi.b64", "b64 b64 n32 n32 -> b64", exact(partial(inserted, bits=64)))
    for t in ("f32", "f64"):
        define_float(t)
    define("ex2.approx.ftz.f32", "f32 -> f32", power_of_two)
    define("rcp.approx.ftz.f64", "f64 -> f64", coarse_reciprocal)
    define_conversions()
    define("cvta.to.global.u64", "u64 -> u64", lambda a: a)


define_all()

# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def assert_same(actual: Array, expected: Array, type: str, operands: Sequence[Array] = ()) -> None:
    """Bit by bit, except that one NaN is like another."""
    bits = f"u{expected.itemsize}"
    same = actual.view(bits) == expected.view(bits)
    if type[0] == "f":
        same |= np.isnan(actual) & np.isnan(expected)
    if type == "bf16":
        same |= (actual & 0x7FFF > 0x7F80) & (expected & 0x7FFF > 0x7F80)
    if not same.all():
        lane = int(np.argmin(same))
        of = ", ".join(repr(x[lane]) for x in operands)
        pytest.fail(f"lane {lane}, of {of}: {actual[lane]!r} instead of {expected[lane]!r}; {(~same).sum()} are wrong")


def run_opcode(opcode: str, operands: Sequence[Array], old: Array, on: Array) -> Array:
    """What the opcode gives in four ways: in all lanes; where `on`, on top of old; where not `on`; on top of its first
    operand, if that is a register of the same kind."""
    types, result, _ = TABLE[opcode]
    sources = [register(type, i + 1) for i, type in enumerate(types)]
    to = [register(result, i) for i in (11, 12, 13)]
    to += sources[:1] if register(types[0], 1) == register(result, 1) else []
    name = opcode.split()[0]
    inputs = [*operands, old, on]
    body = "".join(load(i, type, source) for i, (type, source) in enumerate(zip(types, sources, strict=True)))
    body += "".join(load(len(types), result, each) for each in to[:3]) + load(len(types) + 1, "pred", "%p20")
    for guard, each in zip(("", "@%p20 ", "@!%p20 ", ""), to, strict=False):
        body += f"\t{guard}{name} \t{each}, {', '.join(sources)};\n"
    out = np.empty((len(to), len(old)), old.dtype)
    body += "".join(store(len(inputs), result, each, i * out[0].nbytes) for i, each in enumerate(to))
    with_zeros = [np.ascontiguousarray(x) for x in inputs]
    ptx.run(kernel(body, len(inputs) + 1), with_zeros, [out], blocks=len(old) // THREADS, threads=THREADS)
    return out


@pytest.mark.parametrize("opcode", sorted(TABLE))
def test_arithmetic(opcode: str) -> None:
    """Protects an opcode's result from a wrong rounding, sign, width or special value; and the registers of lanes that
    a guard switches off."""
    operands = operands_of(opcode)
    count, result = len(operands[0]), TABLE[opcode].result
    rng = np.random.default_rng(0)
    old = np.resize(random_of(result, rng), count)
    on = rng.random(count) < 0.5
    on[:THREADS], on[THREADS : 2 * THREADS] = True, False
    expected = TABLE[opcode].expected(operands)
    with ptx.options(races=False):
        plain, guarded, negated, *in_place = run_opcode(opcode, operands, old, on)
    assert_same(plain, expected, result, operands)
    assert_same(guarded, np.where(on, expected, old), result, operands)
    assert_same(negated, np.where(on, old, expected), result, operands)
    for each in in_place:
        assert_same(each, expected, result, operands)


@pytest.mark.parametrize(("opcode", "unit"), [("ex2.approx.ftz.f32", 1), ("rcp.approx.ftz.f64", 1 << 32)])
def test_what_is_approximate_may_be_off(opcode: str, unit: int) -> None:
    """Protects the search for kernels that rely on more than the hardware promises: results are off by up to as many
    units as asked for, never by more, always the same for the same operand; and still flushed."""
    type = TABLE[opcode].result
    dtype, integer = dtype_of(type), f"i{bits_of(type) // 8}"
    usual = np.linspace(-126, 127.99, 10300) if type == "f32" else np.geomspace(1e-300, 1e300, 10300)
    near_flushing = -126 + 1e-5 * np.arange(103) if type == "f32" else 2.0**1022 * (1 - 2.0**-20 * np.arange(103))
    operands = np.concatenate([usual, near_flushing, np.resize(edges_of(type), THREADS)]).astype(dtype)
    same, off = np.zeros(len(operands), dtype), np.ones(len(operands), "?")
    exactly = TABLE[opcode].expected([operands])
    with ptx.options(races=False, ulps=2):
        first, second = (run_opcode(opcode, [operands], same, off)[0] for _ in range(2))
    assert_same(first, second, type)
    assert_same(flushed(first), first, type)
    units = (first.view(integer) - exactly.view(integer)) / unit
    assert set(units[: len(usual)]) == {-2, -1, 0, 1, 2}
    assert set(units[len(usual) : -THREADS]) >= {0, 1, 2}
    special = ~np.isfinite(exactly) | (exactly == 0)
    assert_same(first[special], exactly[special], type)


@pytest.mark.parametrize("type", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", ["div", "rem"])
def test_a_division_by_zero_is_an_error(name: str, type: str) -> None:
    """Protects from a result that no one has specified."""
    text = f"mov.b{bits_of(type)} {register(type, 1)}, 0;\n{name}.{type} {register(type, 2)}, 5, {register(type, 1)};"
    with pytest.raises(RuntimeError, match="an integer is divided by 0"):
        ptx.run(kernel(text), [])


def test_literals() -> None:
    """Protects constants in the text: decimal and hexadecimal, with a sign, of each width, and floats by their bits."""
    literals = [
        ("u16", "-1", 0xFFFF),
        ("u16", "255", 255),
        ("u32", "-2147483648", 1 << 31),
        ("u32", "0x7fc0", 0x7FC0),
        ("u64", "-9223372036854775808", 1 << 63),
        ("u64", "18446744073709551615", 2**64 - 1),
        ("u64", "-1", 2**64 - 1),
        ("f32", "0f3FB8AA3B", np.log2(np.e)),
        ("f64", "0dC000000000000001", -2 - 2**-51),
        ("pred", "-1", True),
        ("pred", "1", True),
        ("pred", "0", False),
    ]
    body, outs = "", []
    for i, (type, literal, _) in enumerate(literals):
        body += f"mov.{type} {register(type, 1)}, {literal};\n" + store(i, type, register(type, 1))
        outs.append(np.empty(THREADS, dtype_of(type)))
    ptx.run(kernel(body, len(outs)), [], outs, threads=THREADS)
    for out, (type, _, expected) in zip(outs, literals, strict=True):
        assert_same(out, np.full(THREADS, expected, dtype_of(type)), type)


# ----------------------------------------------------------------------------------------------------------------------
# Memory

ACCESSED = ("u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64")
LOADS = [f"ld.{space}.{type}" for space in ("global", "shared", "param") for type in ACCESSED] + ["ld.f32"]
STORES = [f"st.{space}.{type}" for space in ("global", "shared") for type in ACCESSED] + ["st.f32"]
ATOMICS = {
    "atom.global.add.u64": operator.add,
    "atom.shared.add.u32": operator.add,
    "atom.shared.or.b32": operator.or_,
}
FRESH = 0x7B7B7B7B
"""Four bytes that nothing has been stored to."""
PART = 16
"""The bytes that each thread has for itself."""
AREA = f".shared .align {PART} .b8 area[{PART * THREADS}];"


class Access(NamedTuple):
    """A way to use an opcode: so many entries, in registers of such a type, at such a byte of the thread's part."""

    statement: str  # without the operands
    entries: int
    registers: str
    at: int
    entry: np.dtype[Any]

    @property
    def end(self) -> int:
        return self.at + self.entries * self.entry.itemsize

    @property
    def register_bytes(self) -> int:
        return bits_of(self.registers) // 8

    @property
    def names(self) -> list[str]:
        return [register(self.registers, 1 + i) for i in range(self.entries)]

    @property
    def vector(self) -> str:
        return self.names[0] if self.entries == 1 else vector(self.names)


def accesses(opcode: str) -> list[Access]:
    """All ways that PTX allows: vectors, at both ends of a thread's part, and registers that are wider."""
    *front, type = opcode.split(".")
    size = dtype_of(type).itemsize
    registers = [type] if type[0] == "f" else [f"b{8 * width}" for width in (2, 4, 8) if width >= size]
    return [
        Access(".".join([*front, *([f"v{entries}"] if entries > 1 else []), type]), entries, each, at, dtype_of(type))
        for entries in (1, 2, 4)
        if entries * size <= PART
        for at in sorted({0, PART - entries * size})
        for each in registers
    ]


def space_of(opcode: str) -> str:
    return opcode.split(".")[1] if opcode.count(".") > 1 else "global"  # a generic address, of global memory


def middle(space: str, parameter: int) -> tuple[str, str]:
    """What sets a register to the middle of the thread's part, so that offsets have both signs; and that register. In
    shared memory it is the part of another thread."""
    if space == "global":
        return address(parameter, PART) + "add.s64 %rd97, %rd90, 8;\n", "%rd97"
    if space == "shared":
        return (
            f"""
	sub.s32 %r97, {THREADS - 1}, %r90;
	mad.lo.s32 %r97, %r97, {PART}, %r98;
	add.s32 %r97, %r97, 8;
""",
            "%r97",
        )
    return (
        f"""
	mov.b64 %rd97, test_param_{parameter};
	mul.wide.u32 %rd98, %r90, {PART};
	add.s64 %rd97, %rd97, %rd98;
	add.s64 %rd97, %rd97, 8;
""",
        "%rd97",
    )


FILL_SHARED = f"""
	mov.u32 %r98, area;
	mad.lo.s32 %r96, %r90, {PART}, %r98;
	st.shared.v2.b64 [%r96], {{%rd1, %rd2}};
	bar.sync 0;
"""


def some_bytes(*shape: int) -> Array:
    values = np.random.default_rng(0).integers(0, 256, shape, "u1")
    values[:4] = np.array([0, 0x7F, 0x80, 0xFF])[:, None]
    return values


def run_with_bytes(text: str, parameter: bytes, out: Array) -> None:
    """ptx.run for a kernel whose first parameter is no pointer."""
    library = ptx.load()
    ptx.check(library.ptx_load(text.encode()))
    library.ptx_note_fresh(out.ctypes.data, out.nbytes)
    try:
        ptx.check(library.ptx_run(b"test", 1, THREADS, 0, parameter + struct.pack("Q", out.ctypes.data)))
    finally:
        library.ptx_note_release(out.ctypes.data)


@pytest.mark.parametrize("opcode", LOADS)
def test_loads(opcode: str) -> None:
    """Protects what is loaded: which bytes, at which offset, in the vector's order, and extended by its sign or by
    zeros to the width of the register."""
    space, ways = space_of(opcode), accesses(opcode)
    data, out = some_bytes(THREADS, PART), np.empty((len(ways), THREADS, 32), "u1")
    fill = address(0, PART) + "ld.global.v2.b64 {%rd1, %rd2}, [%rd90];\n" + FILL_SHARED
    set_base, base = middle(space, 0)
    body = (fill if space == "shared" else "") + set_base
    for i, way in enumerate(ways):
        body += f"{way.statement} {way.vector}, [{base}+{way.at - 8}];\n" + address(1, 32)
        for j, name in enumerate(way.names):
            width = way.register_bytes
            body += f"st.global.b{8 * width} [%rd90+{i * out[0].nbytes + j * width}], {name};\n"
    if space == "param":
        text = kernel(body, 2, first=f".align 16 .b8 test_param_0[{data.nbytes}]")
        run_with_bytes(text, data.tobytes() + bytes(-data.nbytes % 8), out)
    else:
        ptx.run(kernel(body, 2, AREA), [data], [out], threads=THREADS)
    for way, found in zip(ways, out, strict=True):
        parts = data[::-1] if space == "shared" else data
        entries = np.ascontiguousarray(parts[:, way.at : way.end]).view(way.entry)
        extended = entries.astype(f"{way.entry.kind}{way.register_bytes}")
        assert (found[:, : way.entries * way.register_bytes] == extended.view("u1")).all(), way


@pytest.mark.parametrize("opcode", STORES)
def test_stores(opcode: str) -> None:
    """Protects what is stored: the lower bytes of each register, in the vector's order, where they belong; and the
    bytes beside them."""
    space = space_of(opcode)
    set_base, base = middle(space, 1)
    for way in accesses(opcode):
        width = way.register_bytes
        values, out = some_bytes(THREADS, way.entries * width), np.empty((THREADS, PART), "u1")
        body = f"mov.b64 %rd1, {FRESH << 32 | FRESH};\nmov.b64 %rd2, %rd1;\n"
        body += (FILL_SHARED if space == "shared" else "") + set_base + address(0, way.entries * width)
        body += "".join(f"ld.global.b{8 * width} {name}, [%rd90+{j * width}];\n" for j, name in enumerate(way.names))
        body += f"{way.statement} [{base}+{way.at - 8}], {way.vector};\n"
        if space == "shared":
            body += "bar.sync 0;\nld.shared.v2.b64 {%rd1, %rd2}, [%r96];\n"
            body += address(1, PART) + "st.global.v2.b64 [%rd90], {%rd1, %rd2};\n"
        ptx.run(kernel(body, 2, AREA), [values], [out], threads=THREADS)
        expected = np.full((THREADS, PART // 4), FRESH, "u4").view("u1")
        lower = values.reshape(THREADS, way.entries, width)[:, :, : way.entry.itemsize]
        expected[:, way.at : way.end] = lower.reshape(THREADS, -1)
        assert (out == (expected[::-1] if space == "shared" else expected)).all(), way


@pytest.mark.parametrize("addresses", [1, 5, THREADS])
@pytest.mark.parametrize("opcode", sorted(ATOMICS))
def test_atomics(opcode: str, addresses: int) -> None:
    """Protects what many threads make of one address, and what each found there before: they come one after the other,
    and each finds what the one before it left."""
    _, space, _, type = opcode.split(".")
    blocks, dtype, mask = 3 if space == "global" else 1, dtype_of(type), (1 << bits_of(type)) - 1
    rng = np.random.default_rng(0)
    data = rng.integers(0, mask, THREADS, dtype, endpoint=True) & rng.integers(0, mask, THREADS, dtype)
    values = rng.integers(0, mask, blocks * THREADS, dtype, endpoint=True)
    if ATOMICS[opcode] is operator.or_:  # few bits each, of which many are new
        values &= values >> 3 & values >> 7
    before, found = data.tolist(), np.empty_like(values)
    value, old = register(type, 1), register(type, 2)
    body = f"rem.u32 %r89, %r90, {addresses};\n" + load(1, type, value)
    if space == "global":
        body += address(0, dtype.itemsize, of="%r89") + f"{opcode} {old}, [%rd90], {value};\n"
    else:
        body += (
            load(0, type, "%r3")
            + f"""
	mov.u32 %r98, area;
	mad.lo.s32 %r88, %r90, 4, %r98;
	mad.lo.s32 %r89, %r89, 4, %r98;
	st.shared.u32 [%r88], %r3;
	bar.sync 0;
	{opcode} {old}, [%r89], {value};
	bar.sync 0;
	ld.shared.u32 %r3, [%r88];
"""
            + store(0, type, "%r3")
        )
    ptx.run(kernel(body + store(2, type, old), 3, AREA), [data, values], [found], blocks, THREADS)
    for i in range(addresses):
        steps = list(zip(found.tolist(), values.tolist(), strict=True))[i::addresses]
        left = [ATOMICS[opcode](old, value) & mask for old, value in steps]
        assert Counter([before[i], *left]) == Counter([data[i].item(), *(old for old, _ in steps)])


def test_lanes_that_are_off_touch_no_memory() -> None:
    """Protects guarded accesses, most of whose guards are there because the address would be wrong."""
    on, old, far = np.arange(THREADS) % 3 == 0, 77, "add.s64 %rd90, %rd90, %rd5;\n"
    values, counts = np.arange(THREADS, dtype="u4"), np.full(THREADS, 5, "u8")
    found, out = np.empty((4, THREADS), "u4"), np.empty(THREADS, "u4")
    body = "".join(f"mov.u32 %r{i}, {old};\n" for i in (1, 2, 3, 4)) + f"mov.u64 %rd2, {old};\n"
    body += (
        load(2, "pred", "%p1")
        + f"""
	selp.b64 %rd5, 0, {1 << 40}, %p1;
	selp.b32 %r5, 0, {1 << 30}, %p1;
	mov.u32 %r98, area;
	mad.lo.s32 %r97, %r90, {PART}, %r98;
	add.s32 %r97, %r97, %r5;
"""
    )
    body += address(0, 4) + far + "@%p1 ld.global.u32 %r1, [%rd90];\n"
    body += address(1, 8) + far + "@%p1 atom.global.add.u64 %rd2, [%rd90], 2;\ncvt.u32.u64 %r5, %rd2;\n"
    body += """
	@%p1 st.shared.v2.u32 [%r97], {%r1, %r1};
	@%p1 atom.shared.add.u32 %r2, [%r97], 1;
	bar.sync 0;
	@%p1 ld.shared.v2.u32 {%r3, %r4}, [%r97];
"""
    body += address(4, 4) + far + "@%p1 st.global.u32 [%rd90], %r3;\n"
    body += "".join(store(3, "u32", f"%r{i}", k * found[0].nbytes) for k, i in enumerate((1, 2, 4, 5)))
    ptx.run(kernel(body, 5, AREA), [values, counts, on], [found, out], threads=THREADS)
    assert (found == np.where(on, [values, values, values, np.full(THREADS, 5)], old)).all()
    assert (out == np.where(on, values + 1, FRESH)).all()
    assert (counts == np.where(on, 7, 5)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Where lanes go, and what moves between them


def test_special_registers() -> None:
    """Protects the numbers by which threads find their data, in full and partial warps and in every block."""
    blocks, names = 5, ["%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid"]
    out = np.empty((5, blocks, THREADS), "u4")
    body = "".join(
        f"mov.u32 %r1, {name};\n" + store(0, "u32", "%r1", i * out[0].nbytes) for i, name in enumerate(names)
    )
    ptx.run(kernel(body, 1), [], [out], blocks, THREADS)
    block, thread = np.indices((blocks, THREADS))
    constant = np.ones_like(block)
    assert (out == [thread, block, THREADS * constant, blocks * constant, thread % 32]).all()


@pytest.mark.parametrize("branch", ["bra", "bra.uni"])
def test_branches(branch: str) -> None:
    """Protects the way of each lane through if and else, which lanes take apart; and that they meet again behind it,
    where a shuffle asks for all of them."""
    choice, out = np.random.default_rng(0).integers(0, 3, 96).astype("u4"), np.empty(96, "u4")
    body = (
        load(0, "u32", "%r1")
        + f"""
	setp.eq.s32 %p1, %r1, 0;
	setp.eq.s32 %p2, %r1, 1;
	@%p1 bra $L__BB0_3;
	@!%p2 bra $L__BB0_2;
	mov.u32 %r2, 10;
	{branch} $L__BB0_4;
$L__BB0_2:
	mov.u32 %r2, 20;
	{branch} $L__BB0_4;
$L__BB0_3:
	mov.u32 %r2, 30;
$L__BB0_4:
	shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
"""
    )
    ptx.run(kernel(body + store(1, "u32", "%r3"), 2), [choice], [out], threads=96)
    assert (out == np.array([30, 10, 20])[choice].reshape(-1, 2)[:, ::-1].ravel()).all()


def test_loops() -> None:
    """Protects loops within loops that every lane leaves at another time, some by the end of the kernel."""
    trips, out = np.random.default_rng(0).integers(0, 9, 4 * THREADS).astype("u4"), np.empty(4 * THREADS, "u4")
    body = (
        load(0, "u32", "%r1")
        + """
	mov.u32 %r2, 0;
	and.b32 %r3, %r90, 3;
$L__BB0_1:
	setp.ge.u32 %p1, %r2, %r1;
	@%p1 bra $L__BB0_4;
	mov.u32 %r4, %r2;
$L__BB0_2:
	setp.eq.s32 %p2, %r4, 0;
	@%p2 bra $L__BB0_3;
	mad.lo.s32 %r3, %r3, 3, %r4;
	add.s32 %r4, %r4, -1;
	setp.eq.s32 %p3, %r3, 155;
	@%p3 ret;
	bra.uni $L__BB0_2;
$L__BB0_3:
	add.s32 %r2, %r2, 1;
	bra.uni $L__BB0_1;
$L__BB0_4:
"""
    )
    ptx.run(kernel(body + store(1, "u32", "%r3"), 2), [trips], [out], blocks=4, threads=THREADS)

    def of(thread: int, trips: int) -> int:
        total = thread % 4
        for i in range(trips):
            for j in range(i, 0, -1):
                total = total * 3 + j
                if total == 155:
                    return FRESH  # nothing is stored
        return total & 0xFFFFFFFF

    expected = [of(i, n) for i, n in enumerate(trips.tolist())]
    assert 0 < expected.count(FRESH) < len(expected)
    assert out.tolist() == expected


def shuffled(mode: str, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """As the PTX ISA defines it, of (warps, 32) lanes: the values, and whether they are another lane's."""
    lane, b, segment, clamp = np.arange(32), b & 31, c >> 8 & 31, c & 31
    lowest = lane & segment
    bound = lowest | clamp & ~segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | b & ~segment}[mode]
    moves = source >= bound if mode == "up" else source <= bound
    return np.take_along_axis(a, np.where(moves, source, lane), 1), moves


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    """Protects sums and scans over a warp: which lane each lane reads, by any distance, in segments of any width, and
    the predicate that tells whether it did."""
    rng = np.random.default_rng(0)
    usual = [(32 - width << 8) | (0 if mode == "up" else 31) for width in (32, 16, 8, 4, 2, 1)]
    b, c = (x.ravel() for x in np.meshgrid([*range(33), 63], [*usual, 5, 0x0C03, 0x151F]))
    b, c = (np.repeat(x[:, None], 32, 1) for x in (b, c))
    b = np.concatenate([b, rng.integers(0, 64, (64, 32))]).astype("i4")  # also another one for each lane
    c = np.concatenate([c, rng.integers(0, 1 << 13, (64, 32))]).astype("i4")
    a = rng.integers(0, 2**31, b.shape, "i4")
    out, moves, alone = np.empty_like(a), np.empty(a.shape, "?"), np.empty_like(a)
    body = load(0, "b32", "%r1") + load(1, "b32", "%r2") + load(2, "b32", "%r3")
    body += f"shfl.sync.{mode}.b32 %r4|%p1, %r1, %r2, %r3, -1;\nshfl.sync.{mode}.b32 %r1, %r1, %r2, %r3, -1;\n"
    body += store(3, "b32", "%r4") + store(4, "pred", "%p1") + store(5, "b32", "%r1")
    ptx.run(kernel(body, 6), [a, b, c], [out, moves, alone], blocks=len(a) // 2, threads=64)
    expected, does_move = shuffled(mode, a, b, c)
    assert (out == expected).all()
    assert (moves == does_move).all()
    assert (alone == expected).all()


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_of_half_a_warp(mode: str) -> None:
    """Protects shuffles on both sides of a branch, each of the lanes that its mask names; the others keep theirs."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**31, (8, 32), "i4"), rng.integers(0, 16, (8, 32), "i4")
    out = np.empty_like(a)
    c = 0x1000 if mode == "up" else 0x101F
    body = (
        load(0, "b32", "%r1")
        + load(1, "b32", "%r2")
        + f"""
	mov.u32 %r5, %laneid;
	setp.gt.u32 %p1, %r5, 15;
	mov.u32 %r3, %r1;
	mov.u32 %r4, %r1;
	@%p1 bra $L__BB0_1;
	shfl.sync.{mode}.b32 %r3, %r1, %r2, {c}, 65535;
	bra.uni $L__BB0_2;
$L__BB0_1:
	shfl.sync.{mode}.b32 %r4, %r1, %r2, {c}, -65536;
$L__BB0_2:
	xor.b32 %r3, %r3, %r4;
"""
    )
    ptx.run(kernel(body + store(2, "b32", "%r3"), 3), [a, b], [out], blocks=4, threads=64)
    expected, _ = shuffled(mode, a, b, np.full_like(a, c))
    assert (out == expected ^ a).all()


def test_shuffles_of_others_are_refused() -> None:
    """Protects from a shuffle whose mask leaves out the lane itself, or the one that it reads: what it gives is
    undefined, even where the others happen to be there."""
    with pytest.raises(RuntimeError, match="lane 1 shuffles, and its mask does not name it"):
        ptx.run(kernel("shfl.sync.idx.b32 %r1, %r90, 0, 31, 1;"), [])
    halves = "setp.gt.u32 %p1, %r90, 15;\nselp.b32 %r2, -65536, 65535, %p1;\n"
    with pytest.raises(RuntimeError, match="a shuffle reads lane 16, which takes no part in it"):
        ptx.run(kernel(halves + "shfl.sync.bfly.b32 %r1, %r90, 16, 31, %r2;"), [])
    ptx.run(kernel(halves + "shfl.sync.bfly.b32 %r1, %r90, 15, 31, %r2;"), [])


VOTES = {
    "ballot.b32": lambda yes, lanes: yes,
    "any.pred": lambda yes, lanes: yes != 0,
    "all.pred": lambda yes, lanes: yes == lanes,
}
"""What each lane gets, by the bits of the lanes that vote yes, and of all that vote."""


@pytest.mark.parametrize("mode", VOTES)
def test_votes(mode: str) -> None:
    """Protects what a warp decides together, all of it and each side of a branch for itself."""
    rng = np.random.default_rng(0)
    yes = rng.random((64, 32)) < rng.choice([0, 0.1, 0.9, 1], (64, 1))
    type_, name = ("b32", "%r{}") if mode == "ballot.b32" else ("pred", "%p{}")
    one, two = name.format(2), name.format(3)
    outs = [np.empty(yes.shape, "u4" if type_ == "b32" else "?") for _ in range(2)]
    body = (
        load(0, "pred", "%p1")
        + f"""
	vote.sync.{mode} {one}, %p1, -1;
	mov.u32 %r5, %laneid;
	setp.gt.u32 %p4, %r5, 9;
	@%p4 bra $L__BB0_1;
	vote.sync.{mode} {two}, %p1, 1023;
	bra.uni $L__BB0_2;
$L__BB0_1:
	vote.sync.{mode} {two}, %p1, -1024;
$L__BB0_2:
"""
    )
    ptx.run(kernel(body + store(1, type_, one) + store(2, type_, two), 3), [yes], outs, blocks=32, threads=64)
    bits = (yes << np.arange(32, dtype="u8")).sum(1, dtype="u8")[:, None].astype("u4")
    assert (outs[0] == VOTES[mode](bits, np.uint32(0xFFFFFFFF))).all()
    assert (outs[1][:, :10] == VOTES[mode](bits & 1023, np.uint32(1023))).all()
    assert (outs[1][:, 10:] == VOTES[mode](bits & ~np.uint32(1023), ~np.uint32(1023))).all()


def test_votes_of_others_are_refused() -> None:
    """Protects from a vote whose mask leaves out the lane itself, or names one that does not come."""
    with pytest.raises(RuntimeError, match="lane 1 votes, and its mask does not name it"):
        ptx.run(kernel("setp.gt.u32 %p1, %r90, 15;\nvote.sync.any.pred %p2, %p1, 1;"), [])
    with pytest.raises(RuntimeError, match="waits for lanes that do not come"):
        ptx.run(kernel("setp.gt.u32 %p1, %r90, 15;\n@%p1 ret;\nvote.sync.any.pred %p2, %p1, -1;"), [])


@pytest.mark.parametrize("order", ptx.ORDERS)
def test_barriers(order: str) -> None:
    """Protects data that warps hand to each other through shared memory, again and again."""
    data, out = np.arange(3 * THREADS, dtype="u4") ** 2, np.empty(3 * THREADS, "u4")
    body = (
        load(0, "u32", "%r1")
        + f"""
	mov.u32 %r98, area;
	mad.lo.s32 %r97, %r93, 4, %r98;
	sub.s32 %r96, {THREADS - 1}, %r93;
	mad.lo.s32 %r96, %r96, 4, %r98;
	mov.u32 %r2, 0;
$L__BB0_1:
	st.shared.u32 [%r97], %r1;
	bar.sync 0;
	ld.shared.u32 %r3, [%r96];
	mad.lo.s32 %r1, %r3, 3, %r1;
	bar.sync 0;
	add.s32 %r2, %r2, 1;
	setp.lt.s32 %p1, %r2, 4;
	@%p1 bra $L__BB0_1;
"""
    )
    with ptx.options(order=order):
        ptx.run(kernel(body + store(1, "u32", "%r1"), 2, AREA), [data], [out], blocks=3, threads=THREADS)
    expected = data.reshape(3, THREADS)
    for _ in range(4):
        expected = expected + 3 * expected[:, ::-1]
    assert (out == expected.ravel()).all()


@pytest.mark.parametrize(("whole", "part"), [("b32", "b16"), ("b64", "b32"), ("b64", "b16")])
def test_moves_of_vectors(whole: str, part: str) -> None:
    """Protects registers that are taken apart and put together: the first entry is the lowest, and one may be left out;
    under a guard, too."""
    count = bits_of(whole) // bits_of(part)
    data = random_of(whole, np.random.default_rng(0))[:THREADS]
    on, outs = np.arange(THREADS) % 3 == 0, [np.empty(THREADS, data.dtype) for _ in range(3)]
    names = [register(part, 1 + i) for i in range(count)]
    one, two, three = (register(whole, 50 + i) for i in range(3))
    body = (
        load(0, whole, one)
        + load(1, "pred", "%p1")
        + f"""
	mov.{whole} {vector(names)}, {one};
	mov.{whole} {two}, {vector(names[::-1])};
	mov.{whole} {three}, {two};
	@%p1 mov.{whole} {three}, {vector(names)};
	mov.{part} {names[0]}, 5;
	mov.{part} {names[-1]}, 6;
	@!%p1 mov.{whole} {vector(["_", *names[1:]])}, {one};
	mov.{whole} {one}, {vector(names)};
"""
    )
    body += store(2, whole, two) + store(3, whole, three) + store(4, whole, one)
    ptx.run(kernel(body, 5), [data, on], outs, threads=THREADS)
    parts, *found = (x.view(dtype_of(part)).reshape(THREADS, count) for x in (data, *outs))
    assert (found[0] == parts[:, ::-1]).all()
    assert (found[1] == np.where(on[:, None], parts, parts[:, ::-1])).all()
    last = parts.copy()
    last[:, 0], last[on, -1] = 5, 6
    assert (found[2] == last).all()


@pytest.mark.parametrize(("vector", "shift"), [("{tmp, %rs1}", 16), ("{%rs1, tmp}", 0)])
def test_half_of_a_register_is_dropped(vector: str, shift: int) -> None:
    """Protects a statement in a scope of its own, as nvcc writes it for newer GPUs, from being passed over."""
    data = random_of("b32", np.random.default_rng(0))[:THREADS]
    out = np.empty(THREADS, data.dtype)
    body = load(0, "b32", "%r1") + "{ .reg .b16 tmp; mov.b32 " + vector + ", %r1; }\ncvt.u32.u16 %r2, %rs1;\n"
    ptx.run(kernel(body + store(1, "b32", "%r2"), 2), [data], [out], threads=THREADS)
    assert (out == (data >> shift & 0xFFFF)).all()


# ----------------------------------------------------------------------------------------------------------------------
# All of them, and no others


def test_every_opcode_is_tested() -> None:
    """Protects this file from an opcode that is added without a line here."""
    arithmetic, memory = json.loads(ptx.load().ptx_opcodes())
    assert set(arithmetic) == set(TABLE)
    assert set(memory) == {*LOADS, *STORES, *ATOMICS}


def test_every_kernel_can_be_decoded() -> None:
    """Protects the backend from an opcode in nvcc's PTX that no test happens to reach."""
    ptx.check(ptx.load().ptx_decode_all())


REFUSED = {
    "add.q32 %r1, %r2, %r3;": "no instruction like add.q32 %r1, %r2, %r3",
    "add.s32 %r1, %r2;": "no instruction like add.s32 %r1, %r2",
    "ld.global.u128 %rd1, [%rd2];": "no instruction like ld.global.u128",
    "ld.global.v8.f32 {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8}, [%rd2];": "no instruction like ld.global.v8.f32",
    "ld.global.v4.f64 {%fd1, %fd2, %fd3, %fd4}, [%rd2];": "no instruction like ld.global.v4.f64",
    "ld.global.v4.f32 {%f1, %f2}, [%rd2];": "no instruction like ld.global.v4.f32",
    "{ .reg .b16 tmp; add.s32 %r1, %r2, %r3; }": "a scope like { .reg .b16 tmp; add.s32",
    ".reg .b32 %r1; add.s32 %r1, %r2, %r3;": "more than a declaration in .reg .b32 %r1;",
    "vote.sync.uni.pred %p1, %p2, -1;": "no instruction like vote.sync.uni.pred",
    "shfl.sync.any.b32 %r1, %r2, 1, 31, -1;": "no instruction like shfl.sync.any.b32",
    "mov.b64 {%r1, %r2, %r3}, %rd1;": "no instruction like mov.b64",
    "bar.sync 1;": "no barrier like bar.sync 1",
    "add.s32 %rd1, %r2, %r3;": "%rd1 is no register of that size: add.s32",
    "cvt.u64.u32 %rd1, %rs1;": "%rs1 is no register of that size: cvt.u64.u32",
    "ld.global.u32 %rs1, [%rd1];": "%rs1 is no register of that size: ld.global.u32",
    "ld.global.f32 %fd1, [%rd1];": "%fd1 is no register of that size: ld.global.f32",
    "st.global.u64 [%rd1], %r1;": "%r1 is no register of that size: st.global.u64",
    "st.global.v2.u32 [%rd1], {%r1, %rd2};": "%r1 is no register of that size: st.global.v2.u32",
    "ld.global.u32 %r1, [%r2];": "%r2 is no register of that size: ld.global.u32",
    "atom.global.add.u64 %r1, [%rd1], %rd2;": "%r1 is no register of that size: atom.global.add.u64",
    "shfl.sync.up.b32 %r1, %rd2, 1, 0, -1;": "%rd2 is no register of that size: shfl.sync.up.b32",
    "mov.b64 {%rs1, %rs2}, %rd1;": "%rs1 is no register of that size: mov.b64",
    "@%r1 mov.u32 %r2, 0;": "%r1 is no register of that size: @%r1 mov.u32",
    "add.s32 %r1, %x2, %r3;": "there is no register %x2",
    "mov.u32 %r1, nowhere;": "there is no symbol nowhere",
    "@%p1 bra $L__BB0_9;": "there is no label $L__BB0_9",
    "mov.f64 %fd1, 0f3F800000;": "a literal of another size: 0f3F800000",
    ".local .align 4 .b8 depot[8];": "the directive .local .align 4 .b8 depot[8]; is unknown here",
}


@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_unknown_is_refused(statement: str) -> None:
    """Protects from a guess at what a statement means: nothing runs, and the error names the statement; the second
    time, too."""
    with pytest.raises(RuntimeError, match=re.escape(REFUSED[statement])):
        ptx.run(kernel(statement), [])
    with pytest.raises(RuntimeError, match=re.escape(REFUSED[statement])):
        ptx.check(ptx.load().ptx_run(b"test", 1, 32, 0, b""))
    ptx.run(kernel(""), [])  # the kernel of this name is one that can be decoded again
