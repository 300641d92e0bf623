"""Weights from public checkpoints, loaded by name, with a report of what fitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FileError, briefly
from .foreign import read_foreign

# Trainers keep the state dict under these names. Averaged weights come first: they are the better start.
_WRAPPERS = (
    "state_dict_ema",  # timm
    "model_ema",  # torchvision, DeiT
    "ema_state_dict",
    "ema_model",
    "ema_net",  # SuperGradients
    "params_ema",  # BasicSR
    "ema",  # RT-DETR
    "state_dict",  # Lightning, HRNet, MMEngine
    "model_state_dict",  # PyTorch's tutorials, Catalyst
    "model_state",  # OpenPCDet, SlowFast
    "model",  # torchvision, Detectron2, fastai
    "module",  # DeepSpeed
    "network_weights",  # nnU-Net
    "network",
    "net",  # SuperGradients
    "params",  # BasicSR
    "weights",
    "weight",
)
# Trainers, and PyTorch's own wrappers of networks, put these into names; no network here has parts of such names.
_WRAPPER_PARTS = {
    "module",  # DataParallel, DistributedDataParallel, AveragedModel
    "model",
    "network",
    "net",
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning Fabric
    "_module",  # Opacus
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors, sorted by how they fared; ``str(report)`` is what the commands print.

    source: the file's name.
    matched: loaded.
    missing: in the model only; they keep their initial values.
    other_shape: in both, as name -> (shape in the file, shape in the model); they keep their initial values.
    unexpected: in the file only; left out.
    """

    source: str
    matched: list[str]
    missing: list[str]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: list[str]

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.other_shape)
        lines = [
            f"{self.source}: {len(self.matched)} of the model's {total} tensors matched, {len(self.missing)} missing, "
            f"{len(self.other_shape)} of other shape; {len(self.unexpected)} unexpected"
        ]
        if self.missing:
            lines.append(f"  missing, stay as initialised: {_grouped(self.missing)}")
        if self.other_shape:
            lines.append(f"  other shape, stay as initialised: {_grouped(self.other_shape)}")
            name, (theirs, ours) = max(self.other_shape.items(), key=lambda item: len(item[1][0]))
            lines.append(f"    for example {name}: {theirs} in the file, {ours} in the model")
        if self.unexpected:
            lines.append(f"  unexpected, left out: {_grouped(self.unexpected)}")
        return "\n".join(lines)


def load_pretrained(model: nn.Module, path: str | Path) -> LoadReport:
    """Copy into ``model`` every tensor of the checkpoint ``path`` whose name and shape fit, and report on the rest.

    Files of ``torch.save`` and safetensors are read, so that they cannot run code. The state dict is the first that
    fits of those that lie where public trainers put them (``ema`` before ``model``), or the file itself. Names are
    compared without the parts that wrappers put into them, such as ``module.`` and ``_orig_mod.``, and if none fits
    then, without a beginning of any other name, such as ``backbone.``. A head for another number of classes is "other
    shape".

    Raises FileError if the file cannot be read, is no checkpoint, has two tensors for one name, weights that are not
    finite or not floating-point, or if nothing in it fits the model.
    """
    path = Path(path)
    content, ours = read_foreign(path), model.state_dict()
    others: dict[str, Tensor] = {}
    for state_dict in _state_dicts(content):
        theirs = _named_as(state_dict, ours, path)
        if fits := _fitting(theirs, ours):
            break
        others = max(others, theirs, key=len)
    else:
        raise _nothing_fits(content, others, ours, path)

    matched = {name: _usable(name, theirs[name], ours[name], path) for name in fits}
    model.load_state_dict(matched, strict=False)
    return LoadReport(
        source=path.name,
        matched=fits,
        missing=[name for name in ours if name not in theirs and _decisive(name) not in matched],
        other_shape={
            name: (tuple(theirs[name].shape), tuple(ours[name].shape))
            for name in ours
            if name in theirs and name not in matched
        },
        unexpected=[name for name in theirs if name not in ours],
    )


def _state_dicts(content: object, depth: int = 4) -> Iterator[dict[str, Tensor]]:
    """The tensors by name that lie in a checkpoint where trainers put them, the best start first."""
    if not isinstance(content, dict) or depth == 0:
        return
    # A file can give its dicts and tensors attributes that hide their methods: hence we call dict's own, and detach.
    entries = dict(dict.items(content))
    about, wrappers = entries.get("meta"), list(_WRAPPERS)
    if isinstance(about, dict) and "mmengine_version" in about:
        wrappers.insert(0, "state_dict")  # MMEngine's averaged weights are here, the others in ema_state_dict.
    for wrapper in wrappers:
        yield from _state_dicts(entries.get(wrapper), depth - 1)
    if tensors := {name: Tensor.detach(t) for name, t in entries.items() if isinstance(name, str) and _is_tensor(t)}:
        yield tensors


def _is_tensor(value: object) -> bool:
    """A tensor that has a shape and values."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_nested
    )


def _named_as(theirs: dict[str, Tensor], ours: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Their tensors, under the model's names where these differ in wrappers only."""
    own = {_bare(name): name for name in ours}
    beginning = _beginning(theirs, {bare: ours[name] for bare, name in own.items()}, path)
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in theirs.items():
        bare = _bare(name)
        key = own.get(bare.removeprefix(beginning), bare)
        if key in ours and key in named and not _same(tensor, named[key]):
            raise FileError(
                f"{path} has two different tensors for {key}, {origin[key]} and {name}: save the weights of one "
                "network alone, and give those."
            )
        named[key], origin[key] = tensor, name
    return named


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _beginning(theirs: dict[str, Tensor], ours: dict[str, Tensor], path: Path) -> str:
    """The beginning of all names that would fit without it, such as ``backbone.``; nothing if some fit as they are."""
    found = set()
    for name, tensor in theirs.items():
        parts = _bare(name).split(".")
        for cut in range(min(len(parts), 8)):
            rest = ".".join(parts[cut:])
            if rest in ours and ours[rest].shape == tensor.shape and tensor.dim() > 0:  # Counters fit anything.
                found.add("".join(f"{part}." for part in parts[:cut]))
    if "" in found or not found:
        return ""
    if len(found) > 1:
        shown = ", ".join(briefly(beginning) for beginning in sorted(found)[:3])
        raise FileError(
            f"{path} has weights for this model under more than one name ({shown}): save those of one alone, and give "
            "them."
        )
    return found.pop()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _decisive(name: str) -> str:
    """The tensor that decides whether this one fits: a batch norm's counter follows its statistics. Alone, without a
    shape, it would fit any network of similar names, and PyTorch before 0.4.1 did not write it."""
    return name.replace("num_batches_tracked", "running_mean")


def _fitting(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    fits = {name for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    return [name for name in ours if name in fits and _decisive(name) in fits]


def _usable(name: str, theirs: Tensor, ours: Tensor, path: Path) -> Tensor:
    """Their weights in the model's dtype. Raises `FileError` if they are others there, as quantised ones, which need a
    scale, would be, or not finite: such a network gives class 0 everywhere, as if it knew."""
    if theirs.dtype not in (_FLOATS if ours.is_floating_point() else _NUMBERS):
        raise FileError(
            f"In {path} {name} is {briefly(theirs)}, but only float16, bfloat16, float32 and float64 can be loaded: "
            "convert the weights where the file was made."
        )
    tensor = theirs.to(ours.dtype)
    if not tensor.isfinite().all():
        raise FileError(
            f"The weights in {path} are not finite ({name}): nothing can be trained from them, give another checkpoint."
        )
    return tensor


def _nothing_fits(content: object, theirs: dict[str, Tensor], ours: dict[str, Tensor], path: Path) -> FileError:
    """Where the weights are instead, or what is there."""
    entries = dict(dict.items(content)) if isinstance(content, dict) else {}
    for key, value in entries.items():
        if any(_fitting(_named_as(state_dict, ours, path), ours) for state_dict in _state_dicts(value)):
            return FileError(
                f"{path} holds weights that fit under {briefly(key)}, where no trainer is known to put them: save them "
                f'alone, torch.save(checkpoint[{briefly(key)}], "…"), and give those.'
            )
    if theirs:
        return FileError(
            f"Nothing in {path} fits this model: the file has {_examples(theirs)}, the model has {_examples(ours)}; "
            "is it a checkpoint of another network?"
        )
    keys = ", ".join(briefly(key) for key in list(entries)[:8] if isinstance(key, str))
    return FileError(
        f"{path} holds no tensors by name{f', only {keys}' if keys else ''}, so it is not a checkpoint of a model "
        "(neither NumPy arrays nor sparse or meta tensors count): give another file."
    )


def _grouped(names: Iterable[str], limit: int = 8) -> str:
    """``spp.scale0 (6), final_layer.conv2 (2)``: the names by their first part, each group under its common prefix."""
    groups = defaultdict(list)
    for name in names:
        groups[name.partition(".")[0]].append(name.split("."))
    shown = []
    for group in groups.values():
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*group, strict=False))
        shown.append(".".join(parts[0] for parts in shared) + (f" ({len(group)})" if len(group) > 1 else ""))
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more groups" if len(shown) > limit else "")


def _examples(tensors: Mapping[str, Tensor]) -> str:
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3]]
    return ", ".join(shown) + (", …" if len(tensors) > 3 else "")
