"""Which tests run: on Triton's interpreter, which is slow, not all; and all only where CI is set.

Unless it is, a test with several parameters runs with so few combinations that every two values still meet; the CUDA
kernels run as nvcc makes them, and as g++ does (the emulator) only where nvcc is missing; they and the interpreter take
cases that between them run every kernel; and what is marked ``thorough`` is left out. Where CI is set, the emulator
takes such cases beside nvcc's output.
What is left out is not even collected; conftest.py prints how many tests that are, and why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch

from bcmf_ext.nn import LMFM
from harness import ptx
from harness.cases import CASES
from harness.cases.losses import LossCase
from harness.cases.norms import NormCase

INTERPRETER = "Triton's interpreter takes too long (python_tests/harness/selection.py says what it runs)"
EMULATOR = "nvcc's output runs these cases; the emulator runs every kernel (python_tests/harness/selection.py)"
ONLY_CI = "CI=1 runs them: further combinations of parameters, and what takes long (python_tests/harness/README.md)"

# Between them these losses run every kernel but the gathering of gradients for nearly as many logits as labels.
MIXES = (
    "cross_entropy weighted OHEM by min_kept",
    "segmentation_loss weighted",
    "segmentation_loss flipped low-resolution",
)
SLOWEST = MIXES[-1]  # by far, in the interpreter
EVERY_KERNEL = (
    *MIXES,
    "pool_norm_relu training",
    "add_norm_relu level training",
    "add_norm_relu joined eval",
    "srm",
    "upsample_argmax low-resolution",
)
"""Of the ops' cases, those that the default run takes on CUDA's kernels without a GPU and on the interpreter; and the
emulator always, where nvcc is there."""


class Rule(NamedTuple):
    """Which parameters of a test the interpreter runs, and why that is enough. only_ci: it takes long with any."""

    runs: Callable[..., bool]
    why: str
    only_ci: bool = False


def is_mix(case: Any = None, **_: Any) -> bool:
    return not isinstance(case, LossCase) or case.name in MIXES


def small_or_mix(case: Any, dtype: torch.dtype, shape: tuple[int, ...], **_: Any) -> bool:
    if isinstance(case, LossCase):
        if shape in case.shapes[:2]:
            return True
        return dtype == torch.float32 and is_mix(case) and not (case.name == SLOWEST and shape == (3, 5, 64, 33))
    return not isinstance(case, NormCase) or (dtype == torch.float32 and shape != case.shapes[-1])


USUAL = Rule(is_mix, "MIXES of the losses, and all cases of other ops, run every kernel")
INTERPRETED = {  # what is not here is as usual
    "test_ops.py::test_as_defined": Rule(small_or_mix, "options and dtypes act pixel by pixel: small shapes show them"),
    "test_ops.py::test_any_layout": Rule(
        lambda case, dtype, shape, **_: (
            is_mix(case) and shape[1] != 12 and dtype in (torch.float32, torch.bfloat16, torch.uint8)
        ),
        "no kernel reads the second shape, or the other dtypes, in another way",
        only_ci=True,
    ),
    "test_ops.py::test_gradcheck": Rule(
        lambda case, **_: getattr(case, "training", True) or case.name == "add_norm_relu level eval",
        "in eval mode all cases run the same backward",
        only_ci=True,
    ),
    "test_ops.py::test_bit_identical_from_run_to_run": Rule(
        lambda case, layout, shape, **_: is_mix(case) and layout == "nchw" and shape == (2, 5, 13, 31),
        "the smaller shape has several programs, too, and both layouts have the same",
        only_ci=True,
    ),
    "test_ops.py::test_opcheck": Rule(
        lambda case, form, **_: (
            is_mix(case)
            and case.name != SLOWEST
            and getattr(case, "training", True)
            and form == (torch.bfloat16, "channels_last")
        ),
        "schemas and fake kernels are those of the other backends",
    ),
    "test_ops.py::test_no_image": Rule(lambda **_: True, "no pixel takes no time"),
    "test_loss_op.py::test_nothing_to_average": Rule(lambda **_: True, "few pixels take little time"),
    "test_loss_op.py::test_extreme_logits": Rule(lambda **_: True, "few pixels take little time"),
    "test_loss_op.py::test_any_size_of_logits": Rule(
        lambda dtype, **_: dtype == torch.float32, "logits are resampled in fp32 whatever they come in", only_ci=True
    ),
    "test_loss_op.py::test_many_tiles": Rule(lambda **_: True, "no smaller problem has as many tiles", only_ci=True),
    "test_loss_op.py::test_the_backward_believes_nothing": Rule(is_mix, "MIXES have every backward", only_ci=True),
    "test_loss_op.py::test_label_dtypes_and_ignore_index": Rule(
        lambda case, dtype, ignore_index, **_: (
            is_mix(case) and (ignore_index == -100 or dtype == torch.int64 or (dtype == torch.uint8 and not case.bcl))
        ),
        "each type of labels is widened when it is loaded, whatever is ignored",
    ),
    "test_loss_op.py::test_rows_wider_than_a_tile": Rule(
        lambda case, size, **_: size[1] <= 1450 or "ohem" in case.options,
        "one size with many columns, not of all terms",
        only_ci=True,
    ),
    "test_loss_op.py::test_huge_logits": Rule(
        lambda case, scale, **_: is_mix(case) and scale != 1e8, "the smallest and the largest"
    ),
    "test_lmfm.py::test_module_equals_pytorch": Rule(
        lambda size, channels_last, **_: size == (2, 2) or (size == (6, 8) and not channels_last),
        "the suite runs the ops at more sizes",
    ),
    "test_lmfm.py::test_compile_fullgraph": Rule(
        lambda module, training, **_: module is LMFM and training, "the graph is that of the other backends"
    ),
    "test_lmfm.py::test_compile_with_inductor": Rule(lambda **_: False, "the code around the op is that of the others"),
}


def left_out(items: Sequence[pytest.Item], everything: bool) -> dict[str, list[pytest.Item]]:
    """What does not run, by the reason why. everything: whether CI runs, or a test that somebody named."""
    found: dict[str, list[pytest.Item]] = defaultdict(list)
    functions: dict[tuple[Any, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        backend = parameters(item).get("backend")
        runs = backend is None or backend.why_not() is None
        if backend is not None and backend.interpreted and not on_the_interpreter(item):
            found[INTERPRETER].append(item)
        elif is_emulated_beside_ptx(item) and not runs_every_kernel(item):
            found[EMULATOR].append(item)
        elif not everything and (item.get_closest_marker("thorough") or is_slow(item)):
            found[ONLY_CI].append(item)
        else:
            functions[item.path, item.parent, getattr(item, "originalname", item.name), runs].append(item)
    if not everything:
        for same in functions.values():
            kept = set(cover([parameters(item) for item in same]))
            found[ONLY_CI] += [item for i, item in enumerate(same) if i not in kept]
    return found


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def is_slow(item: pytest.Item) -> bool:
    """Whether a case takes another way through the same kernels, on a backend where each takes long; or takes long on
    the interpreter in any case; or runs on the emulator, where nvcc's own output runs beside it."""
    given = parameters(item)
    if is_emulated_beside_ptx(item):
        return True
    name = given["backend"].name if "backend" in given else ""
    slow = name in ("emulated", "ptx", "triton") or item.path.name == "test_triton.py"
    if slow and not runs_every_kernel(item):
        return True
    return name == "triton" and given["backend"].interpreted and rule_of(item).only_ci


def is_emulated_beside_ptx(item: pytest.Item) -> bool:
    backend = parameters(item).get("backend")
    return backend is not None and backend.name == "emulated" and ptx.why_not() is None


def runs_every_kernel(item: pytest.Item) -> bool:
    """Whether a test has no case of an op, or one of those that between them run every kernel."""
    case = parameters(item).get("case")
    return case not in CASES or case.name in EVERY_KERNEL


def on_the_interpreter(item: pytest.Item) -> bool:
    return rule_of(item).runs(**parameters(item))


def rule_of(item: pytest.Item) -> Rule:
    name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
    return INTERPRETED.get(name, USUAL)


def cover(choices: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Pairwise testing: the indices of few choices of parameters that have every pair of values that there is."""
    pairs = []
    for choice in choices:
        values = [(name, str(getattr(value, "name", value))) for name, value in choice.items()]
        pairs.append(set(combinations(values, min(2, len(values)))))
    missing = set().union(*pairs)
    best = [(-len(each), i) for i, each in enumerate(pairs)]  # the one with most pairs that are missing comes first
    heapify(best)
    while missing:
        _, i = heappop(best)
        new = pairs[i] & missing
        if best and -len(new) > best[0][0]:
            heappush(best, (-len(new), i))
        else:
            missing -= new
            yield i
