"""What all tests share. First: without a GPU, Triton's kernels are interpreted, which triton decides when imported."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import Backend

from bcmf_ext import dispatch


def mend_the_interpreter() -> None:
    """Of Triton's interpreter: it cuts fp32 off to bf16, where GPUs round to nearest; and half of its time goes into
    wrapping triton.language anew for each call of a jitted function by another, into building a table of dtypes for
    each look into it, and into looking for overflow in each sum of integers (tests of 64-bit offsets have that put on
    again)."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, wrap, wrapped = builder.cast_impl, interpreter._patch_lang, set()

    def cast_exactly(self: Any, value: Any, to: Any) -> Any:
        kinds = value.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(value.data).bfloat16().view(torch.uint16).numpy()
        elif kinds == (tl.bfloat16, tl.float32):
            data = (value.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cast(self, value, to)
        return interpreter.TensorHandle(data, kinds[1])

    @functools.cache
    def used_by(function: Any) -> set[str]:
        return {m.__name__ for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)}

    def wrap_once(function: Any) -> Any:
        missing = used_by(function) - wrapped
        if not missing:
            return interpreter._LangPatchScope()
        wrapped.update(missing)
        scope = wrap(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            wrapped.difference_update(missing)
            restore()

        scope.restore = restore_and_forget
        return scope

    by_name: dict[str, np.dtype] = {}
    look_up = interpreter._get_np_dtype

    def np_dtype(kind: Any) -> np.dtype:
        name = kind.scalar.name
        if name not in by_name:
            by_name[name] = look_up(kind)
        return by_name[name]

    builder.cast_impl, interpreter._patch_lang = cast_exactly, wrap_once
    interpreter._get_np_dtype = np_dtype
    look_for_overflow(False)


def look_for_overflow(asked: bool) -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=asked, debug=asked)


if dispatch.INTERPRETED and importlib.util.find_spec("triton"):
    mend_the_interpreter()


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    chosen: Backend = request.param
    if chosen.why_not():
        pytest.skip(str(chosen.why_not()))
    chosen.load(monkeypatch)
    return chosen


def pytest_configure(config: pytest.Config) -> None:
    """Processes that test side by side (-n) share the cores."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
