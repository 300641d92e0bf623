"""Checkpoints: what they hold, and how they are written and read.

`last.pt` holds everything needed to go on, `best.pt` the weights of the best epoch. Both also hold what predicting
needs: the configuration, classes, palette, mean, std and align_corners. Both load with `weights_only=True`.

Nothing in a file is believed: the sums of its bytes (the CRC-32s of its zip, which `torch.load` does not look at) have
to be right, and each field what `ABOUT`, `PROGRESS` and `RECORD` say.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import read_saved_config
from .errors import Damaged, FileError, briefly
from .files import cannot_be_opened, damaged_entry, write_file

VERSION = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64)


# --------------------------------------------------------------------------------------------------------------------
# Fields of a checkpoint


@dataclass(frozen=True)
class Field:
    """A field: what it must be, in words and as a test; optional: it may be missing, as in files of older versions."""

    must: str
    holds: Callable[[Any], bool]
    optional: bool = False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63  # NaN fails this, as does an endless integer.


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor that can be computed with and written to: of a plain dtype, each element in memory of
    its own."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPES
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 10**9


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and _is_tensor(v) for key, v in value.items())


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and _is_number(v) for key, v in value.items())


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 255 and all(isinstance(name, str) for name in value)


def _is_channels(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))


def _is_palette(value: Any) -> bool:
    return _is_tensor(value) and value.dtype == torch.uint8 and value.dim() == 2 and value.shape[1] == 3


def _is_optimizer(value: Any) -> bool:
    """Whether a value is the state of SGD: momentum by the parameter's number, and one group of parameters."""
    if not isinstance(value, dict) or not {"state", "param_groups"} <= value.keys():
        return False
    state, groups = value["state"], value["param_groups"]
    return (
        isinstance(state, dict)
        and all(_is_count(key) and isinstance(entry, dict) for key, entry in state.items())
        and all(v is None or _is_tensor(v) for entry in state.values() for v in [entry.get("momentum_buffer")])
        and isinstance(groups, list)
        and len(groups) == 1
        and isinstance(groups[0], dict)
        and all(_is_number(groups[0].get(rate)) for rate in ("lr", "initial_lr"))
    )


def _is_scheduler(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_is_count(value.get(name)) for name in ("last_epoch", "_step_count"))
        and all(
            isinstance(value.get(name), list) and len(value[name]) == 1 and _is_number(value[name][0])
            for name in ("base_lrs", "_last_lr")
        )
    )


COUNT = Field("a whole number of at least 0", _is_count)
NUMBER = Field("a finite number", _is_number)
SECONDS = Field("a number of at least 0, and below 10**9", _is_seconds)
WEIGHTS = Field("tensors by name", _is_tensors)
NUMBERS = Field("finite numbers by name", _is_numbers)

ABOUT: Mapping[str, Field] = {  # last.pt and best.pt have these fields.
    "version": COUNT,
    "config": Field("the settings by name", lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v)),
    "classes": Field("1 to 255 names", _is_names),
    "palette": Field("a uint8 tensor (classes, 3)", _is_palette),
    "mean": Field("three numbers", _is_channels),
    "std": Field("three numbers above 0", lambda v: _is_channels(v) and min(v) > 0),
    "align_corners": Field("True or False", lambda v: isinstance(v, bool)),
    "model": WEIGHTS,
    "bf16_ratio": Field("a number above 0, or None", lambda v: v is None or (_is_number(v) and v > 0), optional=True),
}
PROGRESS: Mapping[str, Field] = {  # last.pt has these as well.
    "train_images": COUNT,
    "optimizer": Field("the state of an SGD optimiser", _is_optimizer),
    "scheduler": Field("the state of a scheduler", _is_scheduler),
    "scaler": NUMBERS,
    "epoch": COUNT,
    "step": COUNT,
    "loss_sums": NUMBERS,
    "share_sums": Field(NUMBERS.must, NUMBERS.holds, optional=True),
    "share_steps": Field(COUNT.must, COUNT.holds, optional=True),
    "seconds": SECONDS,
    "best_miou": NUMBER,
    "best_epoch": Field("a whole number of at least -1", lambda v: _is_count(v) or (type(v) is int and v == -1)),
    "saved": Field(NUMBER.must, NUMBER.holds, optional=True),
}
RECORD: Mapping[str, Field] = {  # A line of log.jsonl has these fields.
    "epoch": Field("a whole number of at least 1", lambda v: _is_count(v) and v >= 1),
    "step": COUNT,
    "lr": NUMBER,
    "loss": Field("finite numbers by name, with a total", lambda v: _is_numbers(v) and "total" in v),
    "seconds": SECONDS,
    "images_per_second": NUMBER,
    "loss_ramp": Field(NUMBER.must, NUMBER.holds, optional=True),
    "grad_share": Field("finite numbers by name, or null", lambda v: v is None or _is_numbers(v), optional=True),
    "miou": Field(NUMBER.must, NUMBER.holds, optional=True),
    "pixel_accuracy": Field(NUMBER.must, NUMBER.holds, optional=True),
    "iou": Field(
        "numbers by name, or null",
        lambda v: isinstance(v, dict) and all(entry is None or _is_number(entry) for entry in v.values()),
        optional=True,
    ),
}


def what_is_wrong(content: Any, fields: Mapping[str, Field]) -> str | None:
    """The first field that is not as it must be, in words; None if all are."""
    if not isinstance(content, dict):
        return "it holds no fields"
    for name, field in fields.items():
        if name not in content:
            if not field.optional:
                return f"the field {name} is missing"
        elif not field.holds(content[name]):
            return f"the field {name} is {briefly(content[name])}, but must be {field.must}"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Writing and reading


def save_checkpoint(path: Path, content: dict[str, Any], older: Path | None = None) -> None:
    """Writes a checkpoint. older: the name that the one before is given, see `write_file`."""
    # This does not go straight to the file: torch's writer makes an error of its own of a full disk, or Ctrl-C.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer(), sync=True, older=older)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a `last.pt` or `best.pt`, with tensors on the CPU.

    Raises `FileError` if the file is neither, or a field is not what it must be; `Damaged`, which is one, if
    its bytes are not those that were written.
    """
    content = read_zip(path)
    if not isinstance(content, dict) or not {"version", "config", "classes", "model"} <= content.keys():
        raise FileError(
            f"{path} is not a checkpoint of this trainer (last.pt, best.pt): weights from elsewhere can be trained "
            "further with `pretrained`."
        )
    if _is_count(content["version"]) and content["version"] > VERSION:
        raise FileError(f"{path} was written by a newer bcmf_ext: update the package.")
    wrong = what_is_wrong(content, {**ABOUT, **PROGRESS} if "optimizer" in content else ABOUT)
    if wrong is not None:
        raise FileError(f"In {path} {wrong}: take the file as the trainer wrote it.")
    if len(content["palette"]) != len(content["classes"]):
        raise FileError(
            f"In {path} the field palette has {len(content['palette'])} colours for {len(content['classes'])} classes: "
            "take the file as the trainer wrote it."
        )
    check_finite(content["model"], path)
    return {**content, "config": read_saved_config(content["config"], path)}


def read_zip(path: Path) -> Any:
    """Returns what `torch.save` wrote, without running code, if its bytes are those that were written."""
    if not os.path.isfile(path):
        raise FileError(f"There is no checkpoint {path}: check the path.")
    try:
        with open(path, "rb") as file:  # It is opened once, since the trainer may write another meanwhile.
            if (damaged := damaged_entry(file)) is not None:
                raise Damaged(f"{path} is damaged, the bytes of {damaged} are not those that were written.")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise cannot_be_opened(path, error) from error
    except FileError:
        raise
    except Exception as error:  # The unpickler raises whatever the bytes lead it to.
        raise Damaged(f"{path} cannot be read as a checkpoint: it is damaged, or another kind of file.") from error


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises `FileError` if a weight is NaN or infinite: such a network gives class 0 everywhere, as if it knew."""
    odd = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise FileError(
            f"The weights in {path} are not finite ({odd[0]}{more}): nothing can be computed with them, take a "
            "checkpoint from before."
        )


def load_weights(network: nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    """Gives a network, made as the checkpoint says, its weights. Raises `FileError` if they are another network's."""
    try:
        network.load_state_dict(saved["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split()).rstrip(".")
        raise FileError(
            f"{path} says that it holds a {saved['config']['model']} of {len(saved['classes'])} classes, but its "
            f"weights are others ({reason}): take the file as the trainer wrote it."
        ) from error
