"""What the suite of test_ops.py knows of an op: the pattern that the cases of every op follow."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from harness.backends import KERNELS, Backend, parameter

Inputs = tuple[Any, ...]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case(ABC):
    """A call of an op with options that take a path of their own through its kernels.

    The inputs of a call are a flat tuple: tensors of images, which are floating-point maps (N, C, H, W) or labels
    (N, H, W) and may have any layout, with None for one that is missing; then tensors of one dimension and numbers.
    """

    name: str

    backends: ClassVar[Sequence[Backend]] = KERNELS
    """Those that have the op."""
    dtypes: ClassVar[Sequence[torch.dtype]] = DTYPES
    """Those of the first input that the op takes."""
    shapes: ClassVar[Sequence[tuple[int, ...]]]
    """(N, C, H, W) of the problems at which values are compared; the first ones are small."""
    smallest: ClassVar[tuple[int, ...]] = (2, 3, 3, 4)
    """(N, C, H, W) of a problem for what takes time for each entry of the maps."""

    @abstractmethod
    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        """The inputs of a problem of this shape (N, C, H, W), the same ones at each call."""

    @abstractmethod
    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        """The outputs by the kernels of a backend."""

    @abstractmethod
    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        """The op that `run` calls, and its arguments."""

    @abstractmethod
    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        """The op's values and gradients equal those of its definition in PyTorch: bit for bit where they are integers,
        and else within the case's tolerance rule. views: the same inputs in another layout, which the op gets.

        Returns the op's gradients."""

    def differentiable(self, inputs: Inputs) -> list[int]:
        """The indices of the inputs that have gradients."""
        return []

    def written(self, inputs: Inputs) -> list[int]:
        """The indices of the inputs that the op writes to."""
        return []

    def backward_call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        """The op that computes the gradients, and its arguments."""
        raise NotImplementedError


class Results(NamedTuple):
    """All that a call changes in the world."""

    outputs: list[Tensor]
    grads: list[Tensor]
    written: list[Tensor]

    def equal(self, others: Results) -> bool:
        """Whether all tensors have the same bits."""
        return all(
            (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b.to(a.device))
            for ours, theirs in zip(self, others, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )


def fresh(case: Case, inputs: Inputs) -> list[Any]:
    """The inputs, with a copy of what the op would write to."""
    written = case.written(inputs)
    return [each.clone() if i in written else each for i, each in enumerate(inputs)]


def results(
    case: Case,
    inputs: Inputs,
    call: Callable[..., Sequence[Tensor]],
    upstream_dtype: torch.dtype = torch.float64,
) -> Results:
    """What a call of these inputs gives, with random upstream gradients, rounded to ``upstream_dtype``."""
    given = fresh(case, inputs)
    leaves = []
    for i in case.differentiable(inputs):
        given[i] = given[i].detach().requires_grad_()
        leaves.append(given[i])
    outputs = call(*given)
    g = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(out.shape, generator=g, dtype=torch.float64).to(upstream_dtype).to(out.device, out.dtype)
        for out in outputs
    ]
    upstream = [torch.empty_like(out).copy_(grad) for out, grad in zip(outputs, upstream, strict=True)]  # the layouts
    grads = torch.autograd.grad(outputs, leaves, upstream) if leaves else ()
    written = [given[i] for i in case.written(inputs)]
    return Results([out.detach() for out in outputs], list(grads), written)


def results_of(case: Case, backend: Backend, inputs: Inputs) -> Results:
    return results(case, inputs, lambda *given: case.run(backend, *given))


def backward_of(op: Any) -> Any:
    """The op that computes another one's gradients."""
    namespace, name = op.default.name().split("::")
    return getattr(getattr(torch.ops, namespace), f"{name.split('.')[0]}_backward")


def runs(
    cases: Iterable[Case],
    backends: Sequence[Backend] | None = None,
    **each: Callable[[Any], Iterable[Any]],
) -> Any:
    """The mark by which a test runs every case on every backend that has its op, with ``backend`` and ``case``.

    each: further arguments of the test, by name; their values are what the function given makes of a case.
    """
    parameters = [
        parameter(backend, case, *values, name="-".join([case.name, *map(str, values)]))
        for case in cases
        for backend in (case.backends if backends is None else [b for b in backends if b in case.backends])
        for values in itertools.product(*(choose(case) for choose in each.values()))
    ]
    return pytest.mark.parametrize(("backend", "case", *each), parameters, indirect=["backend"])


def layouts(z: Tensor) -> dict[str, Tensor]:
    """The same maps or labels as NCHW, channels_last, a strided slice, a view with an offset, and transposed storage.
    What lies between their entries is NaN, or the largest of integers."""
    if z.dim() == 3:
        return {name: view.squeeze(1) for name, view in layouts(z.unsqueeze(1)).items()}
    n, c, h, w = z.shape
    between = math.nan if z.is_floating_point() else torch.iinfo(z.dtype).max
    big = z.new_full((n, c + 3, h + 2, 2 * w + 1), between)
    big[:, 2:-1, 1:-1, 1::2] = z
    aligned = z.new_full((n, c, h, w // 8 * 8 + 8), between)
    aligned[..., :w] = z
    return {
        "nchw": z,
        "channels_last": z.contiguous(memory_format=torch.channels_last),
        "slice": big[:, 2:-1, 1:-1, 1::2],
        "rows cut": big[:, 2:-1, 1:-1, 1::2].contiguous()[..., :w],
        "cut from aligned rows": aligned[..., :w],
        "transposed": z.transpose(2, 3).contiguous().transpose(2, 3),
    }


def in_layout(inputs: Inputs, layout: str) -> Inputs:
    """The inputs, with maps and labels in another layout (see `layouts`)."""
    return tuple(layouts(each)[layout] if isinstance(each, Tensor) and each.dim() > 2 else each for each in inputs)
