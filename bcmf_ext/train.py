"""Trains a network: python -m bcmf_ext.train [flags].

A run lives in one folder: last.pt (to go on from), best.pt (to use), log.jsonl, curves.png and pictures/.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import report
from .config import (
    Config,
    command_line,
    dataset_options,
    make_config,
    make_criterion,
    parse_flags,
    resumed_config,
    try_extra_losses,
)
from .data import MEAN, STD, Augmentation, EpochSampler, EvalSamples, SegmentationDataset, TrainSamples, open_dataset
from .engine import (
    Compute,
    NonFiniteLoss,
    StopSignals,
    TrainState,
    bf16_ratio_of,
    choose_device,
    choose_dtype,
    choose_impl,
    choose_workers,
    close_loader,
    evaluate,
    make_loader,
    train_one_epoch,
)
from .errors import UserError, command, counted, run_command, sentence_of, warn
from .metrics import ConfusionMatrix
from .models import NETWORKS, load_pretrained
from .run import Run, begin_run, check_same_run, resume_run

PICTURES = 4  # the number of val samples that are drawn after each evaluation
Evaluation = tuple[ConfusionMatrix, dict[int, np.ndarray]]
BAR = "{desc} |{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, checks the data, and trains. Raises `UserError` for what users can mend."""
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
        done = f"all of its {counted(config.epochs, 'epoch')} done"
        print(f"{run.folder} is finished, {done}: best mIoU {saved['best_miou']:.3f}")
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
            print(f"{dataset.protocol}\n{report.share_lines(pixels, dataset.classes)}")
        elif dataset is train_set:
            print(report.absent_line(pixels, dataset.classes), end="")
    if "check_data" in flags:
        print("all images and labels can be used")
        return
    trainer = Trainer(config, train_set, val_set, run, saved)
    with contextlib.closing(trainer.run):
        print(describe(trainer))
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
        self.bf16_ratio = bf16_ratio_of(config.amp, device, (saved or {}).get("bf16_ratio"))
        dtype, self.why_dtype = choose_dtype(config.amp, device, self.bf16_ratio)
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
        self.impl = choose_impl(self.criterion.impl, device)
        self.iterations = config.epochs * len(self.sampler)
        self.warmup = min(200, self.iterations // 20) if config.warmup is None else config.warmup
        self.state = TrainState.fresh(
            model,
            self.compute,
            *(config.lr, config.momentum, config.weight_decay),
            *(self.iterations, config.power, self.warmup),
        )
        self.run, self.weights = self._begin() if run is None or saved is None else self._go_on(run, saved)
        if config.compile:
            model.compile()  # In place, so that the names of the weights stay.

    def _begin(self) -> tuple[Run, str]:
        """The folder of a new run, with a first last.pt in it, and where the weights are from."""
        config = self.config
        weights = f"random, seed {config.seed} (--pretrained PATH would start from public weights)"
        if hasattr(self.state.model, "untrained"):
            weights += f";\n{self.state.model.untrained}"
        if config.pretrained is not None:
            weights = str(load_pretrained(self.state.model, config.pretrained))
        run = begin_run(config.output_dir, config.name, config.default_name)
        run.about = self._about()
        run.save_last(self.state.state_dict())
        return run, weights

    def _go_on(self, run: Run, saved: dict[str, Any]) -> tuple[Run, str]:
        """The folder of a run that goes on, and where the weights are from; the state is then what was saved."""
        run.about, state = self._about(), self.state
        check_same_run(saved, run.about, len(self.sampler), run.last)
        state.load_state_dict(saved, run.last)
        if state.best_epoch >= 0 and (wrong := run.what_is_wrong_with_best()):
            warn(
                f"{wrong.rstrip('.')}; the weights of epoch {state.best_epoch + 1}, the best so far, are gone, "
                "and those of the best epoch from now on will be kept."
            )
            state.best_miou, state.best_epoch = -1.0, -1
        return run, f"{run.last}, after {counted(state.epoch, 'epoch')} and {counted(state.step, 'step')}"

    def _about(self) -> dict[str, Any]:
        """The fields of each checkpoint beside the weights and the state."""
        return {
            "config": asdict(self.config),
            "classes": list(self.train_set.classes),
            "palette": torch.from_numpy(self.train_set.palette),
            "mean": MEAN,
            "std": STD,
            "align_corners": self.criterion.align_corners,
            "train_images": len(self.train_set),
            "bf16_ratio": self.bf16_ratio,
        }

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
            steps = f"{state.step} of {counted(len(self.sampler), 'step')}"
            print(f"stopped in epoch {state.epoch + 1} after {steps}; to go on:")
            print(f"  python -m bcmf_ext.train --resume {shlex.quote(str(self.run.folder))}")
            sys.exit(128 + (stopped.number or 0))
        print(result(self.run, state))

    def _train_epoch(self, stopped: StopSignals, bar: tqdm) -> Evaluation | None:
        """Trains what is left of the epoch, and evaluates if that is due. `UserError` says what users can mend."""
        config, state, run = self.config, self.state, self.run
        bar.set_description_str(f"epoch {state.epoch + 1}/{config.epochs}")
        self.sampler.set_epoch(state.epoch, start=state.step)
        options = stopped, config.loss_warmup, config.log_grad_share
        try:
            train_one_epoch(state, self.criterion, self.train_loader, self.compute, bar, *options)
            due = (state.epoch + 1) % config.eval_interval == 0 or state.epoch + 1 == config.epochs
            return self._evaluate(stopped, bar) if due and not stopped() else None
        except UserError as error:  # A picture can no longer be read, or a loading process died.
            run.save_last(state.state_dict())
            raise UserError(
                f"{sentence_of(error).rstrip('.')}; the run is saved: go on with --resume "
                f"{shlex.quote(str(run.folder))} when that is mended."
            ) from error
        except NonFiniteLoss as stop:
            batch = None if stop.terms_are_finite else run.save_batch(stop)
            raise UserError(report.nonfinite_words(stop, batch, run.last)) from stop
        except RuntimeError as error:
            if (words := report.failure_words(error, config.batch_size, config.crop_size)) is None:
                raise
            raise UserError(words) from error

    def _evaluate(self, stopped: StopSignals, bar: tqdm) -> Evaluation:
        """Evaluates on the val split; also returns some predictions, by their indices, to be drawn."""
        epoch = f"epoch {self.state.epoch + 1}/{self.config.epochs}"
        pictured = {int(index) for index in np.linspace(0, len(self.val_set) - 1, PICTURES)}
        predictions: dict[int, np.ndarray] = {}

        def keep(index: int, prediction: Tensor) -> None:
            bar.set_description_str(f"{epoch}, evaluating {index + 1}/{len(self.val_set)}")
            if index in pictured:
                predictions[index] = prediction.cpu().numpy()

        logits_of = partial(self.compute.run, self.state.model.eval())
        device, classes = self.compute.device, len(self.val_set.classes)
        return evaluate(logits_of, self.val_loader, device, classes, keep, stopped), predictions

    def _finish_epoch(self, evaluation: Evaluation | None) -> None:
        """Saves the run at the beginning of the next epoch, and then reports this one."""
        config, state, run = self.config, self.state, self.run
        record = state.record(config.batch_size, config.loss_warmup, config.log_grad_share > 0)
        lines = report.loss_line(record, config.epochs)
        if evaluation is not None:
            record |= report.scores(evaluation[0], self.val_set.classes)
            if record["miou"] > state.best_miou:
                state.best_miou, state.best_epoch = record["miou"], state.epoch
                run.save_best(state.model.state_dict(), state.epoch + 1, state.best_miou)
            lines += "\n" + report.score_lines(record, f" (best {state.best_miou:.4f}, epoch {state.best_epoch + 1})")
        run.log(record)
        state.begin_next_epoch()
        run.save_last(state.state_dict())
        tqdm.write(lines)  # The terminal may be gone: the run is saved before.
        report.draw_epoch(run.folder, run.records, self.val_set, evaluation[1] if evaluation is not None else {})


def describe(trainer: Trainer) -> str:
    """Says what was decided, and the command that asks for it in full."""
    config, compute, steps = trainer.config, trainer.compute, len(trainer.sampler)
    lines = {
        "train": trainer.train_set.protocol,
        "val": trainer.val_set.protocol,
        "epoch": report.epoch_words(steps, config.batch_size, len(trainer.train_set)),
        "network": f"{config.model}, {report.network_words(trainer.state.model)}",
        "weights": trainer.weights,
        "loss": report.loss_words(trainer.criterion, trainer.impl, config.loss_warmup, trainer.iterations),
        "schedule": f"SGD, {counted(trainer.iterations, 'iteration')}, the first {trainer.warmup} of them to warm up",
        "device": report.device_words(compute.device, trainer.workers),
        "compute": report.compute_words(compute, trainer.why_dtype, config.compile),
        "run": str(trainer.run.folder),
        "flags": command_line(config),
    }
    return report.aligned(lines)


def result(run: Run, state: TrainState) -> str:
    """How the run ended, where its pictures are, and what to type next."""
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


if __name__ == "__main__":
    run_command(main)
