"""Checks that every loss begins with: shapes, dtypes and devices, labels, and whether values may be looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Kernels read labels of the four LABEL_DTYPES where they are; others are converted first.
_READ_AS = {torch.bool: torch.uint8, torch.int8: torch.int16, torch.uint16: torch.int32}
_READ_AS |= {torch.uint32: torch.int64, torch.uint64: torch.int64}
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def read_labels(target: Tensor) -> Tensor:
    """Labels (N, H, W), or (N, 1, H, W), as (N, H, W) in one of LABEL_DTYPES, if they are bool or integers."""
    if target.dim() == 4 and target.shape[1] == 1:
        target = target.squeeze(1)
    return target.to(_READ_AS.get(target.dtype, target.dtype))


def check_inputs(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The target as `read_labels` gives it. Raises TypeError or ValueError unless shapes, dtypes and devices are those
    that docs/definitions.md says under Conventions."""
    if not isinstance(logits, Tensor):
        of_heads = isinstance(logits, (tuple, list, Mapping))
        hint = ": of the outputs of several heads, SegmentationCriterion makes one loss" * of_heads
        raise TypeError(f"logits are a tensor, not a {type(logits).__name__}{hint}.")
    for name, tensor in (("target is", target), ("class weights are", weight)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} a tensor, not a {type(tensor).__name__}.")
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"logits are floating point (fp16, bf16, fp32, fp64), not {logits.dtype}.")
    shape, target = tuple(target.shape), read_labels(target)
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"target holds class ids, bool or of an integer dtype, not {target.dtype}.")
    if logits.dim() != 4 or logits.shape[1] < 2:
        raise ValueError(f"logits have the shape (N, C, h, w) with C >= 2, not {tuple(logits.shape)}.")
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"target has the shape (N, H, W), or (N, 1, H, W), with the logits' N = {logits.shape[0]}, not {shape}."
        )
    if target.numel() > 0 and logits.numel() == 0:
        raise ValueError(f"logits of the shape {tuple(logits.shape)} cannot be resampled to {tuple(target.shape)}.")
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and target on {target.device}: move one of them.")
    if weight is not None:
        if not weight.is_floating_point():
            raise TypeError(f"class weights are floating point, not {weight.dtype}.")
        if weight.shape != logits.shape[1:2]:
            raise ValueError(
                f"class weights have one entry for each of the {logits.shape[1]} classes, not {tuple(weight.shape)}."
            )
        if weight.requires_grad:
            raise ValueError("class weights get no gradient: pass weight.detach().")
        if weight.device != logits.device:
            raise ValueError(f"logits are on {logits.device} and class weights on {weight.device}: move one of them.")
    return target


def describe_bad_labels(target: Tensor, num_classes: int, ignore_index: int) -> str:
    """The sentence for labels that are neither a class nor ignore_index."""
    values = torch.unique(target.long())
    bad = [v for v in values.tolist() if v != ignore_index and not 0 <= v < num_classes]
    if not bad:  # Somebody else writes to the target meanwhile.
        return "target held ids that are neither a class nor ignore_index; it has changed since."
    shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
    sentence = (
        f"target holds {shown}, but the logits have classes 0..{num_classes - 1} and ignore_index is {ignore_index}"
    )
    if num_classes == 19 and max(bad) <= 33 and min(bad) >= -1:
        sentence += "; these look like Cityscapes label ids: map them to train ids"
    elif bad == [255]:
        sentence += "; if 255 marks ignored pixels, pass ignore_index=255"
    return sentence + "."


def is_traced(tensor: Tensor) -> bool:
    """Whether what is computed must not depend on values: under torch.func, torch.jit.trace and in exports, and of
    meta tensors, which have none."""
    if (
        torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    ):  # The questions below would break the graph.
        return False
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    return exporting or tensor.is_meta or torch.jit.is_tracing() or in_torch_func()


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations keep their tensors' precision; where the device has no autocast, it does
    nothing."""
    device = tensor.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def in_torch_func() -> bool:
    """Whether a transform of torch.func is at work: grad, vmap, jvp, …"""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises ValueError if a label is neither a class nor ignore_index. Synchronises on CUDA."""
    labels = target.long()
    if ((labels != ignore_index) & ((labels < 0) | (labels >= num_classes))).any():
        raise ValueError(describe_bad_labels(target, num_classes, ignore_index))
