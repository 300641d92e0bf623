"""A hostile fuzz of the CPU ops under AddressSanitizer and UndefinedBehaviorSanitizer; test_hostile.py runs it.

``python harness/hostile.py --calls 3000 --seed 0`` compiles the ops (a minute; kept in torch's folder of extensions)
and makes so many calls of ``torch.ops.bcmf``. Labels, ``selected``, ``stats`` and ``summary`` hold anything, and may
change between forward and backward or while the op runs. An error is a right answer. A report is: what a sanitizer
says, which ends the program, a call that takes seconds though its tensors are tiny, an exception of another kind, or an
input that has changed. Each call is written to stderr before it is made, after what makes it again:
``--seed S --only K``.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import fcntl
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "BCMF_HOSTILE_LIBRARY"  # in the environment of the process that fuzzes: the compiled ops

# ---------------------------------------------------------------------------------------------------------------------
# The sanitized build

# -g1 names functions and lines, and compiles in half the time of -g. vptr is left out: it asks for the type information
# of torch's classes, which torch does not export. float-cast-overflow, which is no part of `undefined`, is in: a float
# that became an index would be one of the faults looked for.
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all"
COMPILE = "-std=c++20 -O1 -g1 -fno-omit-frame-pointer -fPIC -Wno-unknown-pragmas -Wno-psabi -Wno-attributes"

# Beside the ops: the choice of the one instruction set that is compiled (it stands in for csrc/cpu/isa.cpp), faults to
# be found, and the thread that refills memory. It is a thread of C++, so that it runs whoever holds Python's lock.
SUPPORT = r"""
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/isa.h"

const bcmf::cpu::Isa& bcmf::cpu::isa() { return SET::isa; }

namespace {

constexpr int kContents = 3;
struct Target {
  char* memory;
  const char* contents[kContents];
  int64_t bytes;
};
std::vector<Target> targets;
std::thread racer;
std::atomic<bool> stop;
std::atomic<int64_t> refills;

// Parts of a buffer at a time: between two readings of an entry there is little time.
void race() {
  uint64_t bits = 88172645463325252u;
  while (!stop) {
    for (const Target& target : targets) {
      bits ^= bits << 13, bits ^= bits >> 7, bits ^= bits << 17;
      const int64_t from = static_cast<int64_t>(bits % target.bytes), left = target.bytes - from;
      std::memcpy(target.memory + from, target.contents[(bits >> 40) % kContents] + from, left < 256 ? left : 256);
    }
    ++refills;
  }
}

}  // namespace

extern "C" {
void race_begin(int64_t count, char* const* memory, const char* const* contents, const int64_t* bytes) {
  targets.clear();
  for (int64_t i = 0; i < count; ++i)
    targets.push_back({memory[i], {contents[3 * i], contents[3 * i + 1], contents[3 * i + 2]}, bytes[i]});
  stop = false, refills = 0;
  racer = std::thread(race);
  while (refills == 0) std::this_thread::yield();
}
int64_t race_refills() { return refills; }
void race_end() {
  stop = true;
  racer.join();
}

int planted_read(const unsigned char* memory, int64_t at) { return memory[at]; }
void planted_write(unsigned char* memory, int64_t at) { memory[at] = 1; }
int planted_sum(int a, int b) { return a + b; }
int planted_index(double x) { return static_cast<int>(x); }
}
"""

ASAN = {
    "detect_leaks": 0,  # the interpreter keeps much
    "allocator_may_return_null": 1,  # torch makes it an error; but `new` of too much is a report
    "max_allocation_size_mb": 4096,
    "hard_rss_limit_mb": 6144,
    "redzone": 256,  # several vectors on either side of a tensor
    "quarantine_size_mb": 64,
}


def instruction_set() -> str:
    """The widest that this processor has and the kernels are compiled for: the installed extension chooses it, too."""
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def _find_library(name: str) -> Path:
    """Of the compiler; if it has none, it says the name alone."""
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return Path(done.stdout.strip())


def environment(library: Path) -> dict[str, str]:
    """Of a process that may load the sanitized ops. AddressSanitizer's malloc comes before all others there, so that
    torch's tensors lie between red zones, too. It looks for the function that throws when it starts, and Python has
    none: hence libstdc++."""
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(str(_find_library(name)) for name in ("libasan.so", "libstdc++.so")),
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in ASAN.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",  # a waiting thread would take a core from the racing one
        LIBRARY: str(library),
    }


def why_not() -> str | None:
    """Why the ops cannot be compiled and loaded with sanitizers here; None if they can."""
    if sys.platform != "linux":
        return "AddressSanitizer is preloaded on Linux only"
    if not (ROOT / "csrc").is_dir():
        return "csrc is not there"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found"
    if not _find_library("libasan.so").is_absolute():
        return "g++ has no libasan.so"
    done = subprocess.run([sys.executable, "-c", ""], env=environment(Path()), capture_output=True, text=True)
    return f"libasan.so cannot be preloaded ({done.stderr.strip()[:200]})" if done.returncode else None


def _sources(folder: Path) -> list[Path]:
    """One of the instruction sets is compiled: they are the same code in other widths, and take longest."""
    support, isa = folder / "support.cpp", instruction_set()
    text = SUPPORT.replace("SET", isa)
    if not support.exists() or support.read_text() != text:
        support.write_text(text)
    csrc = ROOT / "csrc"
    others = [path for path in sorted(csrc.glob("cpu/**/*.cpp")) if not path.name.startswith("isa")]
    return [csrc / "loss_tensors.cpp", csrc / f"cpu/isa_{isa}.cpp", support, *others]


def _ninja_file(folder: Path) -> str:
    def quote(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    flags = " ".join([COMPILE, f"-I'{ROOT}/csrc'", *(f"-isystem '{path}'" for path in includes)])
    folders = [f"-L'{path}' -Wl,-rpath,'{path}'" for path in cpp_extension.library_paths()]
    libraries = " ".join([*folders, "-lc10", "-ltorch_cpu", "-ltorch"])
    sources = _sources(folder)
    objects = [f"{source.stem}.o" for source in sources]
    return "\n".join(
        [
            f"rule compile\n  command = g++ {SANITIZE} {flags} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = g++ {SANITIZE} -shared $in -o $out {libraries}",
            *(f"build {name}: compile {quote(source)}" for name, source in zip(objects, sources, strict=True)),
            f"build hostile.so: link {' '.join(objects)}\n",
        ]
    )


def build() -> Path:
    """The library; what is up to date is not compiled again. Another process that wants it waits."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / "bcmf_hostile"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(_ninja_file(folder))
        done = subprocess.run(["ninja", "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return folder / "hostile.so"


# ---------------------------------------------------------------------------------------------------------------------
# What calls are made of

SUMMARY, SUMS = 12, 22  # entries
PACKAGE = "bcmf_schemas"  # the name under which `load` has what of bcmf_ext the schemas need
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)
MAP_LABELS = (torch.uint8, torch.int32)  # of the metrics
OTHERS = (torch.bool, torch.int8, torch.int64, torch.float32, torch.float64, torch.complex64, torch.uint16)
EDGES = (-(2**63), -(2**31), -32768, -100, -2, -1, 0, 1, 127, 128, 254, 255, 256, 32767, 32768, 65534, 65535, 65536)
EDGES += (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1)
IGNORED = (255, 255, -1, -100, 0, 1, 65535, 2**31, 2**62, -(2**63))
ODD = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-320, 1e38, 1e308, -1e308)
WRONG_SIZES = (-(2**63), -(2**31), -1, 0, 2**30, 2**31, 2**40, 2**62, 2**63 - 1)
KINDS = ("usual", "edges", "bits", "mixed")  # of contents
# What takes turns while an op runs. Labels of the second are right at any time, so that an op does not give up early.
TURNS = (("usual", "edges", "bits"), ("usual", "usual", "ignored"))
Fill = Callable[[int, str], Tensor]  # how many entries, and which kind


class Memory(NamedTuple):
    """A heap block that is as large as what its tensor reaches, between red zones therefore; and other contents."""

    block: Tensor
    fill: Fill
    written: bool  # by the op


class Draw:
    """What is random in a call: from the seed and the call's number alone."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.memory: list[Memory] = []

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def between(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def side(self) -> int:
        if self.chance(0.03):
            return 0
        return self.between(1, self.pick(2, 9, 20, 20, 40))

    def size(self) -> tuple[int, int]:
        """Mostly small; or longer than the kernels' tiles and blocks along one axis."""
        if not self.chance(0.06):
            return self.side(), self.side()
        long, short = self.pick(127, 128, 129, 257, 1023, 1024, 1025, 2049), self.between(1, 3)
        return self.pick((long, short), (short, long))

    # Contents

    def bits(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=self.generator).view(dtype)

    def chosen(self, values: Tensor, count: int) -> Tensor:
        return values[torch.randint(0, len(values), (count,), generator=self.generator)]

    def mixed(self, usual: Tensor, odd: Tensor) -> Tensor:
        share = self.pick(0.01, 0.1, 0.5)
        return torch.where(torch.rand(usual.shape, generator=self.generator) < share, odd, usual)

    def floats(self, dtype: torch.dtype) -> Fill:
        def fill(count: int, kind: str) -> Tensor:
            if kind == "bits":
                return self.bits(count, dtype)
            if kind == "edges":
                return self.chosen(torch.tensor(ODD, dtype=torch.float64).to(dtype), count)
            scale = self.pick(0.0, 0.1, 3.0, 50.0, 1e4)
            usual = (scale * torch.randn(count, generator=self.generator)).to(dtype)
            return self.mixed(usual, fill(count, self.pick("edges", "bits"))) if kind == "mixed" else usual

        return fill

    def ids(self, dtype: torch.dtype, classes: int, ignore_index: int) -> Fill:
        """Usual ones are classes, and some that are ignored."""
        info = torch.iinfo(dtype)

        def fill(count: int, kind: str) -> Tensor:
            if kind == "bits":
                return self.bits(count, dtype)
            if kind == "edges":
                edges = (*EDGES, classes - 1, classes, classes + 1, ignore_index)
                return self.chosen(torch.tensor([x for x in edges if info.min <= x <= info.max], dtype=dtype), count)
            grain = self.between(1, 6)  # labels in areas have few edges
            most = max(1, min(classes, info.max + 1, self.pick(2, 5, classes)))
            usual = torch.randint(0, most, (count // grain + 1,), generator=self.generator).repeat_interleave(grain)
            usual = usual[:count].to(dtype)
            if info.min <= ignore_index <= info.max and self.chance(0.7):
                ignored = torch.full((count,), ignore_index, dtype=dtype)
                usual = ignored if kind == "ignored" else self.mixed(usual, ignored)
            return self.mixed(usual, fill(count, self.pick("edges", "bits"))) if kind == "mixed" else usual

        return fill

    # Tensors

    def layout(self, shape: Sequence[int]) -> tuple[list[int], int]:
        """Strides, in any order of the axes, with gaps, expanded or overlapping; and the offset of the first entry."""
        order = list(range(len(shape)))
        if self.chance(0.5):
            order = self.pick([0, *order[2:], 1] if len(shape) > 2 else order, self.random.sample(order, len(order)))
        kind = self.pick("dense", "dense", "dense", "gaps", "expanded", "overlapping")
        strides, step = [0] * len(shape), 2 if kind == "gaps" and self.chance(0.5) else 1
        for dim in reversed(order):
            strides[dim] = step
            step = step * max(1, shape[dim]) + (self.between(0, 3) if kind == "gaps" else 0)
            if kind == "expanded" and self.chance(0.4):
                strides[dim] = 0
            if kind == "overlapping":
                strides[dim] = self.between(0, strides[dim])
        return strides, self.pick(0, 0, 0, 1, 3)

    def tensor(
        self, shape: Sequence[int], fill: Fill, kind: str | None = None, plain: bool = False, written: bool = False
    ) -> Tensor:
        """plain: contiguous."""
        strides, offset = self.layout(shape)
        if plain:
            strides, offset = [math.prod(shape[i + 1 :]) for i in range(len(shape))], 0
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        count = offset + (reach if math.prod(shape) else 0)
        block = fill(count, kind or self.pick("usual", "usual", *KINDS)).clone()
        self.memory.append(Memory(block, fill, written))
        return block.as_strided(shape, strides, offset)

    def float_tensor(self, shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Tensor:
        return self.tensor(shape, self.floats(dtype), **options)

    def usual_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A small float tensor that is not what the call is about."""
        kind = self.pick("usual", "usual", "usual", *KINDS)
        return self.float_tensor(shape, dtype, kind=kind, plain=self.chance(0.97))

    # Arguments that do not fit

    def spoilt(self, value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return self.pick(None, 1, 0.5, torch.zeros(3))
        if isinstance(value, int):
            return self.pick(*WRONG_SIZES)
        if isinstance(value, float):
            return self.pick(*ODD, 2.0)
        if isinstance(value, Tensor):
            return value if value.numel() > MOST else self.spoilt_tensor(value)
        return self.spoilt_list(list(value))

    def spoilt_list(self, values: list[Any]) -> list[Any]:
        if not values or self.chance(0.2):
            return self.pick([], [1], [0.5], [torch.zeros(3)], [None])
        if self.chance(0.3):
            return self.pick(
                values[1:], values[:-1], values[::-1], values + values[:1], self.pick(2, 3, 20, 300) * values
            )
        at = self.random.randrange(len(values))
        return [*values[:at], self.spoilt(values[at]), *values[at + 1 :]]

    def spoilt_tensor(self, value: Tensor) -> Tensor:
        if self.chance(0.3):
            return value.to(self.pick(*OTHERS, *FLOATS, *LABELS))
        if value.dim() and self.chance(0.3):  # a huge side, and still one entry or none
            dim = self.random.randrange(value.dim())
            shape = [*value.shape[:dim], self.pick(2**31, 2**40, 2**61, 2**62), *value.shape[dim + 1 :]]
            if self.chance(0.5):
                shape[self.random.randrange(len(shape))] = 0
            try:
                return value.new_empty(1).as_strided(shape, [0] * len(shape))
            except RuntimeError:  # more than torch counts
                return value.new_empty(0)
        cut = value.narrow(-1, 0, value.shape[-1] - 1) if value.dim() and value.shape[-1] else value[None]
        return self.pick(value[None], value.flatten(), cut, torch.stack([value, value]), value.new_empty(0))


class Call(NamedTuple):
    """An op of torch.ops.bcmf, its arguments, and how many entries the numbers among them ask it to return."""

    op: str
    arguments: list[Any]
    output: Callable[[list[Any]], int] = lambda arguments: 0


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the arg-max


def loss_options(draw: Draw, ignore_index: int) -> list[Any]:
    """LossOptions, all of them; in range, but odd."""

    def odd(*usual: float) -> float:
        return draw.pick(*ODD) if draw.chance(0.1) else draw.pick(*usual)

    step = draw.pick(1, 2, 3, 5, 20, 2**20 + 1, 2**30, 2**31, 2**62)
    steps = [draw.pick(step, draw.between(1, 9)) for _ in range(draw.pick(1, 1, 2, 3, 8))]
    radius = draw.pick(0, 1, 2, 3, 15, 200, 2**20, 2**30, 2**31, 2**62 - 1)
    drawn = {
        "ignore_index": ignore_index,
        "align_corners": draw.chance(0.5),
        "ce": draw.chance(0.8),
        "ohem_threshold": draw.pick(None, None, 1e-3, 0.3, 0.9, 1.0, 1e-320),
        "ohem_min_kept": draw.pick(0, 1, 17, 10**6, 2**62, -1, -(2**63)),
        "bcl_weight": odd(0.7, 1.0),
        "bcl_steps": steps if draw.chance(0.6) else [],
        "bcl_flipped": [odd(0.2), odd(0.3)] if draw.chance(0.5) else [],
        "bcl_threshold": draw.pick(0.1, 0.7, 1.0, 1.0, 1e-320),
        "bcl_nms_size": 2 * radius + 1,
        "cpg_weight": odd(0.6),
        "cpg_kernel_size": draw.pick(0, 0, 3, 5, 7),
        "cpg_window": draw.chance(0.5),
    }
    names = options_type()._fields
    assert drawn.keys() == {*names}, "LossOptions has others"
    return [drawn[name] for name in names]


def loss_inputs(draw: Draw, kind: str | None = None) -> list[Any]:
    """Logits, target, weight and options; kind: of the labels."""
    images, dtype = draw.between(0 if draw.chance(0.1) else 1, 3), draw.pick(*FLOATS)
    classes = draw.pick(2, 2, 3, 5, 11, 19, 19, 40, 64, 255, 256, 257, 300)
    size = draw.size()
    if draw.chance(0.004):  # more than 16 bits number
        images, classes, size = 1, draw.pick(65534, 65535, 65536, 2**17), (draw.between(1, 2), 1)
    several = (draw.between(1, 5) * size[0], draw.between(1, 5) * size[1])
    logits = draw.pick(size, size, draw.size(), several if math.prod(several) < 5000 else size)
    ignore_index = draw.pick(*IGNORED)
    labels = draw.ids(draw.pick(*LABELS), classes, ignore_index)
    weight = draw.usual_tensor((classes,), draw.pick(*FLOATS)) if draw.chance(0.4) else None
    z = draw.float_tensor((images, classes, *logits), dtype)
    y = draw.tensor((images, *size), labels, kind=kind or draw.pick("usual", "usual", "usual", "usual", *KINDS))
    return [z, y, weight, *loss_options(draw, ignore_index)]


def loss(draw: Draw) -> Call:
    return Call("loss", large_loss(draw) if draw.chance(0.01) else loss_inputs(draw))


def large_loss(draw: Draw) -> list[Any]:
    """Statistics, or a gradient, of exactly the size from which they lie in blocks of the package's own."""
    z, y = draw.pick(((1, 2, 8, 8), (1, 2048, 2048)), ((1, 2, 2048, 2048), (1, 2048, 2048)))
    labels = torch.randint(0, 2, y[-1:], dtype=torch.uint8, generator=draw.generator).expand(y)
    logits = torch.randn(z[-1:], generator=draw.generator).expand(z)
    return [logits, labels, None, *options_type()(255)]


def loss_sums(draw: Draw) -> Call:
    return Call("loss_sums", loss_inputs(draw))


def loss_finish(draw: Draw) -> Call:
    """Of any sums."""
    acc = draw.pick(torch.float32, torch.float64)
    tensors = [draw.float_tensor((SUMS,), torch.float64), draw.float_tensor((), acc)]
    return Call("loss_finish", [*tensors, *loss_inputs(draw)[3:]])


def loss_backward(draw: Draw) -> Call:
    """Of a forward's own results; then everything that is data holds something else, or some of it."""
    inputs = large_loss(draw) if draw.chance(0.01) else loss_inputs(draw, kind="usual")
    z, y, *_ = inputs
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    steps = inputs[3 + options_type()._fields.index("bcl_steps")]
    shapes = ((2, *y.shape), (z.shape[0] if steps else 0, *y.shape[1:]), (0,), (SUMMARY,))
    bytes = lambda count, _: draw.bits(count, torch.uint8)  # noqa: E731
    fills = (draw.floats(acc), bytes, bytes, draw.floats(acc))
    forward = attempt(announce(Call("loss", inputs)))
    kept: list[Tensor] = []
    for i, (shape, fill) in enumerate(zip(shapes, fills, strict=True)):
        if forward.results is None or draw.chance(0.4):
            kept.append(draw.tensor(shape, fill))
        else:
            kept.append(forward.results[2 + i])
            draw.memory.append(Memory(kept[i].view(-1), fill, False))
    for memory in draw.memory:
        if not memory.block.is_floating_point() and draw.chance(0.5):
            memory.block.copy_(memory.fill(memory.block.numel(), draw.pick(*KINDS)))
    grad = draw.usual_tensor(draw.pick((), (1,), (1, 1)), draw.pick(acc, *FLOATS))
    return Call("loss_backward", [grad, *inputs[:3], *kept, *inputs[3:]])


def upsample_argmax(draw: Draw) -> Call:
    z, *_ = loss_inputs(draw)
    height, width = draw.size()
    if draw.chance(0.1):  # no pixels
        height, width = draw.pick((0, 2**28), (2**28, 0), (2**30 - 1, 0), (2**62, 0), (2**62, 2**62))
    return Call("upsample_argmax", [z, height, width, draw.chance(0.5)], lambda a: a[0].shape[0] * a[1] * a[2])


def upsample_confusion(draw: Draw) -> Call:
    z, y, _, ignore_index, align_corners, *_ = loss_inputs(draw)
    return Call("upsample_confusion", [z, y, ignore_index, align_corners], lambda a: a[0].shape[1] ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def read_labels(draw: Draw) -> Call:
    shape = [draw.side() for _ in range(draw.between(0, 4))]
    classes, ignore_index = draw.pick(1, 2, 19, 254, 255, 256, 300, 32768, 65536), draw.pick(*IGNORED)
    maps = [draw.tensor(shape, draw.ids(draw.pick(*LABELS), classes, ignore_index)) for _ in range(2)]
    return Call("read_labels", [*maps, classes, ignore_index])


def count_pairs(draw: Draw) -> Call:
    shape = [draw.side() for _ in range(draw.between(0, 4))]
    rows, columns = draw.pick((1, 1), (2, 3), (19, 19), (19, 20), (255, 256), (300, 1), (65536, 1), (1, 65536))
    maps = [draw.tensor(shape, draw.ids(draw.pick(*MAP_LABELS), count, -1)) for count in (rows, columns)]
    return Call("count_pairs", [*maps, rows, columns], lambda a: a[2] * a[3])


def match_within(draw: Draw) -> Call:
    shape, classes = (draw.between(0, 2), *draw.size()), draw.pick(1, 1, 2, 3, 19, 255, 256, 65536)
    dtype = draw.pick(*MAP_LABELS)
    maps = [draw.tensor(shape, draw.ids(dtype, classes, draw.pick(classes, 255, -1))) for _ in range(2)]
    radii = sorted(draw.between(0, draw.pick(1, 5, 128)) for _ in range(draw.pick(1, 1, 3, 255)))
    return Call("match_within", [*maps, classes, radii])


# ---------------------------------------------------------------------------------------------------------------------
# What the context modules do between convolutions


def norms(draw: Draw, channels: Sequence[int], acc: torch.dtype) -> list[list[Tensor]]:
    """Weights, biases, means and variances; a norm may span several branches."""
    cuts = [0, *(i for i in range(1, len(channels)) if draw.chance(0.5)), len(channels)]
    sizes = [sum(channels[a:b]) for a, b in itertools.pairwise(cuts)]
    parameters = [[draw.usual_tensor((size,), acc) for size in sizes] for _ in range(2)]
    plain = {"plain": True, "written": True}
    return [*parameters, *([draw.float_tensor((size,), acc, **plain) for size in sizes] for _ in range(2))]


def statistics(draw: Draw) -> list[Any]:
    """Training, momentum and eps."""
    return [draw.chance(0.6), draw.pick(0.1, 0.1, *ODD), draw.pick(1e-5, 1e-5, *ODD)]


def pool_inputs(draw: Draw) -> tuple[Tensor, torch.dtype]:
    images = draw.between(0 if draw.chance(0.1) else 1, 3)
    shape = images, draw.pick(0, 1, 3, 8, 16, 17, 33, 64), *draw.size()
    x = draw.float_tensor(shape, draw.pick(*FLOATS))
    return x, torch.float64 if x.dtype == torch.float64 else torch.float32


def pool_norm_relu(draw: Draw) -> Call:
    x, acc = pool_inputs(draw)
    return Call("pool_norm_relu", [x, *norms(draw, [x.shape[1]] * 4, acc), *statistics(draw)])


def pool_norm_relu_backward(draw: Draw) -> Call:
    x, acc = pool_inputs(draw)
    images, channels, height, width = x.shape
    sizes = [*(((height - 1) // stride + 1, (width - 1) // stride + 1) for stride in (2, 4, 8)), (1, 1)]
    grads = [draw.float_tensor((images, channels, *size), x.dtype) for size in sizes]
    weights, biases, *_ = norms(draw, [channels] * 4, acc)
    stats = draw.float_tensor((2, 4 * channels), acc)
    return Call("pool_norm_relu_backward", [grads, x, weights, biases, stats, draw.chance(0.6)])


class Sums(NamedTuple):
    """Arguments of add_norm_relu that its backward has, too."""

    resampled: list[Tensor | None]
    added: list[Tensor | None]
    channels: list[int]
    outputs: list[tuple[int, ...]]
    norms: list[list[Tensor]]
    options: list[Any]  # height, width, channels_last, joined


def sum_inputs(draw: Draw) -> Sums:
    images, (height, width), dtype = draw.between(0 if draw.chance(0.1) else 1, 3), draw.size(), draw.pick(*FLOATS)
    joined = draw.chance(0.5)
    branches = draw.between(1, 8 if joined else 2)
    channels = [draw.pick(1, 3, 16, 17, 33) for _ in range(branches)]
    which = [draw.pick((True, True), (True, False), (False, True)) for _ in channels]

    def a_map(there: bool, count: int, size: tuple[int, int]) -> Tensor | None:
        return draw.float_tensor((images, count, *size), dtype) if there else None

    resampled = [a_map(low, count, draw.size()) for count, (low, _) in zip(channels, which, strict=True)]
    added = [a_map(same, count, (height, width)) for count, (_, same) in zip(channels, which, strict=True)]
    outputs = [(images, count, height, width) for count in ([sum(channels)] if joined else channels)]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    options = [height, width, draw.chance(0.5), joined]
    return Sums(resampled, added, channels, outputs, norms(draw, channels, acc), options)


def add_norm_relu(draw: Draw) -> Call:
    sums = sum_inputs(draw)
    images, channels = sums.outputs[0][0], sum(sums.channels)
    arguments = [sums.resampled, sums.added, *sums.norms, *sums.options, *statistics(draw)]
    return Call("add_norm_relu", arguments, lambda a: images * channels * a[6] * a[7])


def add_norm_relu_backward(draw: Draw) -> Call:
    sums = sum_inputs(draw)
    images, channels = sums.outputs[0][0], sum(sums.channels)
    like = next(map for map in (*sums.resampled, *sums.added) if map is not None)
    acc = sums.norms[0][0].dtype
    grads = [draw.float_tensor(shape, like.dtype) for shape in sums.outputs]
    grads += [like.new_empty(0)] * (2 - len(grads))
    arguments = [grads, sums.resampled, sums.added, *sums.norms[:2], draw.float_tensor((2, channels), acc)]
    return Call(
        "add_norm_relu_backward",
        [*arguments, *sums.options, draw.chance(0.6)],
        lambda a: images * channels * a[6] * a[7],
    )


CALLS = (
    *(loss, loss, loss, loss_sums, loss_finish, loss_backward, loss_backward, loss_backward),
    *(upsample_argmax, upsample_confusion),
    *(read_labels, count_pairs, match_within, match_within),
    *(pool_norm_relu, pool_norm_relu_backward, add_norm_relu, add_norm_relu_backward),
)


# ---------------------------------------------------------------------------------------------------------------------
# Calling

SECONDS = 5.0  # tiny tensors take milliseconds
HANG = 60  # seconds until the program is ended
MOST = 1 << 22  # entries that are returned; and more than any machine has is an error again
NO_MEMORY = 1 << 36
RACE = 0.03  # seconds for which memory is refilled; tiny calls are made again and again


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{name}{list(value.shape)}/{list(value.stride())}+{value.storage_offset()}"
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value[:9]))}{', …' if len(value) > 9 else ''}]"
    return repr(value)


class Attempt(NamedTuple):
    """Whether the op "returned", or the kind of error; its results; and what is to be reported."""

    outcome: str
    results: Any
    report: str | None


def announce(call: Call) -> Call:
    sys.stderr.write(f"  {call.op}({', '.join(map(describe, call.arguments))})\n")
    sys.stderr.flush()
    return call


def attempt(call: Call) -> Attempt:
    """Calls the op once."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    start, start_of_work = time.monotonic(), time.process_time()
    results, outcome, report = None, "returned", None
    try:
        results = getattr(torch.ops.bcmf, call.op)(*call.arguments)
    except Exception as error:
        outcome = type(error).__name__
        if not isinstance(error, (ValueError, TypeError, RuntimeError)):
            report = f"{outcome}: {error}"
    # On a busy machine a call waits, too; and the thread that refills memory works, too.
    seconds = min(time.monotonic() - start, time.process_time() - start_of_work)
    faulthandler.cancel_dump_traceback_later()
    return Attempt(outcome, results, report or (f"took {seconds:.1f} s" if seconds > SECONDS else None))


def make_call(draw: Draw) -> Call:
    call = draw.pick(*CALLS)(draw)
    arguments = list(call.arguments)
    for _ in range(draw.pick(1, 1, 2) if draw.chance(0.2) else 0):
        at = draw.random.randrange(len(arguments))
        arguments[at] = draw.spoilt(arguments[at])
    try:
        too_large = MOST < call.output(arguments) < NO_MEMORY
    except (TypeError, IndexError, AttributeError):  # of arguments that are not what they should be
        too_large = False
    return call if too_large else call._replace(arguments=arguments)


class Race:
    """Refills memory from a thread of its own, with one of three contents after another, part by part."""

    def __init__(self, library: ctypes.CDLL, draw: Draw) -> None:
        self.library, self.refilled = library, False
        floats = 0.0 if draw.chance(0.5) else 0.6
        there = [memory for memory in draw.memory if memory.block.numel()]
        self.raced = [memory for memory in there if draw.chance(floats if memory.block.is_floating_point() else 0.8)]
        turns = draw.pick(*TURNS)
        self.contents = [memory.fill(memory.block.numel(), kind).clone() for memory in self.raced for kind in turns]

    def attempt(self, call: Call) -> Attempt:
        """Calls the op several times meanwhile."""
        count = len(self.raced)
        memory = (ctypes.c_void_p * count)(*(memory.block.data_ptr() for memory in self.raced))
        contents = (ctypes.c_void_p * (3 * count))(*(content.data_ptr() for content in self.contents))
        sizes = (ctypes.c_int64 * count)(*(memory.block.nbytes for memory in self.raced))
        self.library.race_begin(ctypes.c_int64(count), memory, contents, sizes)
        try:
            start = time.monotonic()
            while time.monotonic() - start < RACE:
                before = self.library.race_refills()
                done = attempt(call)
                self.refilled |= self.library.race_refills() > before
                if done.report:
                    break
        finally:
            self.library.race_end()
        return done


def changed(draw: Draw, before: list[Tensor], raced: Sequence[Memory]) -> str | None:
    """Which of the op's inputs it has written to."""
    apart = {memory.block.data_ptr() for memory in raced}
    for memory, old in zip(draw.memory, before, strict=True):
        if memory.written or memory.block.data_ptr() in apart:
            continue
        if not torch.equal(memory.block.view(-1).view(torch.uint8), old.view(-1).view(torch.uint8)):
            return f"wrote to an input {describe(memory.block)}"
    return None


def run(seed: int, number: int, library: ctypes.CDLL, counts: Counter[str]) -> None:
    sys.stderr.write(f"--seed {seed} --only {number}\n")
    draw = Draw(seed, number)
    torch.set_num_threads(draw.pick(1, 2))
    call = announce(make_call(draw))
    race = Race(library, draw) if draw.chance(0.4) else None
    before = [memory.block.clone() for memory in draw.memory]
    if race is None or not race.raced:
        done = attempt(call)
        report = done.report or changed(draw, before, [])
    else:
        done = race.attempt(call)
        report = done.report or changed(draw, before, race.raced)
        counts["raced"] += 1
        counts["refilled"] += race.refilled
    counts[done.outcome] += 1
    if report:
        counts["reports"] += 1
        sys.stderr.write(f"REPORT of --only {number}, {call.op}: {report}\n")


def options_type() -> Any:
    """LossOptions, once the ops are loaded."""
    return import_module(f"{PACKAGE}.options").LossOptions


def load() -> ctypes.CDLL:
    """The sanitized ops. Their schemas come from ops.py without the package, which would load the installed ops."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(ROOT / "bcmf_ext")]
    sys.modules[PACKAGE] = package
    import_module(f"{PACKAGE}.ops")
    torch.ops.load_library(os.environ[LIBRARY])
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.race_refills.restype = ctypes.c_int64
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="K", help="the K-th call alone")
    args = parser.parse_args()
    if LIBRARY not in os.environ:
        if reason := why_not():
            sys.exit(reason)
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(build()))
    library, counts = load(), Counter()
    for number in range(args.calls) if args.only is None else [args.only]:
        run(args.seed, number, library, counts)
    made = 1 if args.only is not None else args.calls
    print(f"{counts['returned']} returned, {counts['refilled']} of {counts['raced']} were refilled while they ran")
    print(f"{made} calls, {counts['reports']} reports")
    sys.exit(counts["reports"] > 0)


if __name__ == "__main__":
    main()
