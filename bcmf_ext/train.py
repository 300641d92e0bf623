"""Trains a network: python -m bcmf_ext.train [flags].

A run lives in one folder: last.pt (to go on from), best.pt (to use), log.jsonl, curves.png and pictures/.
"""

from __future__ import annotations

import contextlib
import math
import os
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from . import dispatch
from .checkpoint import save_checkpoint
from .config import (
    Config,
    command_line,
    dataset_options,
    make_config,
    parse_flags,
    resumed_config,
    split_extra_loss,
)
from .data import MEAN, STD, Augmentation, EpochSampler, EvalSamples, SegmentationDataset, TrainSamples, open_dataset
from .engine import (
    Compute,
    LoadingProcessDied,
    NonFiniteLoss,
    StopSignals,
    TrainState,
    bf16_ratio_of,
    choose_device,
    choose_dtype,
    choose_workers,
    close_loader,
    evaluate,
    loss_ramp,
    lr_factor,
    make_loader,
    train_one_epoch,
)
from .errors import UserError, command, run_command, sentence_of, warn
from .files import short_name
from .losses.criterion import SegmentationCriterion
from .metrics import ConfusionMatrix
from .models import NETWORKS, load_pretrained
from .options import BCL, CPG, OHEM
from .report import absent_line, draw_curves, draw_sample, loss_line, score_lines, scores, share_lines
from .run import Run, begin_run, resume_run

PICTURES = 4  # val samples drawn after each evaluation
Evaluation = tuple[ConfusionMatrix, dict[int, np.ndarray]]
BAR = "{desc} |{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, checks the data, and trains. `UserError` for what the user can mend."""
    flags = parse_flags(argv)
    config = make_config(flags)
    if "resume" not in flags:
        return train(config, flags)
    named = config.default_name if {"dataset", "model"} & flags.keys() else None
    run, saved = resume_run(flags["resume"], config.output_dir, config.name, named)
    with contextlib.closing(run):
        config = resumed_config(saved["config"], flags, run.folder)
        if saved["epoch"] < config.epochs or "check_data" in flags:
            return train(config, flags, run, saved)
        print(f"{run.folder} is finished, all {config.epochs} epochs are done: best mIoU {saved['best_miou']:.3f}")
        if wrong := run.what_is_wrong_with_best():
            print(f"but its weights are gone: {wrong.rstrip('.')}; {run.last} has those of the last epoch.")


def train(
    config: Config, flags: Mapping[str, Any], run: Run | None = None, saved: dict[str, Any] | None = None
) -> None:
    """Checks the data and trains: a new run, or one that goes on from what was saved."""
    train_set, val_set = (
        open_dataset(config.dataset, config.data_root, split, **dataset_options(config)) for split in ("train", "val")
    )
    for dataset in (train_set, val_set):
        pixels = dataset.check()
        if "check_data" in flags:
            print(f"{dataset.protocol}\n{share_lines(pixels, dataset.classes)}")
        elif dataset is train_set:
            print(absent_line(pixels, dataset.classes), end="")
    if "check_data" in flags:
        print("all images and labels can be used")
        return
    trainer = Trainer(config, train_set, val_set, run, saved)
    with contextlib.closing(trainer.run):
        print(trainer.describe())
        trainer.train()


class Trainer:
    """A run: network, loss, optimiser, data and folder, and the loop over them.

    run, saved: a run's folder and the content of its `last.pt`, from which it goes on exactly; a new one if None.
    """

    def __init__(
        self,
        config: Config,
        train_set: SegmentationDataset,
        val_set: SegmentationDataset,
        run: Run | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.train_set, self.val_set = config, train_set, val_set
        device = choose_device(config.device)
        bf16_ratio = bf16_ratio_of(config.amp, device, (saved or {}).get("bf16_ratio"))
        dtype, self.why_dtype = choose_dtype(config.amp, device, bf16_ratio)
        self.compute = Compute(device, dtype, config.channels_last)

        self.sampler = EpochSampler(len(train_set), config.batch_size, config.seed)
        samples = TrainSamples(train_set, Augmentation(config.crop_size, config.scale_range), config.seed)
        self.workers = choose_workers(config.workers, device)
        self.train_loader = make_loader(samples, self.workers, device, batch_sampler=self.sampler)
        self.val_loader = make_loader(EvalSamples(val_set), self.workers, device)

        torch.manual_seed(config.seed)
        model = self.compute.place(NETWORKS[config.model](len(train_set.classes)))
        self.criterion = make_criterion(config).to(device)
        try_extra_losses(self.criterion, len(train_set.classes), device)
        self.impl = choose_impl(self.criterion, device)
        self.iterations = config.epochs * len(self.sampler)
        self.warmup = min(200, self.iterations // 20) if config.warmup is None else config.warmup
        self.state = self._fresh_state(model)
        about = {
            "config": asdict(config),
            "classes": list(train_set.classes),
            "palette": torch.from_numpy(train_set.palette),
            "mean": MEAN,
            "std": STD,
            "align_corners": self.criterion.align_corners,
            "train_images": len(train_set),
            "bf16_ratio": bf16_ratio,
        }
        if run is None or saved is None:
            self.weights = f"random, seed {config.seed} (--pretrained PATH would start from public DDRNet weights)"
            if config.pretrained is not None:
                self.weights = str(load_pretrained(model, config.pretrained))
            self.run = begin_run(config.output_dir, config.name, config.default_name)
            self.run.about = about
            self.run.save_last(self.state.state_dict())
        else:
            self.run = run
            self.run.about = about
            check_same_data(saved, about, run.last)
            check_place(saved, len(self.sampler), run.last)
            self.state.load_state_dict(saved, run.last)
            self.weights = f"{run.last}, after {self.state.epoch} epochs and {self.state.step} steps"
            self._miss_best()
        if config.compile:
            model.compile()  # in place: the names of the weights stay

    def _fresh_state(self, model: nn.Module) -> TrainState:
        # Local names for the lambda: with `self` in it, only the garbage collector would end the loading processes.
        config, iterations, warmup = self.config, self.iterations, self.warmup
        optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
        scheduler = LambdaLR(optimizer, lambda i: lr_factor(i, iterations, config.power, warmup))
        scaler = torch.amp.GradScaler(self.compute.device.type, enabled=self.compute.dtype is torch.float16)
        if scaler.is_enabled():  # it skips steps until it has found its scale, of which the scheduler would warn
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        return TrainState(model, optimizer, scheduler, scaler)

    def _miss_best(self) -> None:
        """Says so where best.pt is damaged or gone; the best epoch from now on is kept then."""
        if self.state.best_epoch < 0:
            return
        if wrong := self.run.what_is_wrong_with_best():
            warn(
                f"{wrong.rstrip('.')}; the weights of epoch {self.state.best_epoch + 1}, the best so far, are gone, "
                "and those of the best epoch from now on will be kept."
            )
            self.state.best_miou, self.state.best_epoch = -1.0, -1

    def train(self) -> None:
        """Trains until the last epoch is done, or until a signal asks to stop (see `StopSignals`), which saves the run
        where it stands and exits."""
        config, state = self.config, self.state
        done = state.epoch * len(self.sampler) + state.step
        bar = tqdm(total=self.iterations, initial=done, bar_format=BAR, smoothing=0, disable=None)
        loaders = contextlib.ExitStack()
        for loader in (self.train_loader, self.val_loader):
            loaders.callback(close_loader, loader)
        with StopSignals() as stopped, bar, loaders:
            while state.epoch < config.epochs:
                evaluation = self._train_epoch(stopped, bar)
                if stopped():
                    break
                self._finish_epoch(evaluation)
            if state.epoch < config.epochs:
                self.run.save_last(state.state_dict())
        if state.epoch < config.epochs:
            print(f"stopped in epoch {state.epoch + 1} after {state.step} of {len(self.sampler)} steps; to go on:")
            print(f"  python -m bcmf_ext.train --resume {shlex.quote(str(self.run.folder))}")
            sys.exit(128 + (stopped.number or 0))
        print(self.result())

    def _train_epoch(self, stopped: StopSignals, bar: tqdm) -> Evaluation | None:
        """Trains what is left of the epoch, and evaluates if that is due. `UserError` for what the user can mend."""
        config, state = self.config, self.state
        bar.set_description_str(f"epoch {state.epoch + 1}/{config.epochs}")
        self.sampler.set_epoch(state.epoch, start=state.step)
        try:
            train_one_epoch(
                state,
                self.criterion,
                self.train_loader,
                self.compute,
                bar,
                stopped,
                config.loss_warmup,
                config.log_grad_share,
            )
            due = (state.epoch + 1) % config.eval_interval == 0 or state.epoch + 1 == config.epochs
            return self._evaluate(stopped, bar) if due and not stopped() else None
        except LoadingProcessDied as death:
            self.run.save_last(state.state_dict())
            raise UserError(
                f"A process that loads data died ({death}), often for want of memory; the run is saved: go on "
                f"with --resume {shlex.quote(str(self.run.folder))} and fewer --workers than {self.workers}."
            ) from death
        except UserError as error:  # a picture that could be read before
            self.run.save_last(state.state_dict())
            raise UserError(
                f"{sentence_of(error).rstrip('.')}; the run is saved: go on with --resume "
                f"{shlex.quote(str(self.run.folder))} when that is mended."
            ) from error
        except NonFiniteLoss as stop:
            raise self._explanation(stop) from stop
        except torch.OutOfMemoryError as error:
            height, width = config.crop_size
            raise UserError(
                f"The GPU has too little memory for --batch-size {config.batch_size} with "
                f"--crop-size {height} {width}: lower one of them."
            ) from error
        except RuntimeError as error:
            if not config.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            reason = " ".join(str(error).strip().split("\n\n")[0].split())  # advice to developers follows
            raise UserError(f"torch.compile failed ({reason}): --no-compile trains without it.") from error

    def _evaluate(self, stopped: StopSignals, bar: tqdm) -> Evaluation:
        """Evaluates on the val split; also returns some predictions, by their indices, to be drawn."""
        pictured = {int(index) for index in np.linspace(0, len(self.val_set) - 1, PICTURES)}
        predictions: dict[int, np.ndarray] = {}

        epoch = f"epoch {self.state.epoch + 1}/{self.config.epochs}"

        def keep(index: int, prediction: Tensor) -> None:
            bar.set_description_str(f"{epoch}, evaluating {index + 1}/{len(self.val_set)}")
            if index in pictured:
                predictions[index] = prediction.cpu().numpy()

        logits_of = partial(self.compute.run, self.state.model.eval())
        device, classes = self.compute.device, len(self.val_set.classes)
        return evaluate(logits_of, self.val_loader, device, classes, keep, stopped), predictions

    def _draw(self, predictions: Mapping[int, np.ndarray], epoch: int) -> None:
        """Draws curves and predictions. Whatever is in the way, no picture ends a run."""
        for index in (None, *predictions):
            try:
                if index is None:
                    draw_curves(self.run.folder / "curves.png", self.run.records)
                    continue
                stem, (image, label) = self.val_set.stem(index), self.val_set.pair(index)
                path = self.run.pictures / short_name(stem, ".png")
                classes, palette = self.val_set.classes, self.val_set.palette
                draw_sample(path, image, label, predictions[index], classes, palette, f"{stem}, epoch {epoch}")
            except Exception as error:
                what = "curves.png" if index is None else f"the picture of {self.val_set.source(index)}"
                warn(f"{what} could not be drawn ({str(error).rstrip('.') or type(error).__name__}); the run goes on.")

    def _finish_epoch(self, evaluation: Evaluation | None) -> None:
        """Saves the run at the beginning of the next epoch, and then reports this one."""
        state, run = self.state, self.run
        record: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "step": state.scheduler.last_epoch,
            "lr": self.config.lr * state.scheduler.lr_lambdas[0](state.scheduler.last_epoch - 1),
            "loss": {name: total / state.step for name, total in state.loss_sums.items()},
            "seconds": state.seconds,
            "images_per_second": state.step * self.config.batch_size / state.seconds,
        }
        if self.config.loss_warmup:
            record["loss_ramp"] = loss_ramp(state.scheduler.last_epoch - 1, self.config.loss_warmup)
        if self.config.log_grad_share:  # None of no iteration
            shares = {name: total / state.share_steps for name, total in state.share_sums.items()}
            record["grad_share"] = shares or None
        lines = loss_line(record, self.config.epochs)
        if evaluation is not None:
            record |= scores(evaluation[0], self.val_set.classes)
            if record["miou"] > state.best_miou:
                state.best_miou, state.best_epoch = record["miou"], state.epoch
                run.save_best(state.model.state_dict(), state.epoch + 1, state.best_miou)
            lines += "\n" + score_lines(record, f" (best {state.best_miou:.4f}, epoch {state.best_epoch + 1})")
        run.log(record)
        state.begin_next_epoch()
        run.save_last(state.state_dict())
        tqdm.write(lines)  # where it is printed may be gone
        self._draw(evaluation[1] if evaluation is not None else {}, record["epoch"])

    def _explanation(self, stop: NonFiniteLoss) -> UserError:
        """Saves the batch, and says what happened."""
        if all(map(math.isfinite, stop.terms.values())):
            return UserError(
                f"The weights are not finite after epoch {stop.epoch + 1}, step {stop.step + 1}, though the loss was; "
                f"{self.run.last} is from before: try a lower --lr, or --amp off."
            )
        path = self.run.folder / "nonfinite-batch.pt"
        images, labels = stop.batch
        where = {"epoch": stop.epoch, "step": stop.step, "terms": stop.terms}
        save_checkpoint(path, {"images": images, "labels": labels, **where})
        terms = ", ".join(f"{name} {value:g}" for name, value in stop.terms.items())
        return UserError(
            f"The loss is not finite in epoch {stop.epoch + 1}, step {stop.step + 1} ({terms}); the batch is saved as "
            f"{path}, and {self.run.last} is from before: try a lower --lr, or --amp off."
        )

    def describe(self) -> str:
        """What was decided, and the command that asks for it in full."""
        config, compute = self.config, self.compute
        short = len(self.train_set) % config.batch_size
        model = self.state.model
        auxiliary = sum(p.numel() for name, p in model.named_parameters() if name.startswith("seghead_extra."))
        parameters = sum(p.numel() for p in model.parameters()) - auxiliary
        threads = f", {torch.get_num_threads()} threads" if compute.device.type == "cpu" else ""
        dtype = str(compute.dtype).removeprefix("torch.") if compute.dtype else "float32"
        lines = {
            "train": self.train_set.protocol,
            "val": self.val_set.protocol,
            "epoch": f"{len(self.sampler)} steps of {config.batch_size} images"
            + (f"; the short last batch, of {short}, is left out, with other images each time" if short else ""),
            "network": f"{config.model}, {parameters:,} parameters, and {auxiliary:,} of the auxiliary head",
            "weights": self.weights,
            "loss": f"{describe_loss(self.criterion)}; impl {self.impl}{self._loss_warmup()}",
            "schedule": f"SGD, {self.iterations} iterations, the first {self.warmup} of them to warm up",
            "device": f"{compute.device}{threads}, {self.workers} loading process{'es' * (self.workers != 1)}",
            "compute": f"{dtype} ({self.why_dtype})"
            + (", channels_last" if compute.channels_last else "")
            + (", compiled" if config.compile else ""),
            "run": str(self.run.folder),
            "flags": command_line(config),
        }
        indent = "\n" + 10 * " "
        return "\n".join(f"{name:<10}{line}".replace("\n", indent) for name, line in lines.items())

    def _loss_warmup(self) -> str:
        warmup, criterion = self.config.loss_warmup, self.criterion
        names = [name.upper() for name in ("bcl", "cpg") if getattr(criterion, name) is not None]
        ramped = " and ".join([*names, *criterion.extra])
        if not warmup:
            return ""
        if not ramped:
            return "; --loss-warmup changes nothing without BCL and CPG"
        longer = ", more than there are" if warmup >= self.iterations else ""
        return f"; {ramped} gain weight in {warmup} iterations{longer}"

    def result(self) -> str:
        """How the run ended, where its pictures are, and what to type next."""
        run, state = self.run, self.state
        took = timedelta(seconds=round(sum(record["seconds"] for record in run.records)))
        wrong = run.what_is_wrong_with_best()
        if wrong:
            warn(f"{wrong.rstrip('.')}; {run.last} has the weights of the last epoch.")
        best = shlex.quote(str(run.last if wrong else run.best))
        return (
            f"mIoU {run.records[-1]['miou']:.3f} after epoch {state.epoch}, best {state.best_miou:.3f} in epoch "
            f"{state.best_epoch + 1}; {took} of training\n"
            f"pictures  {run.pictures}, {run.folder / 'curves.png'}\n"
            f"next      python -m bcmf_ext.evaluate --checkpoint {best}\n"
            f"          python -m bcmf_ext.predict --checkpoint {best} IMAGES…"
        )


def make_criterion(config: Config) -> SegmentationCriterion:
    """The loss that the flags ask for."""
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
        extra=load_extra_losses(config.extra_loss),
        aux_weight=config.aux_weight,
        impl=config.impl,
    )


def load_extra_losses(entries: Sequence[str]) -> dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]]:
    """The losses of `--extra-loss`, by their names. `UserError` if one is not there, or is none."""
    losses: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {}
    for entry in entries:
        file, name, weight = split_extra_loss(entry)
        if not os.path.isfile(file):
            raise UserError(f"--extra-loss {entry}: there is no file {file}, check the path.")
        try:
            found = runpy.run_path(file).get(name)
            loss: Any = found() if isinstance(found, type) and issubclass(found, nn.Module) else found
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise UserError(f"--extra-loss {entry}: {file} fails with {type(error).__name__}: {error}") from error
        if not callable(loss):
            raise UserError(f"--extra-loss {entry}: {file} has no function or module {name}, check the name.")
        if name in losses:
            raise UserError(f"--extra-loss names {name} twice: give each loss a name of its own.")
        losses[name] = weight, loss
    try:
        SegmentationCriterion(extra=losses)
    except ValueError as error:  # a name of ours
        raise UserError(f"--extra-loss {' '.join(entries)}: {error}") from error
    return losses


def try_extra_losses(criterion: SegmentationCriterion, classes: int, device: torch.device) -> None:
    """Calls each once, before hours of training. `UserError` if one fails, or gives no scalar."""
    if not criterion.extra:
        return
    logits = torch.zeros(2, classes, 64, 64, device=device, requires_grad=True)
    labels = torch.arange(2 * 64 * 64, device=device).view(2, 64, 64) // 64 % classes
    try:
        criterion.terms(logits, labels)
    except Exception as error:  # whatever the user's code raises
        names = " and ".join(criterion.extra)
        raise UserError(f"--extra-loss fails on a trial ({names}), {type(error).__name__}: {error}") from error


def describe_loss(criterion: SegmentationCriterion) -> str:
    """Such as "CE + 0.4 BCL + 1 CPG3, and 0.4 CE of the auxiliary head"."""
    ohem, bcl, cpg = criterion.ohem, criterion.bcl, criterion.cpg
    first = "CE" if ohem is None else f"OHEM (p < {ohem.threshold:g}, at least {ohem.min_kept:,} pixels)"
    terms = [first]
    if bcl is not None:
        terms.append(f"{bcl.weight:g} BCL")
    if cpg is not None:
        terms.append(f"{cpg.weight:g} CPG{cpg.kernel_size}")
    terms += [f"{weight:g} {name}" for name, (weight, _) in criterion.extra.items()]
    return f"{' + '.join(terms)}, and {criterion.aux_weight:g} {first.split()[0]} of the auxiliary head"


def choose_impl(criterion: SegmentationCriterion, device: torch.device) -> str:
    """Which implementation of the loss runs, and why not the device's own; `UserError` if the one asked for cannot."""
    if criterion.impl != "auto":
        reason = dispatch.why_not(criterion.impl, device.type)
        if reason is not None:
            raise UserError(f"--impl {criterion.impl} cannot run this loss on {device}: {reason}.")
    impl = dispatch.choose("segmentation_loss", criterion.impl, device)
    reason = dispatch.why_not(device.type, device.type) if criterion.impl == "auto" else None
    return f"{impl} ({device.type}: {reason})" if reason else impl


def check_same_data(saved: dict[str, Any], about: dict[str, Any], last: Path) -> None:
    """`UserError` if a run would go on with other classes or another number of images: it would not be the same run."""
    if saved["classes"] != about["classes"]:
        old, new = (", ".join(content["classes"]) for content in (saved, about))
        raise UserError(f"{last} knows the classes {old}, but the data has {new}: start another run.")
    if saved["train_images"] != about["train_images"]:
        old, new = saved["train_images"], about["train_images"]
        raise UserError(f"{last} was trained on {old} images, but the training split has {new} now: start another run.")


def check_place(saved: dict[str, Any], steps: int, last: Path) -> None:
    """`UserError` if the place where a run stands is none that it can have, of so many steps an epoch."""
    epoch, step, iteration = saved["epoch"], saved["step"], saved["scheduler"]["last_epoch"]
    if step > steps or iteration != epoch * steps + step:
        raise UserError(
            f"{last} is in epoch {epoch + 1} after {step} of {steps} steps, but its schedule is at iteration "
            f"{iteration}: take the file as the trainer wrote it."
        )


if __name__ == "__main__":
    run_command(main)
