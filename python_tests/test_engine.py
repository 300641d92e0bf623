"""The loop: learning rate, one step by hand, the non-finite check, evaluation, and the loading processes."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.tiny import TinyNet, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, PolynomialLR
from torch.utils.data import Dataset
from tqdm import tqdm

from bcmf_ext import engine
from bcmf_ext.data import MEAN, STD
from bcmf_ext.engine import (
    Compute,
    NonFiniteLoss,
    TrainState,
    bf16_ratio_of,
    choose_device,
    choose_dtype,
    choose_workers,
    evaluate,
    lr_factor,
    make_loader,
    train_one_epoch,
)
from bcmf_ext.errors import UserError
from bcmf_ext.losses.criterion import SegmentationCriterion

CPU = torch.device("cpu")
BAR = tqdm(disable=True)


def make_state(lr: float = 0.1, fp16: bool = False) -> TrainState:
    torch.manual_seed(0)
    model = TinyNet(3)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda i: lr_factor(i, 10))
    return TrainState(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=fp16))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator, dtype=torch.uint8)  # noqa: E731
    return [(draw(256, 2, 3, 32, 48), draw(3, 2, 32, 48)) for _ in range(count)]


# Learning rate


def test_poly() -> None:
    """Without warm-up it is PyTorch's PolynomialLR, stepped per iteration."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.05)
    scheduler = PolynomialLR(optimizer, total_iters=40, power=0.9)
    for iteration in range(40):
        assert 0.05 * lr_factor(iteration, 40) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_warmup() -> None:
    """The rate rises linearly to the poly curve, follows it from there, and never is 0 while training."""
    factors = [lr_factor(iteration, 100, 0.9, 4) for iteration in range(100)]
    poly = [(1 - iteration / 100) ** 0.9 for iteration in range(100)]
    assert factors[:4] == pytest.approx([poly[0] / 4, poly[1] / 2, poly[2] * 3 / 4, poly[3]])
    assert factors[3:] == poly[3:]
    assert max(factors) == factors[3]
    assert min(factors) > 0
    assert lr_factor(100, 100) == 0


# Where and how


def test_compute_normalises_and_autocasts() -> None:
    """The network sees normalised images of the asked layout; its layers run in the asked type."""
    seen = []

    class Look(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return F.conv2d(images, torch.ones(1, 3, 1, 1))

    images = torch.tensor([round(255 * m) for m in MEAN], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    images = torch.cat([images, 255 * torch.ones_like(images)])
    logits = Compute(CPU, torch.bfloat16).run(Look(), images)
    assert logits.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0][:2].abs().max() < 0.01
    white = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    assert seen[0][2, :, 0, 0].tolist() == pytest.approx(white, rel=1e-5)
    assert Compute(CPU, None, channels_last=False).run(Look(), images).dtype == torch.float32
    assert seen[1].is_contiguous()


def test_devices_and_types() -> None:
    """A device that is not there is a sentence; `--amp` is obeyed, and auto says why."""
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(UserError, match=f"`device='{name}'` cannot be used"):
            choose_device(name)
    assert choose_device("cpu") == CPU
    assert choose_dtype("fp16", CPU) == (torch.float16, "as asked")
    assert choose_dtype("off", CPU) == (None, "as asked")


@pytest.mark.parametrize(
    ("has", "measured", "given", "expected"),
    [
        ((), 0.5, None, (None, "this CPU has no bf16 instructions")),
        (("avx512_bf16", "amx_bf16"), 1.5, None, (torch.bfloat16, "this CPU has amx_bf16")),
        (("avx512_bf16",), 0.79, None, (torch.bfloat16, "bf16 takes 0.79 of fp32's time on this CPU")),
        (("avx512_bf16",), 0.81, None, (None, "bf16 takes 0.81 of fp32's time on this CPU")),
        (("avx512_bf16",), 0.79, 1.24, (None, "bf16 takes 1.24 of fp32's time on this CPU")),
        ((), 0.5, 0.6, (None, "this CPU has no bf16 instructions")),  # of another CPU
    ],
)
def test_half_precision_only_where_it_is_faster(
    has: tuple[str, ...], measured: float, given: float | None, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU whose bf16 may be slower than fp32 that is measured, once: what the run has measured counts later."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    monkeypatch.setattr(engine, "measure_bf16", lambda: measured)
    assert choose_dtype("auto", CPU, given) == expected
    asked = "takes" in expected[1]
    assert bf16_ratio_of("auto", CPU, given) == ((given or measured) if asked else None)
    assert bf16_ratio_of("off", CPU, given) is None


def test_the_measurement_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the ratio's direction: the least of several times in bf16, over that in fp32, without the first ones, in
    the worst of three rounds."""
    times = [9.0, 9.0]
    for least in (2.0, 3.0, 1.0):
        for i in range(7):
            times += [least + i % 3, 4.0 + i % 2]  # bf16, fp32
    readings = iter([reading for seconds in times for reading in (0.0, seconds)])
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(readings))
    assert engine.measure_bf16.__wrapped__() == 0.75


# Training


def test_one_step_by_hand() -> None:
    """A step is forward, backward, SGD, schedule: nothing else touches the weights; the sums are the losses' sums."""
    # Without BCL: it selects pixels by a threshold, which magnifies differences in the last digit.
    state, criterion = make_state(), SegmentationCriterion(bcl=None)
    model = TinyNet(3)
    model.load_state_dict(state.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sums = 0.0
    for step, (images, labels) in enumerate(batches(), 1):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        optimizer.zero_grad()
        loss = criterion(model((images / 255 - mean) / std), labels)
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 10) ** 0.9
        sums += loss.item()

    train_one_epoch(state, criterion, batches(), Compute(CPU), BAR)
    assert state.step == 3
    assert state.scheduler.last_epoch == 3
    assert state.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert set(state.loss_sums) == {"total", "ce", "cpg", "aux"}
    assert state.loss_sums["total"] == pytest.approx(sums, rel=1e-5)
    for ours, theirs in zip(state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_loss_warmup_and_gradient_shares() -> None:
    """BCL and CPG gain their weights over the run's first iterations, not the epoch's; shares are noted as often as
    asked for, and begin anew with an epoch."""
    state, criterion, ramps = make_state(), SegmentationCriterion(), []
    terms = criterion.terms

    def watch(outputs: Any, target: Tensor, ramp: float) -> Any:
        ramps.append(ramp)
        return terms(outputs, target, ramp)

    criterion.terms = watch  # type: ignore[method-assign, assignment]
    for _ in range(2):
        train_one_epoch(state, criterion, batches(), Compute(CPU), BAR, loss_warmup=4, log_grad_share=2)
        assert set(state.share_sums) == {"ce", "bcl", "cpg"}
        assert sum(state.share_sums.values()) == pytest.approx(state.share_steps, rel=1e-5)
        assert state.share_steps == (2 if state.epoch == 0 else 1)  # iterations 0, 2; 4
        if state.epoch == 0:
            state.begin_next_epoch()
            assert state.share_sums == {}
    assert ramps == [0, 0.25, 0.5, 0.75, 1, 1]
    saved = state.state_dict()
    del saved["share_sums"]  # as in files of older versions
    make_state().load_state_dict(saved, Path("last.pt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(dtype: torch.dtype) -> None:
    """Under autocast, with the loss scaled for fp16, a few steps lower the loss; the loss itself is not autocast."""

    class Watched(SegmentationCriterion):
        def terms(self, outputs: Any, target: Tensor, ramp: float = 1.0) -> dict[str, Tensor]:
            assert outputs[0].dtype == dtype
            assert not torch.is_autocast_enabled("cpu")
            return super().terms(outputs, target, ramp)

    state = make_state(lr=0.2, fp16=dtype is torch.float16)
    losses = []
    for _ in range(5):
        train_one_epoch(state, Watched(bcl=None, cpg=None), batches(1), Compute(CPU, dtype), BAR)
        losses.append(state.loss_sums["total"])
        state.begin_next_epoch()
    assert losses[-1] < losses[0]


def test_interrupt_stops_after_a_step() -> None:
    """The step that runs is finished and counted; no other begins."""
    state = make_state()
    train_one_epoch(state, SegmentationCriterion(), batches(), Compute(CPU), BAR, lambda: state.step == 2)
    assert state.step == state.scheduler.last_epoch == 2


class Spoilt(SegmentationCriterion):
    """The loss, with one term replaced in one call."""

    def __init__(self, call: int, value: float) -> None:
        super().__init__()
        self.call, self.value = call, value

    def terms(self, outputs: Any, target: Tensor, ramp: float = 1.0) -> dict[str, Tensor]:
        terms = super().terms(outputs, target, ramp)
        self.call -= 1
        if self.call >= 0:
            return terms
        self.call = 1000
        return {**terms, "total": terms["total"] * self.value, "bcl": terms["bcl"] * self.value}


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss(step: int, value: float) -> None:
    """A NaN or infinite loss stops, and names the step, terms and batch that it belongs to, the last step too."""
    data = batches()
    with pytest.raises(NonFiniteLoss, match=r"bcl (nan|inf)") as caught:
        train_one_epoch(make_state(), Spoilt(step, value), data, Compute(CPU), BAR)
    assert caught.value.step == step
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(caught.value.batch, data[step], strict=True))
    assert not math.isfinite(caught.value.terms["total"])
    assert math.isfinite(caught.value.terms["ce"])


def test_non_finite_weights() -> None:
    """A last step with a finite loss that destroys the weights is not taken for a good epoch."""
    state = make_state()
    state.model.final_layer.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss):
        train_one_epoch(state, SegmentationCriterion(), batches(1), Compute(CPU), BAR)
    assert math.isfinite(state.loss_sums["total"])


# Evaluation


def test_evaluate() -> None:
    """Predictions are counted at the labels' size, ignored pixels are not, and the network keeps its statistics."""
    state = make_state()
    model = state.model
    samples = [(images[:1], labels[:1].clone()) for images, labels in batches()]
    samples[0][1][0, :5] = 255
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: dict[int, Tensor] = {}
    model.eval()
    confusion = evaluate(partial(Compute(CPU).run, model), samples, CPU, 3, seen.__setitem__)

    expected = torch.zeros(3, 3, dtype=torch.int64)
    for index, (images, labels) in enumerate(samples):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        logits = F.interpolate(model((images / 255 - mean) / std), labels.shape[-2:], mode="bilinear")
        prediction = logits.argmax(1)
        assert torch.equal(seen[index], prediction[0])
        for truth, guess in zip(labels.flatten().tolist(), prediction.flatten().tolist(), strict=True):
            if truth != 255:
                expected[truth, guess] += 1
    assert torch.equal(confusion.matrix, expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluate_can_be_interrupted() -> None:
    """Ctrl-C does not wait for the whole split."""
    seen: list[int] = []
    samples = [(images[:1], labels[:1]) for images, labels in batches()]
    logits_of = partial(Compute(CPU).run, make_state().model.eval())
    evaluate(logits_of, samples, CPU, 3, lambda i, _: seen.append(i), lambda: len(seen) == 2)
    assert seen == [0, 1]


# Loading


class Numbers(Dataset[int]):
    """0 to 6, and a sample that cannot be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise UserError("file.png holds unexpected ids.")
        return index


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_loading_process_outlives_a_signal(number: int) -> None:
    """What stops the trainer reaches the loading processes too; they go on, for it to finish its step."""
    loader = make_loader(Numbers(), 1, CPU)
    iterator = iter(loader)
    assert next(iterator) == 0
    os.kill(iterator._workers[0].pid, number)
    assert [int(next(iterator)) for _ in range(6)] == [1, 2, 3, 4, 5, 6]


def test_a_loading_process_without_a_trainer_ends() -> None:
    """One whose trainer was killed before it looked would wait for work for ever."""
    loader = make_loader(Numbers(), 1, CPU)
    begin = loader.worker_init_fn
    assert begin is not None
    child = os.fork()
    if child == 0:
        if os.fork() == 0:  # its parent is not the process that made the loader
            begin(0)
            os._exit(3)
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_number_of_loading_processes() -> None:
    """What is asked for is obeyed, and the default leaves cores for training."""
    assert choose_workers(0, CPU) == 0
    assert choose_workers(5, CPU) == 5
    assert 0 <= choose_workers(None, CPU) < max(1, os.cpu_count() or 1)
