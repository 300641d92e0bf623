"""The training loop and the evaluation: plain functions, in the manner of detr's engine.py."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import dispatch
from .checkpoint import load_weights
from .data import normalise
from .errors import UserError
from .losses.criterion import SegmentationCriterion
from .metrics import ConfusionMatrix, Counts


@dataclass(frozen=True)
class Compute:
    """Where and how the network runs.

    dtype: autocast's, or None for fp32 throughout.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, model: nn.Module) -> nn.Module:
        """Moves the network's parameters to the device, in the memory format."""
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """Returns the network's outputs for uint8 images (N, 3, H, W): they travel as bytes and are normalised
        there."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return model(normalise(images))


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or without one the first GPU, or the CPU. Raises `UserError` if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # The meta device cannot do this.
    except (RuntimeError, AssertionError) as error:  # AssertionError says "Torch not compiled with CUDA enabled".
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"`device={name!r}` cannot be used ({reason}): choose another, such as cpu.") from error
    return device


BF16_PAYS = 0.8  # A share of fp32's time: nearer to 1 noise would decide, and labels change a little in bf16.


def choose_dtype(amp: str, device: torch.device, bf16_ratio: float | None = None) -> tuple[torch.dtype | None, str]:
    """Autocast's dtype (None: fp32), and why. amp: "auto", "bf16", "fp16" or "off". bf16_ratio: what `bf16_ratio_of`
    gave when the run began, so that it goes on, and is evaluated, in the same precision."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in it"
        return torch.float16, "this GPU has no bf16"
    if device.type != "cpu":
        return None, f"not tried on {device.type}"
    if torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.bfloat16, "this CPU has amx_bf16"
    ratio = bf16_ratio_of(amp, device, bf16_ratio)
    if ratio is None:
        return None, "this CPU has no bf16 instructions"
    return torch.bfloat16 if ratio <= BF16_PAYS else None, f"bf16 takes {ratio:.2f} of fp32's time on this CPU"


def bf16_ratio_of(amp: str, device: torch.device, measured: float | None = None) -> float | None:
    """How long bf16 takes relative to fp32, as measured before, or now, where amp="auto" has to know that: on CPUs
    with avx512_bf16 alone, of which some are faster with it, others slower. None elsewhere."""
    has = torch.cpu.get_capabilities()
    if amp != "auto" or device.type != "cpu" or has.get("amx_bf16") or not has.get("avx512_bf16"):
        return None
    return measure_bf16() if measured is None else measured


@functools.cache
def measure_bf16() -> float:
    """The time of a typical convolution of the networks in bf16, relative to fp32: the least of seven times each, in
    turn. The worst of three such rounds, all in a fraction of a second: on a busy machine one of them may be far off,
    and bf16 is to be faster in each."""
    convolution = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.ones(2, 64, 64, 64).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def seconds(bf16: bool) -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            convolution(images)
        return time.perf_counter() - began

    def ratio() -> float:
        pairs = [(seconds(True), seconds(False)) for _ in range(7)]
        return min(bf16 for bf16, _ in pairs) / min(fp32 for _, fp32 in pairs)

    for bf16 in (True, False):
        seconds(bf16)  # The first call sets things up.
    return max(ratio() for _ in range(3))


def choose_impl(impl: str, device: torch.device) -> str:
    """Which implementation of the loss runs, and why not the device's own. Raises `UserError` if the one asked for
    cannot run there."""
    if impl != "auto":
        reason = dispatch.why_not(impl, device.type)
        if reason is not None:
            raise UserError(f"`impl={impl!r}` cannot run this loss on {device}: {reason}.")
    chosen = dispatch.choose("segmentation_loss", impl, device)
    reason = dispatch.why_not(device.type, device.type) if impl == "auto" else None
    return f"{chosen} ({device.type}: {reason})" if reason else chosen


def choose_workers(workers: int | None, device: torch.device) -> int:
    """How many processes load data: so many if given, otherwise by the number of cores."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores) if device.type == "cuda" else min(4, cores // 2)


def make_loader(samples: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    """A loader of single samples, or as the options say, whose processes live as long as it does."""
    return DataLoader(
        samples,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_begin_to_load, os.getpid()),
        **options,
    )


def _begin_to_load(trainer: int, worker: int) -> None:
    """Prepares a loading process.

    A terminal sends Ctrl-C, and SLURM SIGTERM, to every process; the trainer still needs its batch to finish the step.
    So the first SIGTERM is ignored; the trainer ends its loading processes by `close_loader`.
    """
    # The trainer was killed since the fork: PyTorch looks for its end only from a little later on.
    if os.getppid() != trainer:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def close_loader(loader: DataLoader) -> None:
    """Ends a loader's processes. After an error the loader would live as long as the error does, until the end of the
    program, which sends a process that it no longer needs one SIGTERM and then waits for it: see `_begin_to_load`."""
    iterator = getattr(loader, "_iterator", None)  # Only loaders with persistent workers have one.
    if iterator is not None:
        iterator._shutdown_workers()


class LoadingProcessDied(UserError):
    """A process that loads data has ended: most often the system killed it for want of memory."""


def loaded(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader. Raises `LoadingProcessDied` where one does not come, and nowhere else.

    PyTorch's own error would come wherever the program is at that moment, also in the middle of a step: it is raised by
    a handler of SIGCHLD. Without it the loader finds out within five seconds, while it waits for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        iterator = iter(batches)
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        yield from iterator
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise LoadingProcessDied(
            f"A process that loads data died ({reason}), often for want of memory: use fewer `workers`."
        ) from error


class StopSignals:
    """While active, the first Ctrl-C (SIGINT), SIGTERM (of SLURM and others) or SIGHUP (a closed terminal) only makes
    `stopped()` true, for the loop to stop at a good place; a second one stops at once. What the process was started to
    ignore, as by nohup, stays ignored.

    number: of the signal that came, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.number is not None

    def __enter__(self) -> StopSignals:
        before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for other in self._before:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # The terminal may be closed.
            # This is not print, since it may run in the middle of one.
            os.write(2, b"\nstopping after this step; a second signal stops at once, without saving\n")


def lr_factor(iteration: int, iterations: int, power: float = 0.9, warmup: int = 0) -> float:
    """The learning rate at an iteration (from 0) relative to the highest: poly, while warming up times a ramp."""
    ramp = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
    return ramp * max(0.0, 1 - iteration / iterations) ** power


def loss_ramp(iteration: int, warmup: int = 0) -> float:
    """How much of its weight a term beside the first has at an iteration (from 0): it grows from 0 to 1 in `warmup`
    iterations."""
    return min(1.0, iteration / warmup) if warmup else 1.0


@dataclass
class TrainState:
    """Everything that changes while training: what `last.pt` holds, and all that is needed to go on exactly.

    epoch, step: where the run stands, `step` iterations into epoch `epoch`, both from 0. loss_sums, seconds: of those
    iterations. share_sums, share_steps: of those whose shares of the gradient were noted. best_miou, best_epoch: of the
    evaluations so far.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)
    share_sums: dict[str, float] = field(default_factory=dict)
    share_steps: int = 0
    seconds: float = 0.0
    best_miou: float = -1.0
    best_epoch: int = -1

    @classmethod
    def fresh(
        cls,
        model: nn.Module,
        compute: Compute,
        lr: float,
        momentum: float,
        weight_decay: float,
        iterations: int,
        power: float,
        warmup: int,
    ) -> TrainState:
        """The state before the first step: SGD, and a rate that falls as `lr_factor` says.

        The rate's function holds numbers alone: with the trainer in it, only the garbage collector would end the
        trainer's loading processes.
        """
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
        scheduler = LambdaLR(optimizer, lambda i: lr_factor(i, iterations, power, warmup))
        scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype is torch.float16)
        if scaler.is_enabled():  # It skips steps until it has found its scale, and the scheduler would warn of that.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        return cls(model, optimizer, scheduler, scaler)

    def state_dict(self) -> dict[str, Any]:
        """The fields, as a checkpoint holds them."""
        return {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(self).items()}

    def load_state_dict(self, saved: dict[str, Any], path: Path) -> None:
        """Takes the content of a `last.pt`, whose fields are those of `checkpoint.PROGRESS`. Raises `UserError` if it
        belongs to another network."""
        load_weights(self.model, saved, path)
        self._load_momentum(saved["optimizer"], path)
        # We take the place in the schedule alone: all else follows from the settings, and its names change with torch.
        places = {name: saved["scheduler"][name] for name in ("last_epoch", "_step_count", "base_lrs", "_last_lr")}
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **places})
        scaler = self.scaler.state_dict()
        self.scaler.load_state_dict({name: saved["scaler"].get(name, value) for name, value in scaler.items()})
        for name, value in vars(self).items():
            if not hasattr(value, "load_state_dict"):
                setattr(self, name, saved.get(name, value))  # Older files lack fields that have joined since.

    def _load_momentum(self, saved: dict[str, Any], path: Path) -> None:
        parameters, state = list(self.model.parameters()), self.optimizer.state_dict()
        for number, entry in saved["state"].items():
            momentum = entry.get("momentum_buffer")
            if number >= len(parameters) or (momentum is not None and momentum.shape != parameters[number].shape):
                raise UserError(
                    f"In {path} the field optimizer belongs to another network: take the file as the trainer wrote it."
                )
            state["state"][number] = {"momentum_buffer": momentum}
        for rate in ("lr", "initial_lr"):
            state["param_groups"][0][rate] = saved["param_groups"][0][rate]
        self.optimizer.load_state_dict(state)

    def record(self, batch_size: int, loss_warmup: int, with_shares: bool) -> dict[str, Any]:
        """The epoch that ends here, as log.jsonl holds it: losses and shares in the mean, rates, and seconds."""
        place = self.scheduler.last_epoch
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": place,
            "lr": self.scheduler.base_lrs[0] * self.scheduler.lr_lambdas[0](place - 1),
            "loss": {name: total / self.step for name, total in self.loss_sums.items()},
            "seconds": self.seconds,
            "images_per_second": self.step * batch_size / self.seconds,
        }
        if loss_warmup:
            record["loss_ramp"] = loss_ramp(place - 1, loss_warmup)
        if with_shares:  # They are None where no iteration of the epoch took them.
            shares = {name: total / self.share_steps for name, total in self.share_sums.items()}
            record["grad_share"] = shares or None
        return record

    def begin_next_epoch(self) -> None:
        """Moves to the beginning of the next epoch, of which there are no losses yet."""
        self.epoch, self.step, self.loss_sums, self.seconds = self.epoch + 1, 0, {}, 0.0
        self.share_sums, self.share_steps = {}, 0


class NonFiniteLoss(Exception):
    """A loss was NaN or infinite. epoch and step (from 0) say where, `terms` its terms, `batch` images and labels."""

    def __init__(self, state: TrainState, losses: StepLosses) -> None:
        self.epoch, self.step, self.terms, self.batch = state.epoch, losses.step, losses.read()[0], losses.batch
        super().__init__(", ".join(f"{name} {value:g}" for name, value in self.terms.items()))

    @property
    def terms_are_finite(self) -> bool:
        """Whether the loss was finite after all: then it is the weights that are not."""
        return all(map(math.isfinite, self.terms.values()))


class StepLosses:
    """The loss terms of one step, and their shares of the gradient, on their way to the host; and the step's batch.

    Asking a GPU for a value waits until it has run everything queued so far, and leaves it idle. So the copy is queued
    right behind the step, and read when the next step has been queued: the wait is then for work that is already done.
    """

    def __init__(
        self,
        step: int,
        lr: float,
        terms: dict[str, Tensor],
        shares: dict[str, Tensor],
        batch: tuple[Tensor, Tensor],
    ) -> None:
        self.step, self.lr, self.batch, self.terms, self.shares = step, lr, batch, tuple(terms), tuple(shares)
        scalars = [value.detach().to(terms["total"].dtype) for value in (*terms.values(), *shares.values())]
        values, on_gpu = torch.stack(scalars), terms["total"].is_cuda
        self._values = values.to("cpu", non_blocking=on_gpu)
        self._copied = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """The terms and the shares, by their names."""
        if self._copied is not None:
            self._copied.synchronize()
        values, count = self._values.tolist(), len(self.terms)
        return dict(zip(self.terms, values[:count], strict=True)), dict(zip(self.shares, values[count:], strict=True))


def train_one_epoch(
    state: TrainState,
    criterion: SegmentationCriterion,
    batches: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    bar: tqdm,
    interrupted: Callable[[], bool] = lambda: False,
    loss_warmup: int = 0,
    log_grad_share: int = 0,
) -> None:
    """Trains on the batches (uint8 images (N, 3, H, W), uint8 labels (N, H, W)), which are those of the epoch from
    `state.step` on. Stops after a step if `interrupted()`. loss_warmup: iterations of the run in which the terms beside
    the first gain their weights. log_grad_share: every how many iterations the terms' shares of the gradient are taken;
    0: never.

    Raises `NonFiniteLoss`, at the latest one step late: the weights have then taken the bad step, so nothing must be
    saved from them. `LoadingProcessDied`, and `UserError` for a file that can no longer be read: between two steps, the
    state is good.
    """
    state.model.train()
    began = time.perf_counter() - state.seconds
    pending: StepLosses | None = None
    ended: UserError | None = None
    try:
        for images, labels in loaded(batches):
            outputs, target = compute.run(state.model, images), labels.to(compute.device, non_blocking=True)
            iteration = state.scheduler.last_epoch
            ramp = loss_ramp(iteration, loss_warmup)
            # This is outside autocast: the losses compute in fp32 themselves.
            terms = criterion.terms(outputs, target, ramp)
            logged = log_grad_share and iteration % log_grad_share == 0
            shares = criterion.gradient_shares(outputs, target, ramp) if logged else {}
            state.optimizer.zero_grad()
            state.scaler.scale(terms["total"]).backward()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            lr = float(state.scheduler.get_last_lr()[0])
            state.scheduler.step()

            previous, pending = pending, StepLosses(state.step, lr, terms, shares, (images, labels))
            state.step += 1
            state.seconds = time.perf_counter() - began
            if previous is not None:
                _note(state, previous, bar, images_per_second=state.step * len(images) / state.seconds)
            bar.update()
            if interrupted():
                break
    except UserError as error:  # The loader raises it, between two steps.
        ended = error
    if pending is not None:
        _note(state, pending, bar)
        # Losses may be finite and the last step's gradients infinite: the next loss would show it, and comes too late.
        if not _finite(state.model):
            raise NonFiniteLoss(state, pending)
    state.seconds = time.perf_counter() - began
    if ended is not None:
        raise ended


def _note(state: TrainState, losses: StepLosses, bar: tqdm, images_per_second: float | None = None) -> None:
    """Checks a step's losses, adds them to the epoch's sums and shows them."""
    terms, shares = losses.read()
    if not all(map(math.isfinite, terms.values())):
        raise NonFiniteLoss(state, losses)
    for name, value in terms.items():
        state.loss_sums[name] = state.loss_sums.get(name, 0.0) + value
    for name, value in shares.items():
        state.share_sums[name] = state.share_sums.get(name, 0.0) + value
    state.share_steps += bool(shares)
    if images_per_second is not None:
        loss, *others = (f"{name} {value:.2f}" for name, value in terms.items())
        rates = f"lr {losses.lr:.2g}, {images_per_second:.1f} images/s"
        # The single terms come last, since a terminal may be narrow.
        bar.set_postfix_str(f"{loss}, {rates}, {' '.join(others)}", refresh=False)


def _finite(model: nn.Module) -> bool:
    """Whether the weights and statistics can be gone on from, as `checkpoint.check_finite` asks."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


@torch.inference_mode()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    samples: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    num_classes: int,
    visit: Callable[[int, Tensor], None] = lambda index, prediction: None,
    interrupted: Callable[[], bool] = lambda: False,
    align_corners: bool = False,
    metrics: Sequence[Counts] = (),
) -> ConfusionMatrix:
    """Counts predictions against labels at the labels' own size.

    logits_of: uint8 images (1, 3, H, W) to logits (1, C, h, w) on the device. samples: batches of one image, and uint8
    labels (1, H, W). visit: is called with each one's position and prediction, (H, W) uint8 on the device. metrics: are
    updated, too. Stops early if `interrupted()`: the counts are then incomplete. Raises `LoadingProcessDied`.
    """
    confusion = ConfusionMatrix(num_classes, device=device)
    for index, (images, labels) in enumerate(loaded(samples)):
        labels = labels.to(device, non_blocking=True)
        prediction = confusion.update_from_logits(logits_of(images), labels, align_corners)
        for metric in metrics:
            metric.update(prediction, labels)
        visit(index, prediction[0])
        if interrupted():
            break
    return confusion
