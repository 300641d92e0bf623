"""Whole runs of the trainer on a few small images: what they leave behind, how they stop, and how they go on."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.tiny import CLASSES, STEPS, TinyNet, one_thread, write_folder  # noqa: F401
from PIL import Image
from torch import Tensor

from bcmf_ext import BCL, CPG, OHEM, dispatch, engine, evaluate, predict, report, train
from bcmf_ext.config import parse_flags
from bcmf_ext.data import Augmentation, open_dataset
from bcmf_ext.engine import Compute, lr_factor
from bcmf_ext.errors import UserError, run_command
from bcmf_ext.inference import Predictor
from bcmf_ext.losses.criterion import SegmentationCriterion
from bcmf_ext.metrics import ConfusionMatrix
from bcmf_ext.models import NETWORKS

TIMINGS = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("my data"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer builds a network that is quick to run."""
    monkeypatch.setitem(NETWORKS, "bcmfnet", TinyNet)


@pytest.fixture
def flags(data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--dataset", "folder", "--data-root", str(data), "--output-dir", str(tmp_path / "all runs"), "--name", "x"),
        *("--batch-size", "2", "--epochs", "3", "--crop-size", "64", "64", "--workers", "0", "--device", "cpu"),
        *("--amp", "off"),  # runs of two processes are compared, which would measure what is faster each for itself
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "all runs" / "x"


def log(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without what depends on the machine's speed."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_run(run: Path, other: Path) -> None:
    """Two runs have the same log and end with the same weights and optimiser state, bit for bit."""
    assert log(run) == log(other)
    for name in ("last.pt", "best.pt"):
        ours, theirs = load(run / name), load(other / name)
        assert ours["model"].keys() == theirs["model"].keys()
        assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())
    ours, theirs = load(run / "last.pt"), load(other / "last.pt")
    for key, value in ours["optimizer"]["state"].items():
        assert torch.equal(value["momentum_buffer"], theirs["optimizer"]["state"][key]["momentum_buffer"])
    assert ours["scheduler"] == theirs["scheduler"]
    assert (ours["best_miou"], ours["best_epoch"]) == (theirs["best_miou"], theirs["best_epoch"])


Terms = dict[str, Tensor]


def at_loss(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[Terms], Terms | None]) -> None:
    """In the loss's call of that number, counted over the run, `action` happens, and may change the loss."""
    calls = iter(range(10_000))
    terms = SegmentationCriterion.terms

    def spied(self: SegmentationCriterion, *args: Any) -> Terms:
        loss = terms(self, *args)
        return (action(loss) or loss) if next(calls) == call else loss

    monkeypatch.setattr(SegmentationCriterion, "terms", spied)


def press_ctrl_c(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def in_background(flags: list[str], **options: Any) -> subprocess.Popen[str]:
    """The command, with the tiny network."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv.pop(1)); torch.set_num_threads(1)\n"
        "from harness.tiny import TinyNet; from bcmf_ext import train; from bcmf_ext.models import NETWORKS\n"
        "NETWORKS['bcmfnet'] = TinyNet\n"
        "train.run_command(train.main)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), *flags]
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **options)


def wait_for_epoch(process: subprocess.Popen[str], run: Path, epochs: int = 1) -> None:
    while not (run / "log.jsonl").exists() or len(log(run)) < epochs:
        assert process.poll() is None
        time.sleep(0.01)


# A run


@pytest.mark.usefixtures("tiny")
def test_loss_warmup_and_gradient_shares(
    flags: list[str], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--loss-warmup` lets BCL and CPG gain their weights, `--log-grad-share` logs and prints who pulls how much; the
    log of other runs has no shares."""
    ramps = []
    terms = SegmentationCriterion.terms

    def spied(self: SegmentationCriterion, outputs: Any, target: Tensor, ramp: float) -> Terms:
        ramps.append(ramp)
        return terms(self, outputs, target, ramp)

    monkeypatch.setattr(SegmentationCriterion, "terms", spied)
    train.main([*flags, "--epochs", "2", "--loss-warmup", "5", "--log-grad-share", "2"])
    assert ramps == [min(1, i / 5) for i in range(2 * STEPS)]
    shares = [record["grad_share"] for record in log(run)]
    assert all(
        share.keys() == {"ce", "bcl", "cpg"} and math.isclose(sum(share.values()), 1, rel_tol=1e-5) for share in shares
    )
    out = capsys.readouterr().out
    assert "BCL and CPG gain weight in 5 iterations\n" in out
    assert ", shares of the gradient: ce " in out
    assert [record["loss_ramp"] for record in log(run)] == [min(1, (epoch * STEPS - 1) / 5) for epoch in (1, 2)]
    late = ["--log-grad-share", "500", "--loss-warmup", "500"]
    train.main([*flags, "--epochs", "2", "--name", "y", "--bcl", "0", *late])
    assert "CPG gain weight in 500 iterations, more than there are\n" in capsys.readouterr().out
    first, second = (record["grad_share"] for record in log(run.with_name("y")))  # only of the run's first iteration
    assert first.keys() == {"ce", "cpg"}
    assert second is None
    train.main([*flags, "--epochs", "1", "--name", "z", "--bcl", "0", "--cpg", "0", "--loss-warmup", "5"])
    assert "; no loss stands beside the first, so none has to warm up\n" in capsys.readouterr().out
    assert "grad_share" not in log(run.with_name("z"))[0]
    with pytest.raises(UserError, match="--loss-warmup is -1, but must be at least 0"):
        train.main([*flags, "--loss-warmup", "-1"])


@pytest.mark.usefixtures("tiny")
def test_a_run(flags: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what it decided and how it went, and leaves checkpoints, log, curves and pictures, and nothing else."""
    before = signal.getsignal(signal.SIGINT)
    train.main([*flags, "--lr", "0.3"])
    out, err = capsys.readouterr()
    for text in (
        "train: 9 images",
        "val: 3 images",
        f"{STEPS} steps of 2 images; the short last batch, of 1, is left out",
        "CE + 0.1 BCL + 1 CPG3, and 0.4 CE of the auxiliary head; impl " + ("cpu" if dispatch.EXTENSION else "torch"),
        "12 iterations",
        str(run),
        "--weight-decay 0.0005",
        "epoch 3/3: loss",
        "red box",
        "--checkpoint '",
    ):
        assert text in out
    assert "100%" not in err + out  # no bar where nobody watches
    assert signal.getsignal(signal.SIGINT) is before

    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    pictures = {f"pictures/val{index}.png" for index in range(3)}
    assert files == {"last.pt", "last-1.pt", "best.pt", "log.jsonl", "curves.png", ".lock"} | pictures
    for name in ("curves.png", *pictures):
        Image.open(run / name).verify()

    records = log(run)
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 4), (2, 8), (3, 12)]
    for record in records:
        assert record["loss"].keys() == {"total", "ce", "bcl", "cpg", "aux"}
        assert record["iou"].keys() == set(CLASSES)
        ious = [value for value in record["iou"].values() if value is not None]
        assert record["miou"] == pytest.approx(sum(ious) / len(ious))
    assert records[0]["lr"] == pytest.approx(0.3 * (9 / 12) ** 0.9)
    assert records[2]["loss"]["ce"] < records[0]["loss"]["ce"]

    best = load(run / "best.pt")
    assert best["miou"] == max(record["miou"] for record in records)
    assert best["epoch"] == 1 + max(range(3), key=lambda i: records[i]["miou"])
    assert best["classes"] == list(CLASSES)
    assert {"config", "palette", "mean", "std", "align_corners"} <= best.keys()


@pytest.mark.usefixtures("tiny")
def test_same_seed_same_run(flags: list[str], tmp_path: Path) -> None:
    """A run depends on its seed alone, not on the number of loading processes."""
    train.main([*flags, "--epochs", "1"])
    train.main([*flags, "--epochs", "1", "--name", "y", "--workers", "2"])
    train.main([*flags, "--epochs", "1", "--name", "z", "--seed", "1"])
    runs = tmp_path / "all runs"
    assert_same_run(runs / "x", runs / "y")
    assert log(runs / "x")[0]["loss"] != log(runs / "z")[0]["loss"]


@pytest.mark.usefixtures("tiny")
def test_epochs_differ(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch has its own order and its own crops."""
    seen = []
    terms = SegmentationCriterion.terms

    def spied(self: SegmentationCriterion, outputs: Any, target: Tensor, ramp: float) -> Terms:
        seen.append(target.clone())
        return terms(self, outputs, target, ramp)

    monkeypatch.setattr(SegmentationCriterion, "terms", spied)
    train.main([*flags, "--epochs", "2"])
    assert len(seen) == 2 * STEPS
    labels = torch.cat(seen).flatten(1)
    assert len(labels.unique(dim=0)) == len(labels)


@pytest.mark.usefixtures("tiny")
def test_best_is_the_best(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best.pt holds the epoch of the highest mIoU, not the last one, also if the run was stopped in between."""
    scores = iter((10, 90, 50))

    def evaluate(*_: Any) -> ConfusionMatrix:
        confusion, right = ConfusionMatrix(3), next(scores)
        confusion.update(torch.tensor([1] * right + [2] * (100 - right)), torch.ones(100, dtype=torch.int64))
        return confusion

    monkeypatch.setattr(train, "evaluate", evaluate)
    with monkeypatch.context() as patch:
        at_loss(patch, 2 * STEPS, press_ctrl_c)
        with pytest.raises(SystemExit):
            train.main(flags)
    train.main(["--resume", str(run)])
    best = load(run / "best.pt")
    assert (best["epoch"], best["miou"]) == (2, log(run)[1]["miou"])
    assert [record["miou"] for record in log(run)] == pytest.approx([0.05, 0.45, 0.25])


@pytest.mark.usefixtures("tiny")
def test_eval_interval(flags: list[str], run: Path) -> None:
    """Epochs without evaluation have no scores; the last one always has."""
    train.main([*flags, "--eval-interval", "2"])
    assert ["miou" in record for record in log(run)] == [False, True, True]


@pytest.mark.usefixtures("tiny")
def test_terms_can_be_switched_off(flags: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--bcl 0 --cpg 0 --ohem` trains with OHEM alone; of a batch it keeps 1/64, which is 131072 for Cityscapes."""
    train.main([*flags, "--epochs", "1", "--bcl", "0", "--cpg", "0", "--ohem"])
    assert log(run)[0]["loss"].keys() == {"total", "ce", "aux"}
    assert "OHEM (p < 0.9, at least 128 pixels), and 0.4 OHEM of the auxiliary head" in capsys.readouterr().out
    cityscapes = train.make_criterion(train.make_config({"dataset": "cityscapes", "ohem": 0.9}))
    assert cityscapes.ohem is not None
    assert cityscapes.ohem.min_kept == 131072


LOSSES = """
import torch

def square(logits, labels):
    return logits.square().mean()

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, logits, labels):
        assert labels.dtype == torch.int64 and logits.shape[2:] == labels.shape[1:]
        return self.scale * logits.abs().mean()

def pixels(logits, labels):
    return logits.mean(1)

def alone(logits):
    return logits.mean()

def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean()

number = 3
"""


@pytest.mark.usefixtures("tiny")
def test_extra_losses(
    flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--extra-loss` trains with a user's own losses, and logs them. A checkpoint alone never runs their code: to go on
    with the run the flag is given again."""
    path = tmp_path / "losses.py"
    path.write_text(LOSSES)
    extra = ["--extra-loss", f"{path}:square=0.5", f"{path}:Scaled=1"]
    with monkeypatch.context() as patch:
        at_loss(patch, STEPS, press_ctrl_c)
        with pytest.raises(SystemExit):
            train.main([*flags, *extra, "--loss-warmup", "5"])
    said = capsys.readouterr().out
    assert "+ 1 CPG3 + 0.5 square + 1 Scaled, and 0.4 CE" in said
    assert "BCL and CPG and square and Scaled gain weight in 5 iterations" in said
    with pytest.raises(UserError, match=r"trained with --extra-loss .*which is code .*: give the same flag again"):
        train.main(["--resume", str(run)])
    with pytest.raises(UserError, match=r"which is code .*: give the same flag again"):
        train.main(["--resume", str(run), *extra[:2]])
    monkeypatch.chdir(tmp_path)  # the same file, by another path
    extra = ["--extra-loss", "losses.py:square=0.5", "./losses.py:Scaled=1"]
    train.main(["--resume", str(run), *extra])
    assert all({"total", "ce", "bcl", "cpg", "aux", "square", "Scaled"} == record["loss"].keys() for record in log(run))
    for entry, message in (
        (f"{path}", "must be FILE.py:NAME=WEIGHT"),
        (f"{path}:square=-1", "must be FILE.py:NAME=WEIGHT"),
        (f"{path}:square=1e-", "must be FILE.py:NAME=WEIGHT"),
        (f"{path}x.py:square=1", r"there is no file .*x\.py"),
        (f"{path}:cubic=1", r"losses\.py has no function or module cubic"),
        (f"{path}:number=1", r"losses\.py has no function or module number"),
        (f"{run / 'broken.py'}:square=1", r"broken\.py fails with SyntaxError"),
        (f"{run / 'ours.py'}:cpg=1", "'cpg' has the name of a term of ours"),
        (f"{run / 'leaves.py'}:x=1", r"leaves\.py fails with SystemExit"),
        (
            f"{path}:pixels=1",
            r"fails on a trial \(pixels\), TypeError: .* returns a scalar tensor, not .*: take the mean",
        ),
        (f"{path}:alone=1", r"fails on a trial \(alone\), TypeError: alone\(\) takes 1 positional argument"),
    ):
        (run / "leaves.py").write_text("raise SystemExit(2)")
        (run / "broken.py").write_text("def")
        (run / "ours.py").write_text("cpg = print")
        with pytest.raises(UserError, match=message):
            train.main([*flags, "--name", "y", "--extra-loss", entry])
    with pytest.raises(UserError, match="names square twice"):
        train.main([*flags, "--name", "y", "--extra-loss", f"{path}:square=1", f"{path}:square=2"])
    assert not run.with_name("y").exists()
    measured = ["--extra-loss", f"{path}:accuracy=1", "--log-grad-share", "2"]  # of no gradient
    train.main([*flags, "--name", "z", "--epochs", "1", *measured])
    assert log(run.with_name("z"))[0]["grad_share"]["accuracy"] == 0


@pytest.mark.usefixtures("tiny")
def test_pretrained(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--pretrained` starts from the weights of another run, with a report."""
    train.main([*flags, "--epochs", "1"])
    best = tmp_path / "all runs" / "x" / "best.pt"
    train.main([*flags, "--name", "y", "--pretrained", str(best), "--epochs", "1", "--lr", "1e-12", "--warmup", "1"])
    count = len(TinyNet(3).state_dict())
    assert f"{count} of the model's {count} tensors matched" in capsys.readouterr().out
    ours, theirs = (load(path)["model"]["final_layer.weight"] for path in (best, tmp_path / "all runs/y/last.pt"))
    torch.testing.assert_close(ours, theirs)


def test_without_pretrained(flags: list[str], run: Path) -> None:
    """A network that needs public weights says at the start what it costs to train without; with them it does not."""

    def weights(*more: str) -> str:
        config = train.make_config(parse_flags([*flags, "--model", "scr_resnet18", *more]))
        return train.Trainer(
            config, *(open_dataset("folder", config.data_root, split) for split in ("train", "val"))
        ).weights

    assert "mIoU of 73" in weights()
    assert "mIoU" not in weights("--name", "y", "--pretrained", str(run / "last.pt"))


@pytest.mark.usefixtures("tiny")
def test_every_knob_reaches_its_place(flags: list[str]) -> None:
    """What is asked for is what is trained with: none of these has its default."""
    given = (
        "--lr 0.3 --momentum 0.5 --wd 0.01 --power 2 --warmup 3 --scale-range 0.9 1.1 --crop-size 64 96 --batch-size 3 "
        "--epochs 5 --bcl 0.2 --cpg 0.3 --cpg-kernel 5 --ohem 0.8 --aux-weight 0.7 --no-channels-last --amp bf16 "
        "--impl torch --seed 9 --workers 0"
    )
    config = train.make_config(parse_flags([*flags, *given.split()]))
    folder = [open_dataset("folder", config.data_root, split) for split in ("train", "val")]
    trainer = train.Trainer(config, *folder)
    (group,) = trainer.state.optimizer.param_groups
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.5, 0.01)
    steps = 5 * (len(folder[0]) // 3)
    factor = trainer.state.scheduler.lr_lambdas[0]
    assert [factor(i) for i in (0, 1, 4)] == pytest.approx([lr_factor(i, steps, 2.0, 3) for i in (0, 1, 4)])
    criterion = trainer.criterion
    assert (criterion.bcl, criterion.cpg) == (BCL(0.2), CPG(0.3, 5))
    assert criterion.ohem == OHEM(0.8, 3 * 64 * 96 // 64)
    assert (criterion.aux_weight, criterion.impl) == (0.7, "torch")
    assert trainer.compute == Compute(torch.device("cpu"), torch.bfloat16, channels_last=False)
    samples = trainer.train_loader.dataset
    assert (samples.augmentation, samples.seed) == (Augmentation((64, 96), (0.9, 1.1)), 9)
    assert samples.augmentation.colour_jitter == 0.1
    assert (trainer.sampler.batch_size, trainer.sampler.seed, trainer.workers) == (3, 9, 0)


@pytest.mark.usefixtures("tiny")
def test_compiled_network(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--compile` compiles the network and changes neither what is learnt nor the names in a checkpoint."""
    backends = []

    def compile_traced(model: TinyNet) -> None:  # without the minutes that code generation takes
        backends.append("aot_eager")
        original(model, backend=backends[-1])

    original = TinyNet.compile
    train.main([*flags, "--epochs", "1"])
    plain = load(run / "last.pt")
    monkeypatch.setattr(TinyNet, "compile", compile_traced)
    train.main([*flags, "--epochs", "1", "--name", "y", "--compile"])
    compiled = load(run.with_name("y") / "last.pt")
    assert len(backends) == 1
    assert plain["model"].keys() == compiled["model"].keys()
    for name, expected in plain["model"].items():
        torch.testing.assert_close(compiled["model"][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("tiny")
def test_a_network_that_does_not_compile(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler that works, `--compile` ends in a sentence."""

    def broken(*_: Any) -> None:
        raise OSError("no C++ compiler")

    original = TinyNet.compile
    monkeypatch.setattr(TinyNet, "compile", lambda model: original(model, backend=broken))
    with pytest.raises(UserError, match=r"^torch\.compile failed \(.*no C\+\+ compiler.*\): --no-compile trains"):
        train.main([*flags, "--compile"])


@pytest.mark.usefixtures("tiny")
def test_weights_that_are_not_finite(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with infinite gradients in the last step of an epoch: the weights are named, not the loss."""
    make = NETWORKS["bcmfnet"]

    def overflowing(*arguments: Any) -> TinyNet:
        network = make(*arguments)
        network.final_layer.weight.register_hook(lambda gradient: gradient * math.inf)
        return network

    monkeypatch.setitem(NETWORKS, "bcmfnet", overflowing)
    with pytest.raises(UserError, match=r"weights are not finite after epoch 1, step \d+, though the loss was"):
        train.main([*flags, "--epochs", "1", "--batch-size", "9"])


def test_check_data_only(flags: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--check-data` reads everything and trains nothing."""
    train.main([*flags, "--check-data"])
    output = capsys.readouterr().out
    assert "all images and labels can be used" in output
    assert re.search(r"floor +\d+\.\d % ", output)  # each class's share
    assert not run.exists()


# Going on


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("call", [0, 5, STEPS - 1])
def test_ctrl_c_in_training(
    call: int, flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C saves the run at the step where it is; resumed, it ends as if nothing had happened, bit for bit."""
    train.main([*flags, "--name", "whole"])
    with monkeypatch.context() as patch:
        at_loss(patch, call, press_ctrl_c)
        with pytest.raises(SystemExit, match="130"):
            train.main(flags)
    saved = load(run / "last.pt")
    expected = divmod(call + 1, STEPS) if call != STEPS - 1 else (0, STEPS)  # an epoch ends with its evaluation
    assert (saved["epoch"], saved["step"]) == expected
    assert f"python -m bcmf_ext.train --resume '{run}'" in capsys.readouterr().out

    train.main(["--resume", str(run), "--workers", "1"])
    assert_same_run(run, tmp_path / "all runs" / "whole")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.thorough)]
)
def test_other_signals_save_too(
    number: int, status: int, flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SLURM sends before it kills, and a terminal that is closed, save the run as Ctrl-C does, though the loading
    processes get the signal, too; a second one ends it at once, and under nohup SIGHUP is nothing."""
    flags = [*flags, "--epochs", "500", "--workers", "1"]
    process = in_background(flags, start_new_session=True)
    wait_for_epoch(process, run)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in said) == (status, False)
    saved = load(run / "last.pt")
    assert len(log(run)) == saved["epoch"] >= 1
    assert saved["step"] > 0

    resumed = in_background(["--resume", str(run)], start_new_session=True)
    wait_for_epoch(resumed, run, saved["epoch"] + 1)
    for _ in range(2):
        os.kill(resumed.pid, number)
        time.sleep(0.001)  # two at once would be one
    resumed.communicate(timeout=60)
    assert resumed.returncode in (status, -number)
    assert load(run / "last.pt")["epoch"] >= saved["epoch"]

    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    with train.StopSignals() as stopped:
        assert signal.SIGHUP not in stopped._before
    assert not stopped()


def test_closed_output_loses_nothing(flags: list[str], run: Path) -> None:
    """`train | head`: nobody reads any more, and the run goes on, with a word."""
    process = in_background([*flags, "--epochs", "4"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert (
        "warning: what is printed has nowhere to go any more (Broken pipe); the command goes on"
        in process.stderr.read()
    )
    assert load(run / "last.pt")["epoch"] == len(log(run)) == 4


@pytest.mark.thorough
def test_no_output_at_all(flags: list[str], run: Path) -> None:
    """Started with stdout and stderr closed (`>&- 2>&-`) a run does as any other, and no file of it takes their place,
    which libraries write to."""
    process = in_background(flags, preexec_fn=lambda: os.closerange(0, 3))
    assert process.wait(timeout=60) == 0
    assert load(run / "last.pt")["epoch"] == len(log(run)) == 3
    assert re.fullmatch(r"process \d+ on \S+\n", (run / ".lock").read_text())


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_killed_loading_process(epoch: int, flags: list[str], run: Path, tmp_path: Path) -> None:
    """The system kills it when memory is short: a sentence, and a run that goes on where it was, with fewer."""
    process = in_background([*flags, "--epochs", "300", "--workers", "2"])
    wait_for_epoch(process, run, epoch)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("no /proc to find the loading processes in")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)  # the other one lives, and must not be waited for
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert re.search(
        r"^error: A process that loads data died \(.*\), .* fewer --workers; .* --resume '.*' when that is mended\.$",
        said,
    )
    saved = load(run / "last.pt")
    assert (saved["epoch"], saved["scheduler"]["last_epoch"]) == (len(log(run)), saved["epoch"] * STEPS + saved["step"])


@pytest.mark.usefixtures("tiny")
def test_no_picture_ends_a_run(
    tmp_path: Path, flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of one row or column, names of 255 bytes, and whatever else goes wrong in drawing: the run goes on."""
    copy = write_folder(tmp_path / "odd")
    for kind in ("images", "labels"):
        for name, size in (("val0", (1, 3000)), ("val1", (1000, 1)), ("val2", (96, 72))):
            path = copy / kind / "val" / f"{name}.png"
            Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)
        path.rename(path.with_name("é" * 125 + ".png"))
    train.main([*flags, "--data-root", str(copy), "--epochs", "1"])
    assert capsys.readouterr().err == ""
    pictures = list((run / "pictures").iterdir())
    assert len(pictures) == 3
    for picture in pictures:
        assert max(Image.open(picture).size) < 2200

    def fail(*_: Any) -> None:
        raise MemoryError

    for drawing in ("draw_curves", "draw_sample"):
        monkeypatch.setattr(report, drawing, fail)
    train.main([*flags, "--name", "y", "--epochs", "2"])
    said = capsys.readouterr().err
    assert "warning: curves.png could not be drawn (MemoryError); the run goes on." in said
    assert "warning: the picture of " in said
    assert load(run.with_name("y") / "last.pt")["epoch"] == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_best_that_is_damaged(
    damage: str, flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is noticed when the run goes on, made anew from then on, and recommended only if it can be used."""

    def spoil() -> None:
        (run / "best.pt").unlink() if damage == "gone" else (run / "best.pt").write_bytes(b"half")

    with monkeypatch.context() as patch:
        at_loss(patch, 2 * STEPS, press_ctrl_c)
        with pytest.raises(SystemExit):
            train.main(flags)
    spoil()
    capsys.readouterr()
    train.main(["--resume", str(run)])
    out, err = capsys.readouterr()
    assert re.search(r"warning: .*best\.pt.*; the weights of epoch \d, the best so far, are gone, and those of", err)
    assert load(run / "best.pt")["epoch"] == 3
    assert f"--checkpoint '{run / 'best.pt'}'" in out
    spoil()
    train.main(["--resume", str(run)])
    assert re.search(
        r"is finished, .*\nbut its weights are gone: .*last\.pt has those of the last", capsys.readouterr().out
    )
    monkeypatch.setattr(train.Run, "what_is_wrong_with_best", lambda _: "There is no best.pt.")
    train.main([*flags, "--name", "y", "--epochs", "1"])
    assert "--checkpoint '" + str(run.with_name("y") / "last.pt") in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_run_of_version_0_1_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that version 0.1.0 was stopped in goes on, and ends as that version would have ended it; its best.pt is
    evaluated and predicts."""
    monkeypatch.chdir(tmp_path)
    old = Path(__file__).parent / "data" / "run-0.1.0"
    run = Path("runs", "stopped")
    shutil.copytree(old, run)
    write_folder(Path("data"))
    checkpoint = ["--checkpoint", str(run / "best.pt"), "--device", "cpu"]
    evaluate.main([*checkpoint, "--workers", "0"])
    first, *_ = expected = [json.loads(line) for line in (old / "whole.jsonl").read_text().splitlines()]
    found = json.loads((run / "metrics.json").read_text())["mean"]["iou"]
    assert found == pytest.approx(first["miou"], abs=1e-3)
    predict.main([*checkpoint, "data/images/val"])
    assert len(list(Path("predictions").iterdir())) == 6
    train.main(["--resume", str(run)])
    for ours, theirs in zip(log(run), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_share"] == pytest.approx(theirs["grad_share"], rel=1e-3)
        assert ours["miou"] == pytest.approx(theirs["miou"], abs=0.01)


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_in_evaluation(flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during an evaluation loses neither the epoch before it nor the evaluation."""
    train.main([*flags, "--name", "whole"])
    evaluate = train.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args: (press_ctrl_c(), evaluate(*args))[1])
        with pytest.raises(SystemExit, match="130"):
            train.main(flags)
    assert log(run) == [] if (run / "log.jsonl").exists() else True
    train.main(["--resume", str(run / "last.pt")])
    assert_same_run(run, tmp_path / "all runs" / "whole")


@pytest.mark.usefixtures("tiny")
def test_second_ctrl_c_stops_at_once(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who presses Ctrl-C twice does not wait for anything; the checkpoint on disk stays good."""
    at_loss(monkeypatch, STEPS + 1, lambda _: (press_ctrl_c(), press_ctrl_c(), time.sleep(10))[0])
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    assert (load(run / "last.pt")["epoch"], len(log(run))) == (1, 1)


def test_kill_and_resume(flags: list[str], run: Path, tmp_path: Path) -> None:
    """kill −9 during an epoch, with the real network and loading processes: no file is corrupt, and the resumed run
    equals one that was not killed."""
    command = [sys.executable, "-m", "bcmf_ext.train", *flags, "--epochs", "4", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (run / "last.pt").exists() or load(run / "last.pt")["epoch"] < 1:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    for path in run.rglob("*.png"):
        Image.open(path).verify()
    assert 1 <= len(log(run)) < 4  # the log may be an epoch ahead of last.pt; resuming drops that epoch

    train.main(["--resume", str(run), "--workers", "0"])
    train.main([*flags, "--name", "whole", "--epochs", "4"])
    assert_same_run(run, tmp_path / "all runs" / "whole")


@pytest.mark.usefixtures("tiny")
def test_resume_by_name_and_finished(flags: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare --resume finds the run by its name; a finished run says so and stays as it is."""
    train.main([*flags, "--epochs", "1"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    train.main([*flags, "--epochs", "1", "--resume"])
    assert "finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("tiny")
def test_a_run_keeps_its_precision(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--amp auto` has measured when the run began decides when it goes on, is evaluated and predicts, whatever a
    measurement would say by then."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(engine, "measure_bf16", lambda: 1.5)
    computes: list[Compute] = []
    init = train.Trainer.__init__

    def spied(self: train.Trainer, *arguments: Any) -> None:
        init(self, *arguments)
        computes.append(self.compute)

    monkeypatch.setattr(train.Trainer, "__init__", spied)
    with monkeypatch.context() as patch:
        at_loss(patch, STEPS, press_ctrl_c)
        with pytest.raises(SystemExit):
            train.main([*flags, "--amp", "auto"])
    monkeypatch.setattr(engine, "measure_bf16", lambda: 0.5)
    train.main(["--resume", str(run)])
    assert [compute.dtype for compute in computes] == [None, None]
    for name in ("last.pt", "best.pt"):
        assert load(run / name)["bf16_ratio"] == 1.5
        assert Predictor(run / name, "cpu").network.dtype == torch.float32
    assert Predictor(run, "cpu", amp="bf16").network.dtype == torch.bfloat16


@pytest.mark.usefixtures("tiny")
def test_last_that_contradicts_itself(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that no run can have, or of another network, is a sentence, not a traceback hours later."""
    at_loss(monkeypatch, STEPS, press_ctrl_c)
    with pytest.raises(SystemExit):
        train.main(flags)
    saved = load(run / "last.pt")
    other = {0: {"momentum_buffer": torch.zeros(3)}}
    for change, message in (
        ({"step": 2}, "after 2 of 4 steps, but its schedule is at iteration 5"),
        ({"step": STEPS + 1}, "after 5 of 4 steps"),
        ({"optimizer": {**saved["optimizer"], "state": other}}, "the field optimizer belongs to another network"),
        ({"optimizer": {**saved["optimizer"], "state": {99: other[0]}}}, "the field optimizer belongs to another"),
        ({"model": TinyNet(4).state_dict()}, "a bcmfnet of 3 classes, but its weights are others"),
        ({"config": {**saved["config"], "a_new_setting": 1}}, "was written by a newer bcmf_ext, which has a setting"),
        ({"scheduler": {**saved["scheduler"], "get_lr": 1}}, None),  # another version's, of no use to us
    ):
        torch.save({**saved, **change}, run / "last.pt")
        if message is None:
            train.main(["--resume", str(run)])
            continue
        with pytest.raises(UserError, match=message):
            train.main(["--resume", str(run)])


@pytest.mark.usefixtures("tiny")
def test_what_cannot_be_resumed(flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights alone, other settings, other data: each is refused with its reason."""
    at_loss(monkeypatch, STEPS, press_ctrl_c)
    with pytest.raises(SystemExit):
        train.main(flags)
    with pytest.raises(UserError, match=r"best\.pt holds weights only"):
        train.main(["--resume", str(run / "best.pt")])
    with pytest.raises(UserError, match="--model bcmfnet, not ddrnet_s"):
        train.main(["--resume", str(run), "--dataset", "folder", "--model", "ddrnet_s"])
    with pytest.raises(UserError, match="--dataset folder, not demo"):
        train.main(["--resume", str(run), "--dataset", "demo"])
    other = write_folder(tmp_path / "other", train=5)
    with pytest.raises(UserError, match="trained on 9 images, but the training split has 5 now"):
        train.main(["--resume", str(run), "--data-root", str(other)])
    other.joinpath("classes.txt").write_text("a\nb\nc")
    with pytest.raises(UserError, match="knows the classes floor, wall, red box, but the data has a, b, c"):
        train.main(["--resume", str(run), "--data-root", str(other)])
    with pytest.raises(UserError, match=r"x exists already"):
        train.main(flags)


# Trouble


@pytest.mark.usefixtures("tiny")
def test_non_finite_loss(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN loss stops the run with its terms; the batch is there to look at, and last.pt is from before."""
    at_loss(monkeypatch, STEPS + 2, lambda loss: {**loss, **{name: loss[name] * math.nan for name in ("total", "cpg")}})
    with pytest.raises(UserError, match=r"epoch 2, step 3 \(total nan, ce [0-9.]+, bcl [0-9.]+, cpg nan, .*last\.pt"):
        train.main(flags)
    stopped = load(run / "nonfinite-batch.pt")
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    assert stopped["images"].shape == (2, 3, 64, 64)
    assert stopped["labels"].shape == (2, 64, 64)
    assert stopped["images"].dtype == stopped["labels"].dtype == torch.uint8
    saved = load(run / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--batch-size 10", "9 images, fewer than one batch of 10"),
        ("--device cuda:99", "--device cuda:99 cannot be used"),
        ("--impl cuda", "--impl cuda"),
        ("--data-root no/such/folder", "no/such/folder does not exist"),
        ("--pretrained no/such/file", "no/such/file"),
        ("--resume no/such/run", "no checkpoint no/such/run"),
    ],
)
def test_stops_before_training(changes: str, message: str, flags: list[str], run: Path) -> None:
    """What cannot work is said before anything is written."""
    with pytest.raises(UserError, match=message):
        train.main([*flags, *changes.split()])
    assert not run.exists()


def test_a_terminal_of_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot show is a "?", and no reason to stop."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    run_command(lambda: print("3 × 4"))
    assert shown.getvalue() == b"3 ? 4\n"


@pytest.mark.usefixtures("tiny")
def test_error_in_a_loading_process(
    flags: list[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that breaks after the check is one sentence on stderr and status 2, though a loading process meets it; the
    steps before are saved, and the run goes on as if nothing had happened when the file is mended."""
    copy = write_folder(tmp_path / "copy")
    flags = [*flags, "--data-root", str(copy), "--workers", "1", "--epochs", "2"]
    train.main([*flags, "--name", "whole"])
    broken = copy / "labels" / "train" / "train3.png"
    content = broken.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train.SegmentationDataset, "check", lambda self: [1] * broken.write_bytes(b"no picture"))
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run_command(lambda: train.main(flags))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken} cannot be read")
    assert error.endswith(f"; the run is saved: go on with --resume '{run}' when that is mended.\n")
    assert len(error.splitlines()) == 1
    saved = load(run / "last.pt")
    assert saved["scheduler"]["last_epoch"] == saved["epoch"] * STEPS + saved["step"]
    assert saved["step"] > 0
    broken.write_bytes(content)
    train.main(["--resume", str(run)])
    assert_same_run(run, tmp_path / "all runs" / "whole")
