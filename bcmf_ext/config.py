"""Every knob of a training run: its flag, its meaning, and its default for each dataset."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn

from .data import DATASETS, SegmentationDataset
from .dispatch import IMPLS
from .errors import FileError, UserError, briefly
from .losses.criterion import ExtraLoss, SegmentationCriterion
from .losses.rmi_loss import RMILoss
from .models import NETWORKS
from .options import BCL, CPG, CPG_WEIGHTS, FIRST_TERMS, OHEM

SMALLEST_CROP, LARGEST_CROP = 64, 1 << 15  # The deepest feature map of our networks is at 1/64.
RMI_WEIGHT = 0.5  # That of the CPG paper, beside binary cross-entropies.
MOST = 1000  # A weight, rate, factor or number of processes above this can only be a slip.


def knob(
    meaning: str, default: Any = None, *, by_dataset: bool = False, resumable: bool = False, **argument: Any
) -> Any:
    """A field of `Config`: what it means, its default, and how argparse reads its flag.

    by_dataset: the default is that of the data set's recipe. resumable: `--resume` accepts another value, because it
    changes where or how the run is computed, not what is learnt.
    """
    metadata = {"meaning": meaning, "resumable": resumable, "argument": argument}
    return field(default=MISSING if by_dataset else default, metadata=metadata)


def _layout(dataset: type[SegmentationDataset]) -> str | None:
    """The content of a data set's folder, as help for the flag; None where it has none."""
    if dataset.layout is None:
        return None
    otherwise = f" (${dataset.root_variable} when left out)" if dataset.root_variable else ""
    return f"for {dataset.name} with {dataset.layout}{otherwise}"


def dataset_options(config: Config) -> dict[str, Any]:
    """The arguments of `open_dataset` beside name, root and split, also those that the data set refuses if given."""
    options = dict.fromkeys(option for dataset in DATASETS.values() for option in dataset.options)
    return {option: getattr(config, option) for option in options}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a training run. Every field is the flag of the same name; a `UserError` says what cannot be."""

    dataset: str = knob("what to train on; demo draws its own street scenes", "demo", choices=tuple(DATASETS))
    data_root: str | None = knob(
        "the dataset's folder: " + "; ".join(filter(None, map(_layout, DATASETS.values()))),
        resumable=True,
        metavar="DIR",
    )
    reduce_zero_label: bool = knob("folder: ignore label 0 and count the others from 0", False, action="store_true")
    ignore_label: int | None = knob("folder: ignore this id in the labels, besides 255", type=int, metavar="ID")
    binary_masks: bool = knob("folder: two classes, 0 and 255 (or 1) in the labels", False, action="store_true")
    label_suffix: str | None = knob(
        "folder: what labels have behind the image's name, such as _mask; nothing when left out", metavar="SUFFIX"
    )
    model: str = knob("network", "bcmfnet", choices=tuple(NETWORKS))
    pretrained: str | None = knob("weights to start from, matched by name", metavar="PATH")
    name: str | None = knob("name of the run; DATASET-MODEL when left out", resumable=True)
    output_dir: str = knob("where runs are kept", "runs", resumable=True, metavar="DIR")

    epochs: int = knob("passes over the training split", by_dataset=True, type=int)
    batch_size: int = knob("images per step", by_dataset=True, type=int, aliases=("-b",))
    lr: float = knob(
        "highest learning rate; with another --batch-size, in proportion to it when left out",
        by_dataset=True,
        type=float,
    )
    power: float = knob("the rate falls as (1 - iteration / iterations) ** power", 0.9, type=float)
    warmup: int | None = knob(
        "iterations of linear warm-up; min(200, 5 %% of all) when left out", type=int, metavar="ITERATIONS"
    )
    momentum: float = knob("SGD's momentum", 0.9, type=float)
    weight_decay: float = knob("SGD's weight decay, on every parameter", 5e-4, type=float, aliases=("--wd",))

    crop_size: tuple[int, int] = knob(
        "size of the training crops", by_dataset=True, type=int, nargs=2, metavar=("H", "W")
    )
    scale_range: tuple[float, float] = knob(
        "training images are resized by a random factor", by_dataset=True, type=float, nargs=2, metavar=("LO", "HI")
    )
    workers: int | None = knob(
        "processes that load data; by the number of cores when left out", type=int, resumable=True, aliases=("-j",)
    )

    loss: str = knob("first term: ce over all classes, or bce of each class by itself", "ce", choices=FIRST_TERMS)
    ohem: float | None = knob(
        "average the cross-entropy over hard pixels only: those below probability THETA "
        f"({OHEM.threshold} when not given)",
        type=float,
        nargs="?",
        const=OHEM.threshold,
        metavar="THETA",
    )
    bcl: float = knob("weight of the boundary corrected loss; 0: off", BCL.weight, type=float, metavar="LAMBDA")
    cpg: float | None = knob(
        "weight of the CPG loss; 0: off; when left out "
        + ", ".join(f"{weight:g} for kernel size {size}" for size, weight in CPG_WEIGHTS.items()),
        type=float,
        nargs="?",
        metavar="LAMBDA",
    )
    cpg_kernel: int = knob("kernel size of the CPG loss", CPG.kernel_size, type=int, choices=tuple(CPG_WEIGHTS))
    rmi: float = knob(
        f"weight of the RMI loss, in plain PyTorch; without a number {RMI_WEIGHT:g}; 0: off",
        0.0,
        type=float,
        nargs="?",
        const=RMI_WEIGHT,
        metavar="LAMBDA",
    )
    extra_loss: tuple[str, ...] = knob(
        "losses of your own beside these: NAME in FILE.py, a function of logits and labels or a module, times WEIGHT",
        (),
        nargs="+",
        metavar="FILE.py:NAME=WEIGHT",
    )
    aux_weight: float = knob("weight of the auxiliary head's first term", 0.4, type=float)
    loss_warmup: int = knob(
        "iterations in which the weights of all losses but the first grow from 0, linearly",
        0,
        type=int,
        metavar="ITERATIONS",
    )
    log_grad_share: int = knob(
        "take each loss term's share of the gradient every so many iterations, and log an epoch's means; 0: never",
        0,
        type=int,
        resumable=True,
        metavar="ITERATIONS",
    )

    amp: str = knob(
        "autocast; auto: where the device is fast at it",
        "auto",
        choices=("auto", "bf16", "fp16", "off"),
        resumable=True,
    )
    channels_last: bool = knob("NHWC memory layout", True, action=argparse.BooleanOptionalAction, resumable=True)
    compile: bool = knob(
        "torch.compile the network: minutes at the start, then faster steps",
        False,
        action=argparse.BooleanOptionalAction,
        resumable=True,
    )
    impl: str = knob("which implementation of the losses", "auto", choices=("auto", *IMPLS), resumable=True)
    seed: int = knob("of the weights, the order and the augmentation", 0, type=int)
    device: str | None = knob("cpu, cuda, cuda:1, …; the first GPU, or the CPU, when left out", resumable=True)
    eval_interval: int = knob("epochs between evaluations; the last is always evaluated", 1, type=int, resumable=True)

    def __post_init__(self) -> None:
        if self.batch_size == 1:
            raise UserError(
                "--batch-size 1 cannot train: a network's global pool leaves batch norm a single value per channel; "
                "use 2 or more."
            )
        low, high = self.scale_range
        ignored, suffix = self.ignore_label, self.label_suffix
        for flag, value, holds, must in (
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("batch-size", self.batch_size, self.batch_size >= 2, "at least 2"),
            ("name", self.name, self.name != "", "a name, not empty"),
            ("ignore-label", ignored, ignored is None or 0 <= ignored < 1 << 16, "an id from 0 to 65535"),
            (
                "label-suffix",
                suffix,
                suffix is None or (suffix and not set("/\0") & set(suffix)),
                "a part of a file name",
            ),
            ("lr", self.lr, 0 < self.lr <= MOST, f"above 0, and at most {MOST}"),
            ("power", self.power, 0 <= self.power <= MOST, f"at least 0, and at most {MOST}"),
            ("warmup", self.warmup, self.warmup is None or self.warmup >= 0, "at least 0"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight-decay", self.weight_decay, 0 <= self.weight_decay <= MOST, f"at least 0, and at most {MOST}"),
            (
                "crop-size",
                self.crop_size,
                all(SMALLEST_CROP <= side <= LARGEST_CROP for side in self.crop_size),
                f"from {SMALLEST_CROP} to {LARGEST_CROP} on each side",
            ),
            ("scale-range", self.scale_range, 0 < low <= high <= MOST, "two factors above 0, the lower one first"),
            ("workers", self.workers, self.workers is None or 0 <= self.workers <= MOST, f"from 0 to {MOST}"),
            ("ohem", self.ohem, self.ohem is None or 0 < self.ohem < 1, "a probability between 0 and 1"),
            ("bcl", self.bcl, 0 <= self.bcl <= MOST, f"at least 0, and at most {MOST}"),
            ("cpg", self.cpg, self.cpg is None or 0 <= self.cpg <= MOST, f"at least 0, and at most {MOST}"),
            ("rmi", self.rmi, 0 <= self.rmi <= MOST, f"at least 0, and at most {MOST}"),
            ("ohem", self.ohem, self.ohem is None or self.loss == "ce", "left out beside --loss bce"),
            ("aux-weight", self.aux_weight, 0 <= self.aux_weight <= MOST, f"at least 0, and at most {MOST}"),
            ("loss-warmup", self.loss_warmup, self.loss_warmup >= 0, "at least 0"),
            ("log-grad-share", self.log_grad_share, self.log_grad_share >= 0, "at least 0"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            ("eval-interval", self.eval_interval, self.eval_interval >= 1, "at least 1"),
        ):
            if not holds:
                raise UserError(f"--{flag} is {_words(value)}, but must be {must}.")
        for entry in self.extra_loss:
            split_extra_loss(entry)

    @property
    def default_name(self) -> str:
        """The name of the run without `--name`."""
        return f"{self.dataset}-{self.model}"


def split_extra_loss(entry: str) -> tuple[str, str, float]:
    """File, name and weight of an entry of ``extra_loss``. Raises `UserError` if it is none."""
    found = re.fullmatch(r"(.+\.py):(\w+)=([\d.eE+-]+)", entry)
    try:
        weight = float(found[3]) if found else -1.0
    except ValueError:
        weight = -1.0
    if found is None or not 0 <= weight <= MOST:
        raise UserError(
            f"--extra-loss is {entry}, but must be FILE.py:NAME=WEIGHT, such as losses.py:dice=0.5, with a weight "
            f"from 0 to {MOST}."
        )
    return found[1], found[2], weight


def _words(value: Any) -> str:
    """A value as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _help(entry: Field[Any]) -> str:
    """A flag's help: its meaning and its default, or each dataset's."""
    default = str(entry.default)
    if entry.default is MISSING:
        values = {name: getattr(dataset.recipe, entry.name) for name, dataset in DATASETS.items()}
        default = ", ".join(f"{name} {_words(value)}" for name, value in values.items())
    elif entry.default in (None, ()) or isinstance(entry.default, bool):
        return entry.metadata["meaning"]
    return f"{entry.metadata['meaning']} ({default})"


def parse_flags(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the command line. Returns only the flags that were given: `Config` fields, `resume` and `check_data`."""
    parser = argparse.ArgumentParser(
        "python -m bcmf_ext.train",
        usage="%(prog)s [flags]",
        description="Trains a real-time segmentation network; without flags, on drawn street scenes.",
        argument_default=argparse.SUPPRESS,
    )
    for entry in fields(Config):
        argument = dict(entry.metadata["argument"])
        flags = [f"--{entry.name.replace('_', '-')}", *argument.pop("aliases", ())]
        if "type" in argument and "choices" not in argument:
            argument.setdefault("metavar", "N" if argument["type"] is int else "X")
        parser.add_argument(*flags, dest=entry.name, help=_help(entry), **argument)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on with a run: its folder or its last.pt, or without PATH the newest run (of --name, --dataset or "
        "--model where given)",
    )
    parser.add_argument("--check-data", action="store_true", help="check every image and label, and stop")
    given = vars(parser.parse_args(argv))
    if "extra_loss" in given:  # These become whole paths: the run may go on from another folder.
        given["extra_loss"] = [os.path.abspath(entry) for entry in given["extra_loss"]]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _knobs(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in ("resume", "check_data")}


def make_config(flags: Mapping[str, Any]) -> Config:
    """The configuration of a new run: the flags that were given, the dataset's recipe for the others.

    The recipe's learning rate follows the batch size in proportion (Goyal et al., arXiv 1706.02677): half a batch makes
    steps twice as noisy, and on CamVid training from scratch at batch 8 suffered from the rate of batch 16.
    """
    recipe = asdict(DATASETS[flags.get("dataset", "demo")].recipe)
    config = recipe | _knobs(flags)
    if "lr" not in flags and config["batch_size"] != recipe["batch_size"]:
        config["lr"] = float(f"{recipe['lr'] * config['batch_size'] / recipe['batch_size']:.3g}")
    return Config(**config)


def read_saved_config(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings that a checkpoint holds, complete: knobs may have joined since it was saved.

    Raises `FileError` if a setting is not what it can be, or unknown, as in a file of a newer version.
    """
    hints = get_type_hints(Config)
    unknown = saved.keys() - hints.keys()
    if unknown:
        raise FileError(
            f"{path} was written by a newer bcmf_ext, which has a setting {min(unknown)!r}: update the package."
        )
    for entry in fields(Config):
        if entry.name not in saved and entry.name != "dataset":
            continue
        value, choices = saved.get(entry.name), entry.metadata["argument"].get("choices")
        if not _is_of(value, hints[entry.name]):
            must = getattr(hints[entry.name], "__name__", hints[entry.name])
            raise FileError(
                f"In {path} the setting {entry.name} is {briefly(value)}, but must be {must}: take the file as the "
                "trainer wrote it."
            )
        if choices is not None and value not in choices:
            raise FileError(
                f"In {path} the setting {entry.name} is {briefly(value)}, and this version knows only "
                f"{', '.join(map(str, choices))}: update the package if the file is of a newer one."
            )
    config = asdict(make_config({"dataset": saved["dataset"]})) | dict(saved)
    try:
        Config(**config)
    except UserError as error:
        raise FileError(f"The settings in {path} cannot be: {error}") from error
    return config


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is what a field of `Config` is annotated with."""
    options = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_is_of(value, option) for option in options)
    if get_origin(hint) is tuple:
        options = options[:1] * len(value) if options[-1] is ... and isinstance(value, tuple) else options
        return isinstance(value, tuple) and len(value) == len(options) and all(map(_is_of, value, options))
    if isinstance(value, int) and abs(value) >= 2**63:  # Some of those that take it cannot hold more.
        return False
    return type(value) in ((int, float) if hint is float else (hint,))


def resumed_config(saved: Mapping[str, Any], flags: Mapping[str, Any], run: Path) -> Config:
    """The configuration of a run that goes on: as saved, but for what may change without changing what is learnt."""
    given = _knobs(flags)
    if saved["extra_loss"] and given.get("extra_loss") != saved["extra_loss"]:  # A checkpoint alone must not run code.
        raise UserError(
            f"{run} was trained with --extra-loss {_words(saved['extra_loss'])}, which is code that a checkpoint does "
            "not hold: give the same flag again."
        )
    for entry in fields(Config):
        old, new = saved[entry.name], given.get(entry.name, saved[entry.name])
        if entry.metadata["resumable"] or new == old:
            continue
        flag = entry.name.replace("_", "-")
        before = "left out" if old is None or old is False else _words(old)
        raise UserError(
            f"{run} was trained with --{flag} {before}, not {_words(new)}, and resuming keeps a run's settings: "
            f"leave --{flag} out, or start another run with --pretrained {shlex.quote(str(run / 'best.pt'))}."
        )
    place = {"name": run.name, "output_dir": str(run.parent)}
    return Config(**{**saved, **given, **place})


def command_line(config: Config) -> str:
    """The command that asks for this configuration with every knob spelt out, as the log shows it."""
    words = ["python -m bcmf_ext.train"]
    for name, value in asdict(config).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("channels_last", "compile"):  # These can be switched off.
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False and value != ():
            values = value if isinstance(value, tuple) else (value,)
            quoted = [shlex.quote(str(v)) for v in values]
            is_flag = isinstance(value, str) and value.startswith("-")  # argparse would take it for a flag.
            words.append(f"{flag}={quoted[0]}" if is_flag else " ".join([flag, *quoted]))
    # Each flag is one word here, so that no line breaks between a flag and its value.
    glued = " ".join(word.replace(" ", "\0") for word in words)
    lines = textwrap.wrap(glued, 100, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")


# --------------------------------------------------------------------------------------------------------------------
# The loss that the flags ask for


def make_criterion(config: Config) -> SegmentationCriterion:
    """The loss of a run. Raises `UserError` if an extra loss is not there, or is none."""
    ohem = None
    if config.ohem is not None:
        # The usual 131072 pixels are 1/64 of a batch of eight 1024×1024 crops: keep that share of other batches.
        pixels = config.batch_size * config.crop_size[0] * config.crop_size[1]
        ohem = OHEM(config.ohem, min_kept=pixels // 64)
    cpg = None
    if config.cpg != 0:
        cpg = CPG(kernel_size=config.cpg_kernel) if config.cpg is None else CPG(config.cpg, config.cpg_kernel)
    return SegmentationCriterion(
        ohem=ohem,
        bcl=BCL(config.bcl) if config.bcl > 0 else None,
        cpg=cpg,
        first=config.loss,
        extra=extra_losses(config),
        aux_weight=config.aux_weight,
        impl=config.impl,
    )


def extra_losses(config: Config) -> dict[str, tuple[float, ExtraLoss]]:
    """The RMI loss and those of `--extra-loss`. Raises `UserError` if one of the latter is not there, or is none."""
    losses = load_extra_losses(config.extra_loss)
    if config.rmi > 0:
        if "rmi" in losses:
            raise UserError("--extra-loss names a loss rmi, as --rmi does: give it another name.")
        losses = {"rmi": (config.rmi, RMILoss()), **losses}
    return losses


def load_extra_losses(entries: Sequence[str]) -> dict[str, tuple[float, ExtraLoss]]:
    """The losses of `--extra-loss`, by their names. Raises `UserError` if one is not there, or is none."""
    losses: dict[str, tuple[float, ExtraLoss]] = {}
    for entry in entries:
        file, name, weight = split_extra_loss(entry)
        if not os.path.isfile(file):
            raise UserError(f"--extra-loss {entry}: there is no file {file}, check the path.")
        try:
            found = runpy.run_path(file).get(name)
            loss: Any = found() if isinstance(found, type) and issubclass(found, nn.Module) else found
        except (Exception, SystemExit) as error:  # The user's code may raise anything.
            raise UserError(f"--extra-loss {entry}: {file} fails with {type(error).__name__}: {error}") from error
        if not callable(loss):
            raise UserError(f"--extra-loss {entry}: {file} has no function or module {name}, check the name.")
        if name in losses:
            raise UserError(f"--extra-loss names {name} twice: give each loss a name of its own.")
        losses[name] = weight, loss
    try:
        SegmentationCriterion(extra=losses)
    except ValueError as error:  # The name is that of a term of ours.
        raise UserError(f"--extra-loss {' '.join(entries)}: {error}") from error
    return losses


def try_extra_losses(criterion: SegmentationCriterion, classes: int, device: torch.device) -> None:
    """Calls each extra loss once, before hours of training. Raises `UserError` if one fails, or gives no scalar."""
    if not criterion.extra:
        return
    logits = torch.zeros(2, classes, 64, 64, device=device, requires_grad=True)
    labels = torch.arange(2 * 64 * 64, device=device).view(2, 64, 64) // 64 % classes
    try:
        criterion.terms(logits, labels)
    except Exception as error:  # The user's code may raise anything.
        names = " and ".join(criterion.extra)
        raise UserError(f"--extra-loss fails on a trial ({names}), {type(error).__name__}: {error}") from error
