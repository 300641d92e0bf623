"""Triton's interpreter, mended for the tests: it cuts fp32 off to bf16, where GPUs round to nearest; it keeps integers
from 2^31 to 2^32 as unsigned ones and then shifts them as negative ones; and most of its time goes into what it makes
anew for each operation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    round_to_bfloat16()
    keep_integers_positive()
    wrap_the_language_once()
    remember_types()
    look_for_overflow(False)


def round_to_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_exactly(self: Any, value: Any, to: Any) -> Any:
        kinds = value.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(value.data).bfloat16().view(torch.uint16).numpy()
        elif kinds == (tl.bfloat16, tl.float32):
            data = (value.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cast(self, value, to)
        return interpreter.TensorHandle(data, kinds[1])

    builder.cast_impl = cast_exactly


def keep_integers_positive() -> None:
    convert = interpreter._implicit_cvt

    def convert_exactly(argument: Any) -> Any:
        found = convert(argument)
        if isinstance(argument, int) and 2**31 <= argument < 2**32:
            found.handle.data = found.handle.data.astype(np.int64)
        return found

    interpreter._implicit_cvt = convert_exactly


def wrap_the_language_once() -> None:
    """A jitted function that another one calls finds triton.language wrapped already."""
    wrap, wrapped = interpreter._patch_lang, set()

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

    interpreter._patch_lang = wrap_once


def remember_types() -> None:
    """NumPy's dtype of each of Triton's, and what blocks of one shape and type have in common."""
    dtypes: dict[str, np.dtype] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    np_dtype, block_type, tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__

    def np_dtype_once(kind: Any) -> np.dtype:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype(kind)
        return dtypes[name]

    def block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        if key not in blocks:
            block_type(self, element_ty, shape)
            tensor_of_known_type(tl.tensor.__new__(tl.tensor), None, self)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor_of_known_type(self: Any, handle: Any, type: Any) -> None:
        known = vars(type).get("of_a_tensor")
        if known is None:
            tensor(self, None, type)
            type.of_a_tensor = known = dict(vars(self))
        vars(self).update(known, handle=handle)

    interpreter._get_np_dtype = np_dtype_once
    tl.block_type.__init__, tl.tensor.__init__ = block_type_once, tensor_of_known_type


def look_for_overflow(asked: bool) -> None:
    """In each sum of integers, which tests of 64-bit offsets want and others do without."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=asked, debug=asked)
