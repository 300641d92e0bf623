"""The suite: what every op promises (docs/definitions.md, Conventions), for all cases and backends of the harness.

What one op alone promises is in test_loss_op.py, test_lmfm.py, test_metrics.py and test_boundary.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.backends import KERNELS, WITHOUT_GPU, Backend
from harness.cases import CASES, Case, layouts, runs
from harness.cases.counts import ArgmaxCase
from harness.cases.pattern import fresh, in_layout, results, results_of
from torch import Tensor

DIFFERENTIABLE = tuple(case for case in CASES if case.differentiable(case.inputs((1, 2, 3, 4))))
CUDA_WITHOUT_GPU = tuple(backend for backend in KERNELS if backend.name in WITHOUT_GPU)
GPU = tuple(backend for backend in KERNELS if backend.device == "cuda")


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients


@runs(CASES, dtype=lambda case: case.dtypes, shape=lambda case: case.shapes)
def test_as_defined(backend: Backend, case: Case, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Protects values and gradients in every dtype, with an upstream gradient other than 1, from one pixel to 171
    classes and to maps that no block of threads covers: never less exact than eager PyTorch, integers exactly."""
    with backend.launching():
        case.assert_as_defined(backend, case.inputs(shape, dtype, backend.device))


@runs(CASES, KERNELS, dtype=lambda case: case.dtypes, shape=lambda _: [(2, 5, 9, 11), (2, 12, 5, 68)])
def test_any_layout(backend: Backend, case: Case, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Protects strides: channels_last, slices, offsets and transposed storage are read where they are, what lies
    between them is not, and a gradient comes in its map's layout. Of the second shape the CUDA kernels read several
    pixels at once; 12 classes in fp32 are just what a block may have of shared memory unasked."""
    inputs = case.inputs(shape, dtype, backend.device)
    for layout in layouts(torch.zeros(1, 1, 1, 1)).keys() - {"nchw"}:  # in which test_as_defined has them
        views = in_layout(inputs, layout)
        with backend.launching():
            grads = case.assert_as_defined(backend, inputs, views)
        for i, grad in zip(case.differentiable(views), grads, strict=True):
            assert grad.stride() == torch.empty_like(views[i]).stride()


@runs(DIFFERENTIABLE)
def test_gradcheck(backend: Backend, case: Case) -> None:
    """Protects the analytic gradients in fp64."""
    inputs = case.inputs(case.smallest, torch.float64, backend.device)
    indices = case.differentiable(inputs)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = fresh(case, inputs)
        for i, leaf in zip(indices, leaves, strict=True):
            given[i] = leaf
        return case.run(backend, *given)

    leaves = tuple(inputs[i].requires_grad_() for i in indices)
    few = sum(leaf.numel() for leaf in leaves) <= 100
    assert torch.autograd.gradcheck(call, leaves, fast_mode=backend.interpreted or not (few or backend.name == "cpu"))


@runs([case for case in CASES if not case.written(case.inputs((1, 2, 3, 4)))])
def test_no_image(backend: Backend, case: Case) -> None:
    """Protects an empty batch: outputs as of PyTorch, and gradients of zero. (In training norms refuse it.)"""
    inputs = case.inputs((0, 3, 6, 8), case.dtypes[-1], backend.device)
    found = results_of(case, backend, inputs)
    assert all(grad.count_nonzero() == 0 for grad in found.grads)
    case.assert_as_defined(backend, inputs)


@runs(CASES, KERNELS)
def test_beyond_two_billion_elements_of_memory(backend: Backend, case: Case) -> None:
    """Protects 64-bit offsets, without the memory: strides so large that a 32-bit product would wrap. Of the address
    space only what is touched is backed by pages."""
    if backend.device == "cuda":
        pytest.skip("the memory of a GPU is all real")
    inputs = case.inputs((3, 3, 4, 8), case.dtypes[-1], backend.device)
    inputs = tuple(each.byte() if isinstance(each, Tensor) and each.dim() == 3 else each for each in inputs)  # labels
    expected = results_of(case, backend, inputs)
    for of_channels in (False, True):
        assert results_of(case, backend, tuple(spread(each, of_channels) for each in inputs)).equal(expected)


def spread(each: Any, of_channels: bool) -> Any:
    """The same map or labels with a stride beyond 32 bits from image to image or, of few channels, between these."""
    if not isinstance(each, Tensor) or each.dim() < 3:
        return each
    _, *channels, h, w = each.shape
    far = 2**31 + 64
    strides = (h * w, far, w, 1) if of_channels and channels and channels[0] <= 3 else (far, h * w, w, 1)
    try:
        memory = torch.empty(3 * far, dtype=each.dtype)
    except RuntimeError:
        pytest.skip("the system does not lend memory that is not there")
    return memory.as_strided(each.shape, strides if channels else (far, w, 1)).copy_(each)


# --------------------------------------------------------------------------------------------------------------------
# Determinism


@runs(CASES, KERNELS, layout=lambda _: ["nchw", "channels_last"], shape=lambda _: [(3, 7, 61, 31), (2, 5, 13, 31)])
def test_bit_identical_from_run_to_run(backend: Backend, case: Case, layout: str, shape: tuple[int, ...]) -> None:
    """Protects determinism: the same bits run after run and for any number of threads; PyTorch's deterministic mode,
    which fills new memory with NaN, neither throws nor changes a bit."""
    inputs = in_layout(case.inputs(shape, case.dtypes[1], backend.device), layout)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (threads, 1, 3, 2):
            torch.set_num_threads(count)
            torch.use_deterministic_algorithms(count == 3)
            found.append(results_of(case, backend, inputs))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert all(other.equal(found[0]) for other in found[1:])


@runs(CASES, CUDA_WITHOUT_GPU, dtype=lambda case: case.dtypes, layout=lambda _: ["nchw", "channels_last"])
def test_bit_identical_in_any_order_of_threads(backend: Backend, case: Case, dtype: torch.dtype, layout: str) -> None:
    """Protects the CUDA kernels from races: blocks and threads in forward, reversed and shuffled order."""
    inputs = in_layout(case.inputs((2, 5, 33, 41), dtype), layout)
    found = []
    for order in WITHOUT_GPU[backend.name].ORDERS:
        with WITHOUT_GPU[backend.name].in_order(order):
            found.append(results_of(case, backend, inputs))
    assert all(other.equal(found[0]) for other in found[1:])


# --------------------------------------------------------------------------------------------------------------------
# A well-behaved op


FORMS = "nchw", "nchw", "channels_last"  # of the first dtypes: fp64, fp32 and bf16


@runs(CASES, KERNELS, form=lambda case: zip(case.dtypes, FORMS, strict=False))
def test_opcheck(backend: Backend, case: Case, form: tuple[torch.dtype, str]) -> None:
    """Protects schema (also what it says of inputs that are written to), fake kernels and autograd registration, of the
    op and of its backward (torch.library.opcheck)."""
    dtype, layout = form
    inputs = in_layout(case.inputs((2, 5, 6, 7), dtype, backend.device), layout)
    leaves = case.differentiable(inputs)
    if not leaves:
        torch.library.opcheck(*case.call_of(backend, *inputs))
        return
    given = fresh(case, inputs)
    for i in leaves:
        given[i] = given[i].detach().requires_grad_()
    torch.library.opcheck(*case.call_of(backend, *given))
    torch.library.opcheck(*case.backward_call_of(backend, *fresh(case, inputs)))


@runs(DIFFERENTIABLE, KERNELS)
def test_only_the_result_has_a_gradient(backend: Backend, case: Case) -> None:
    """Protects from a gradient of what an op keeps for its backward, such as statistics and counts."""
    inputs = case.inputs((2, 5, 6, 7), torch.float32, backend.device)
    given = fresh(case, inputs)
    for i in case.differentiable(inputs):
        given[i] = given[i].detach().requires_grad_()
    assert all(output.requires_grad for output in case.run(backend, *given))
    op, arguments = case.call_of(backend, *given)
    results = op(*arguments)
    assert isinstance(results, Tensor) or not results[-1].requires_grad  # what is kept is last


@runs(CASES, KERNELS)
def test_compile_fullgraph(backend: Backend, case: Case) -> None:
    """Protects torch.compile(fullgraph=True): the same results, no graph break."""
    inputs = case.inputs((2, 5, 6, 7), case.dtypes[1], backend.device)
    torch.compiler.reset()  # or it gives up after so many cases
    compiled = torch.compile(lambda *given: case.run(backend, *given), fullgraph=True, backend="aot_eager")
    assert results(case, inputs, compiled).equal(results_of(case, backend, inputs))


@runs(CASES, KERNELS, strict=lambda _: [True, False])
def test_export(backend: Backend, case: Case, strict: bool) -> None:
    """Protects torch.export: the exported module has the values and the gradients (of a Function around the op it would
    have none), and writes to what the op writes to."""
    inputs = case.inputs((2, 5, 6, 7), case.dtypes[1], backend.device)

    class Module(torch.nn.Module):
        def forward(self, *given: Any) -> tuple[Tensor, ...]:
            return case.run(backend, *given)

    module = torch.export.export(Module(), tuple(fresh(case, inputs)), strict=strict).module()
    assert results(case, inputs, module).equal(results_of(case, backend, inputs))


@runs(DIFFERENTIABLE, KERNELS)
def test_double_backward_raises_our_sentence(backend: Backend, case: Case) -> None:
    """Protects from second-order terms that are missing silently: there is no second derivative."""
    inputs = case.inputs((2, 5, 6, 7), torch.float32, backend.device)
    given, (first, *_) = fresh(case, inputs), case.differentiable(inputs)
    given[first] = given[first].requires_grad_()
    total = sum(output.square().sum() for output in case.run(backend, *given))
    (grad,) = torch.autograd.grad(total, given[first], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='torch'"):
        grad.sum().backward()


@runs(CASES, KERNELS)
def test_inputs_are_not_written_and_autocast_is_ignored(backend: Backend, case: Case) -> None:
    """Protects the inputs, but for what the schema says is written; arithmetic in the op's own precision under
    autocast; and use without autograd."""
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    inputs = case.inputs((2, 5, 6, 7), dtype, backend.device)
    before = [each.clone() if isinstance(each, Tensor) else each for each in inputs]
    expected = results_of(case, backend, inputs)
    with torch.autocast(backend.device, torch.bfloat16):
        assert results_of(case, backend, inputs).equal(expected)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            outputs = case.run(backend, *fresh(case, inputs))
        assert not any(output.requires_grad for output in outputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected.outputs, strict=True))
    for ours, copy in zip(inputs, before, strict=True):
        assert torch.equal(ours, copy) if isinstance(ours, Tensor) else ours == copy


@runs(CASES, KERNELS)
def test_arguments_that_do_not_fit(backend: Backend, case: Case) -> None:
    """Protects memory: a call of torch.ops with a tensor of another shape or kind is an error, and no wild read. (The
    arg-max of integers is no error everywhere.)"""
    op, arguments = case.call_of(backend, *case.inputs((2, 5, 6, 7), case.dtypes[1], backend.device))
    images = sum(each.dim() > 2 for each in arguments if isinstance(each, Tensor))
    for i, argument in enumerate(arguments):
        for wrong in misfits(argument, others=images > 1):
            if isinstance(case, ArgmaxCase) and wrong.dtype == torch.int64:
                continue
            with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
                op(*arguments[:i], wrong, *arguments[i + 1 :])


def misfits(argument: Any, others: bool) -> Iterator[Any]:
    """What does not fit in the place of a tensor, or of a list of tensors. others: whether there are other images, with
    which a batch has to agree."""
    if isinstance(argument, list):
        i = next((i for i, each in enumerate(argument) if each is not None), None)
        if i is None or not isinstance(argument[i], Tensor):
            return
        yield argument[:-1]
        for wrong in misfits(argument[i], others=len(argument) > 1):
            yield [*argument[:i], wrong, *argument[i + 1 :]]
    if isinstance(argument, Tensor):
        yield argument[0]
        if argument.dim() == 1 or others:
            yield argument[:1]
        if argument.dim() > 2:
            yield argument.long() if argument.is_floating_point() else argument.float()


# --------------------------------------------------------------------------------------------------------------------
# What only a GPU can show


@runs(CASES, GPU)
def test_side_stream(backend: Backend, case: Case) -> None:
    """Protects streams: kernels go to the current one. The inputs are written late, by that stream alone."""
    inputs = case.inputs((4, 19, 256, 256), case.dtypes[1], "cuda")
    expected = results_of(case, backend, inputs)
    late = tuple(torch.zeros_like(each) if isinstance(each, Tensor) else each for each in inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for ours, source in zip(late, inputs, strict=True):
            if isinstance(ours, Tensor):
                ours.copy_(source)
        found = results_of(case, backend, late)
    torch.cuda.synchronize()
    assert found.equal(expected)


@runs(CASES, GPU)
def test_second_device(backend: Backend, case: Case) -> None:
    """Protects the device guard: tensors on cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    inputs = case.inputs((2, 5, 33, 17), case.dtypes[1], "cuda:0")
    moved = tuple(each.to("cuda:1") if isinstance(each, Tensor) else each for each in inputs)
    assert results_of(case, backend, moved).equal(results_of(case, backend, inputs))
