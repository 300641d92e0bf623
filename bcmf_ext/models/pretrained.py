"""Weights from public checkpoints, loaded by name, with a report of what fitted."""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import damaged_entry

# Where trainers keep the state dict, the averaged weights first: they are the better start.
_WRAPPERS = ("ema", "state_dict", "model")
# What DataParallel, a trainer's own module and torch.compile put in front of every name, stacked in any order.
_PREFIXES = re.compile(r"^(?:module\.|model\.|_orig_mod\.)+")
# HRNet's descendants store their best score as a NumPy scalar, and its pickle needs these.
_scalar: Any = np.float64(0).__reduce__()[0]
_NUMPY_SCALAR: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


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

    Known formats: a state dict, bare or under ``ema``, ``state_dict`` or ``model`` (the first of these that holds
    tensors), with the prefixes ``module.``, ``model.`` and ``_orig_mod.`` in any combination. The file is read with
    ``weights_only=True``, so that it cannot run code. A head for another number of classes is "other shape".

    Raises UserError if the file cannot be read, is no checkpoint, or if nothing in it fits the model.
    """
    path = Path(path)
    theirs, ours = _state_dict(_read(path)), model.state_dict()
    if not theirs:
        raise UserError(f"{path} holds no tensors by name, so it is not a checkpoint of a model: give another file.")

    # A batch norm's counter follows its statistics: alone, without a shape, it would fit any network of similar names,
    # and PyTorch before 0.4.1 did not write it.
    decisive = {name: name.replace("num_batches_tracked", "running_mean") for name in ours}
    fits = {name for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    matched = {name: theirs[name] for name in ours if name in fits and decisive[name] in fits}
    if not matched:
        raise UserError(
            f"Nothing in {path} fits this model: the file has {_examples(theirs)}, the model has {_examples(ours)}; "
            "is it a checkpoint of another network?"
        )
    model.load_state_dict(matched, strict=False)
    return LoadReport(
        source=path.name,
        matched=list(matched),
        missing=[name for name in ours if name not in theirs and decisive[name] not in fits],
        other_shape={
            name: (tuple(theirs[name].shape), tuple(ours[name].shape))
            for name in ours
            if name in theirs and name not in matched
        },
        unexpected=[name for name in theirs if name not in ours],
    )


def _read(path: Path) -> object:
    """The unpickled file, on the CPU."""
    if not os.path.isfile(path):
        raise UserError(f"There is no checkpoint file {path}: check the path.")
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(_NUMPY_SCALAR):
            if zipfile.is_zipfile(file) and (damaged := damaged_entry(file)) is not None:
                raise UserError(
                    f"{path} is damaged, the bytes of {damaged} are not those that were written: get the file again."
                )
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be opened ({error.strerror}): check its permissions.") from error
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        if refused := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds a Python object ({refused[1]}) beside its weights, and reading it could run code: where "
                'the file was made, save the weights alone, torch.save(checkpoint["state_dict"], …), and load that.'
            ) from error
        raise UserError(
            f"{path} cannot be read as a PyTorch checkpoint, it is damaged or of another format: download or save it "
            "again."
        ) from error


def _state_dict(checkpoint: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrappers and prefixes."""
    if not isinstance(checkpoint, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        if inner := _state_dict(checkpoint.get(wrapper)):
            return inner
    return {_PREFIXES.sub("", str(name)): value for name, value in checkpoint.items() if isinstance(value, Tensor)}


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
