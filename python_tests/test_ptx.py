"""nvcc's output without a GPU: each kind of fault that the executor claims to find is planted and found, and of the
kernels every barrier. (test_ptx_opcodes.py has the opcodes, and test_ops.py and its like run the ops.)"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import emulator, ptx
from harness.backends import KERNELS, Backend, on
from harness.cases import CASES
from harness.cases.pattern import Case, Inputs, Results, in_layout, results_of
from harness.selection import MIXES

pytestmark = pytest.mark.skipif(ptx.why_not() is not None, reason=str(ptx.why_not()))

PTX = [backend for backend in KERNELS if backend.name == "ptx"]
FAULTS = {
    "missing_barrier": "which another thread has read, and nothing orders the two",
    "missing_barrier_before_atomics": "an atomic by thread 1 .* another thread has written, and nothing orders the two",
    "missing_barrier_behind_atomics": "which another thread has changed by an atomic",
    "divergent_barrier": "a barrier that not all threads of the block reach",
    "shared_memory_asked_too_small": "an access of 4 bytes at offset 252 of shared memory, of which there are 252",
    "attribute_not_set": "launched with 61696 bytes of dynamic shared memory, .* without cudaFuncAttributeMaxDynamic",
    "more_shared_memory_than_there_is": "launched with 102400 bytes of dynamic shared memory, beyond the 101376",
    "misaligned_shared_access": "an access of 8 bytes is not aligned to them",
    "read_out_of_bounds": "offset 256 of an allocation of 256 bytes",
    "write_out_of_bounds": "offset 256 of an allocation of 256 bytes",
    "use_after_release": "an access of 4 bytes of global memory",
    "uninitialised_read": "a read of what nothing has written, at offset 0 of an allocation of 256 bytes",
    "misaligned_vector_load": "an access of 8 bytes is not aligned to them",
    "race_between_blocks": "at offset 124 of an allocation of 256 bytes, which another thread has written",
    "read_of_another_blocks_result": "a read by thread 0 at offset 0 .* which another thread has written",
    "overwritten_input_of_another_block": "a write by thread 0 at offset 0 .* which another thread has read",
    "race_between_threads": "a write by thread 32 .* which another thread has read",
    "shuffle_under_divergence": "a shuffle waits for lanes that do not come",
    "shuffle_from_a_lane_that_is_not_there": "a shuffle reads lane 16, which takes no part in it",
    "shuffle_of_other_masks": "a shuffle waits for lanes that do not come",
    "disagreement_about_arguments": "an access of 4 bytes of global memory where nothing is allocated",
    "fault_in_a_branch_for_the_device": "other results",
    "more_threads_than_launch_bounds": "launched with more threads than its __launch_bounds__ allow",
    "division_by_zero": "an integer is divided by 0",
}
"""What the executor says of each fault of harness/ptx/planted.cu."""
SEEN_BY_GPP = {  # in one order of threads, without sanitizers
    "missing_barrier",
    "missing_barrier_behind_atomics",
    "divergent_barrier",
    "shared_memory_asked_too_small",
    "more_shared_memory_than_there_is",
    "shuffle_under_divergence",
    "shuffle_from_a_lane_that_is_not_there",
    "division_by_zero",
}
"""Those that the emulator of harness/emulator finds, too."""


@pytest.fixture(scope="module")
def over_emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the faults, compiled by g++."""
    executable = tmp_path_factory.mktemp("planted") / "planted"
    emulator.compile_program(ptx.HERE / "planted.cu", executable, "-O2", "-x", "c++")
    return executable


def test_all_faults_are_here() -> None:
    """Protects from a fault that is planted and not looked for."""
    assert set(ptx.load().planted_faults().decode().split()) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    """Protects what the executor claims to find; and its mended twin from a false alarm."""
    assert ptx.load().planted_run(fault.encode(), 0) == b"nothing noticed"
    said = ptx.load().planted_run(fault.encode(), 1).decode()
    assert re.search(FAULTS[fault], said)
    if " by thread " in said:
        assert "planted.cu:" in said  # the line


@on(PTX)
def test_a_fake_tensor_is_no_memory(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    """Protects from a null pointer that counts as memory since torch.compile called an op with tensors without data."""
    case = next(case for case in CASES if case.name == "upsample_argmax")
    torch.library.opcheck(*case.call_of(backend, *case.inputs((2, 5, 6, 7), torch.float32, backend.device)))
    test_a_planted_fault_is_found("disagreement_about_arguments")  # a write at 0
    assert "RecordFunction" not in capfd.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_what_gpp_does_not_see(fault: str, over_emulator: Path) -> None:
    """Protects the reason for the executor: most faults pass the kernels' other emulation."""
    done = subprocess.run([over_emulator, fault], capture_output=True, text=True)
    passes = (done.returncode, done.stdout) == (0, "nothing noticed\n")
    assert passes != (fault in SEEN_BY_GPP), done


# --------------------------------------------------------------------------------------------------------------------
# What is counted


MOVES = """.version 9.0
.target sm_80
.address_size 64
.shared .align 16 .b8 tile[8192];
.visible .entry moves(
.param .u64 moves_param_0,
.param .u64 moves_param_1
)
{{
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
mov.u32 %r1, %tid.x;
mul.lo.s32 %r2, %r1, {shared};
mov.u32 %r3, tile;
add.s32 %r4, %r3, %r2;
mul.wide.u32 %rd1, %r1, {across};
ld.param.u64 %rd2, [moves_param_0];
add.s64 %rd3, %rd2, %rd1;
ld.global.u32 %r5, [%rd3];
st.shared{vector} [%r4], {values};
mul.wide.u32 %rd4, %r1, 4;
ld.param.u64 %rd5, [moves_param_1];
add.s64 %rd6, %rd5, %rd4;
st.global.u32 [%rd6], %r5;
ret;
}}
"""


@pytest.mark.parametrize(
    ("entries", "stride", "requests", "passes"),
    [(1, 4, 1, 1), (1, 8, 1, 2), (1, 128, 1, 32), (1, 132, 1, 1), (2, 8, 2, 2), (4, 16, 4, 4), (4, 32, 4, 8)],
)
def test_banks(entries: int, stride: int, requests: int, passes: int) -> None:
    """Protects the count of bank conflicts: lanes whose words lie in one bank take turns."""
    values = "%r5" if entries == 1 else f"{{{', '.join(['%r5'] * entries)}}}"
    vector = ".u32" if entries == 1 else f".v{entries}.u32"
    found = count_moves(MOVES.format(shared=stride, across=4, vector=vector, values=values))
    (store,) = [each for each in found.instructions if each.opcode.startswith("st.shared")]
    assert (store.executed, store.lanes, store.requests, store.passes) == (1, 32, requests, passes)


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (4, 4), (8, 8), (32, 32), (64, 32)])
def test_sectors(stride: int, sectors: int) -> None:
    """Protects the count of sectors, and of the bytes that a launch touches: each sector once."""
    found = count_moves(MOVES.format(shared=4, across=stride, vector=".u32", values="%r5"))
    (load,) = [each for each in found.instructions if each.opcode == "ld.global.u32"]
    assert (load.requests, load.sectors) == (1, sectors)
    assert (found.bytes_read, found.bytes_written) == (32 * sectors, 128)


def count_moves(text: str) -> ptx.Kernel:
    memory = np.zeros(3 * 1024, np.uint32)
    first = -memory.ctypes.data % 64 // 4  # sectors are counted from multiples of 32
    ptx.reset_counts()
    with ptx.options(traffic=True):
        ptx.run(text, [memory[first : first + 1024]], [memory[first + 1024 : first + 1056]])
    (kernel,) = ptx.counts()
    return kernel


# --------------------------------------------------------------------------------------------------------------------
# The kernels


SHAPES = ((2, 5, 37, 72), (2, 12, 5, 68))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def problems(*dtypes: torch.dtype) -> Iterator[tuple[Case, Inputs]]:
    """Problems of the cases that have CUDA kernels, small first; between them they run every kernel of these types."""
    cases = [case for case in CASES if PTX[0] in case.backends]
    for shape in reversed(SHAPES):
        for case in cases:
            for dtype in [dtype for dtype in dtypes if dtype in case.dtypes]:
                inputs = case.inputs(shape, dtype, "cpu")
                yield from ((case, in_layout(inputs, layout)) for layout in ("nchw", "channels_last", "slice"))
                large = torch.randn(*shape[:2], 40, 75, dtype=torch.float64).to(dtype)  # more logits than labels
                if case.name in ("segmentation_loss flipped low-resolution", "upsample_argmax low-resolution"):
                    yield case, (large, *inputs[1:])
                if case.name == "cross_entropy":
                    z, y, w = inputs
                    yield from ((case, (z, y.to(labels), w)) for labels in (torch.uint8, torch.int16, torch.int32))


def kernels_of(text: str) -> dict[str, str]:
    """The kernels of a module of PTX, by their symbols, each as a module of its own."""
    head, *kernels = re.split(r"(?=^\.visible \.entry)", text, flags=re.MULTILINE)
    files = "\n".join(re.findall(r"^\s*\.file.*$", text, flags=re.MULTILINE))
    bodies = [re.split(r"^\s*\.(?:file|section)", kernel, flags=re.MULTILINE)[0] for kernel in kernels]
    return {body[: body.index("(")].split()[-1]: head + body + files for body in bodies}


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, str]]:
    """All kernels of csrc, by symbol, as the library has them; and again has them afterwards."""
    texts = [ptx.text_of(launcher) for launcher in ptx.LAUNCHERS]
    yield {symbol: module for text in texts for symbol, module in kernels_of(text).items()}
    for text in texts:
        ptx.take_in(text)


@pytest.mark.thorough
@on(PTX)
def test_every_kernel_is_run(backend: Backend, modules: dict[str, str]) -> None:
    """Protects the suite's cases: between them they launch every kernel in every type."""
    ptx.reset_counts()
    for case, inputs in problems(*DTYPES):
        results_of(case, backend, inputs)
    assert set(modules) - {kernel.symbol for kernel in ptx.counts()} == set()


@pytest.mark.thorough
@on(PTX)
def test_every_barrier_is_needed(backend: Backend, modules: dict[str, str]) -> None:
    """Protects the check for races, and the kernels: a barrier that is taken out is noticed, in every kernel that has
    it. Those that only some of the callers of a function need have a comment in the source."""
    launched: dict[str, list[tuple[Case, Inputs, Results]]] = defaultdict(list)
    for case, inputs in problems(torch.float32):
        ptx.reset_counts()
        expected = results_of(case, backend, inputs)
        for kernel in ptx.counts():
            launched[kernel.symbol].append((case, inputs, expected))
    unnoticed, tried = [], 0
    for symbol, module in modules.items():
        for barrier in re.finditer(r"bar\.sync[^;]*;", module) if symbol in launched else ():
            ptx.take_in(module[: barrier.start()] + module[barrier.end() :])
            tried += 1
            if not any(is_noticed(backend, *problem) for problem in launched[symbol]):
                unnoticed.append(source_line(module, barrier.start()))
        ptx.take_in(module)
    assert tried > 100
    assert {line for line in unnoticed if not re.search(r"__syncthreads\(\);  // \S", line)} == set()


def is_noticed(backend: Backend, case: Case, inputs: Inputs, expected: Results) -> bool:
    try:
        return not results_of(case, backend, inputs).equal(expected)
    except RuntimeError as error:
        return (
            re.search("nothing orders the two|nothing has written|not all threads of the block reach", str(error))
            is not None
        )


def source_line(module: str, place: int) -> str:
    """The file and line of the CUDA source that a place in the PTX comes from, and what stands there."""
    file, line = re.findall(r"\.loc\s+(\d+) (\d+)", module[:place])[-1]
    path = re.search(rf'\.file\s+{file}\s+"([^"]+)"', module)
    assert path is not None
    return f"{path[1]}:{line}: {Path(path[1]).read_text().splitlines()[int(line) - 1].strip()}"


@pytest.mark.thorough
@on(PTX)
@pytest.mark.parametrize("generation", [100])
def test_newer_generation(backend: Backend, generation: int, modules: dict[str, str]) -> None:
    """Protects what nvcc makes for GPUs with other instructions: the same results."""
    for launcher in ptx.LAUNCHERS:
        ptx.take_in(ptx.text_of(launcher, generation))
    for case, inputs in problems(torch.float32, torch.bfloat16):
        case.assert_as_defined(backend, inputs)


@on(PTX)
def test_coarse_instructions(backend: Backend) -> None:
    """Protects the results from what differs between GPUs: ex2.approx and rcp.approx may be off by two units."""
    for case in CASES:
        if case.name not in MIXES:
            continue
        inputs = case.inputs(SHAPES[0], torch.float32, "cpu")
        exact = results_of(case, backend, inputs)
        with ptx.options(ulps=2):
            coarse = results_of(case, backend, inputs)
        assert not coarse.equal(exact)
        for one, other in zip([*exact.outputs, *exact.grads], [*coarse.outputs, *coarse.grads], strict=True):
            assert (one - other).abs().max() <= 5e-6 * one.abs().max()
