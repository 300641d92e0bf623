"""The flags: their defaults, what they accept, and what a resumed run may change."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from bcmf_ext.config import (
    Config,
    command_line,
    make_config,
    make_criterion,
    parse_flags,
    read_saved_config,
    resumed_config,
)
from bcmf_ext.data import DATASETS, open_dataset
from bcmf_ext.errors import UserError
from bcmf_ext.losses.rmi_loss import RMILoss
from bcmf_ext.report import loss_words


def configure(flags: str = "") -> Config:
    return make_config(parse_flags(shlex.split(flags)))


# Defaults


def test_defaults() -> None:
    """The defaults of docs/definitions.md, Networks and their training: a changed one changes everybody's results."""
    expected = {
        "cityscapes": ((1024, 1024), (0.5, 2.0), 8, 484, 0.01),
        "camvid": ((360, 480), (0.5, 2.0), 16, 200, 0.05),
    }
    for dataset, (crop, scale, batch, epochs, lr) in expected.items():
        config = configure(f"--dataset {dataset}")
        assert (config.crop_size, config.scale_range, config.batch_size, config.epochs, config.lr) == (
            crop,
            scale,
            batch,
            epochs,
            lr,
        )
    config = configure()
    assert (config.dataset, config.model, config.batch_size, config.scale_range) == ("demo", "bcmfnet", 8, (0.75, 1.5))
    assert config.crop_size == open_dataset("demo", None, "val").image(0).shape[:2]
    assert (config.momentum, config.weight_decay, config.power, config.warmup) == (0.9, 5e-4, 0.9, None)
    assert (config.ohem, config.bcl, config.cpg, config.cpg_kernel, config.aux_weight) == (None, 0.1, None, 3, 0.4)


def test_recipes_and_options_are_knobs() -> None:
    """What a data set's class asks for has a flag: its recipe's settings, and the options of its labels."""
    knobs = {entry.name for entry in fields(Config)}
    for dataset in DATASETS.values():
        assert {entry.name for entry in fields(dataset.recipe)} | set(dataset.options) <= knobs


def test_help_names_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    """Each knob is a flag, its help says what it means, and the defaults of each dataset stand there."""
    with pytest.raises(SystemExit, match="0"):
        parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for entry in fields(Config):
        assert f"--{entry.name.replace('_', '-')}" in text
        assert entry.metadata["meaning"].replace("%%", "%") in text
    assert "demo 0.05, cityscapes 0.01, camvid 0.05" in text


# Flags


def test_given_flags_win() -> None:
    """What is given replaces the recipe, in both spellings, and nothing else."""
    config = configure("--dataset camvid -b 4 --wd 0 -j 2 --crop-size 64 96 --no-channels-last --lr 1")
    changes = {"batch_size": 4, "weight_decay": 0.0, "workers": 2, "crop_size": (64, 96), "lr": 1.0}
    assert asdict(config) == {**asdict(configure("--dataset camvid")), **changes, "channels_last": False}


def test_learning_rate_follows_the_batch_size() -> None:
    """A smaller batch that fits one's machine does not spoil the recipe; a rate that was given stays."""
    assert configure("--dataset camvid --batch-size 8").lr == 0.025
    assert configure("--dataset cityscapes --batch-size 12").lr == 0.015
    assert configure("--dataset camvid --batch-size 8 --lr 0.05").lr == 0.05
    assert configure("--dataset camvid --batch-size 16").lr == configure("--dataset camvid").lr == 0.05


def test_optional_values() -> None:
    """`--ohem` and `--cpg` without a number mean their default; 0 switches BCL and CPG off."""
    assert configure("--ohem").ohem == 0.9
    assert configure("--ohem 0.7").ohem == 0.7
    assert configure("--cpg --cpg-kernel 5").cpg is None
    config = configure("--cpg 0 --bcl 0")
    assert (config.cpg, config.bcl) == (0.0, 0.0)
    assert parse_flags(["--resume"]) == {"resume": "auto"}
    assert parse_flags(["--resume", "runs/x"]) == {"resume": "runs/x"}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--dataset folder --data-root 'my data' --reduce-zero-label --name 'a run' --pretrained w.pt --ohem --cpg 0",
        "--dataset folder --data-root d --binary-masks --ignore-label 7 --label-suffix=-mask",
        "--dataset camvid --warmup 0 --no-channels-last --device cpu --seed 3 --amp off --scale-range 1 1",
    ],
)
def test_command_line_says_it_all(flags: str) -> None:
    """The printed command, typed again, gives the same run, even after defaults have changed."""
    config = configure(flags)
    typed = shlex.split(command_line(config).replace("\\\n", " "))
    assert typed[:3] == ["python", "-m", "bcmf_ext.train"]
    assert make_config(parse_flags(typed[3:])) == config
    switches = {"reduce_zero_label", "binary_masks"}  # which have no flag that leaves them off
    spelt = {
        entry.name
        for entry in fields(Config)
        if (value := getattr(config, entry.name)) not in (None, ()) and (value or entry.name not in switches)
    }
    assert set(parse_flags(typed[3:])) == spelt
    assert all(len(line) <= 110 for line in command_line(config).splitlines())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 1", "batch norm"),
        ("--batch-size 0", "--batch-size is 0, but must be at least 2"),
        ("--epochs 0", "--epochs"),
        ("--ignore-label -1", "--ignore-label is -1, but must be an id from 0 to 65535"),
        ("--ignore-label 65536", "--ignore-label"),
        ("--label-suffix ''", "--label-suffix is , but must be a part of a file name"),
        ("--label-suffix a/b", "--label-suffix"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--momentum 1", "--momentum"),
        ("--weight-decay -1", "--weight-decay"),
        ("--weight-decay 1e38", "--weight-decay is 1e[+]38, but must be at least 0, and at most 1000"),
        ("--power -1", "--power"),
        ("--warmup -1", "--warmup"),
        ("--crop-size 64 32", "--crop-size is 64 32, but must be from 64 to 32768 on each side"),
        ("--crop-size 64 1000000000", "--crop-size"),
        ("--scale-range 2 0.5", "--scale-range"),
        ("--scale-range 0 1", "--scale-range"),
        ("--workers -1", "--workers"),
        ("--workers 100000", "--workers is 100000, but must be from 0 to 1000"),
        ("--ohem 1.5", "--ohem"),
        ("--bcl -1", "--bcl"),
        ("--cpg -1", "--cpg"),
        ("--cpg inf", "--cpg"),
        ("--rmi -1", "--rmi"),
        ("--loss bce --ohem", "--ohem .* left out beside --loss bce"),
        ("--aux-weight -1", "--aux-weight"),
        ("--seed -1", "--seed"),
        ("--eval-interval 0", "--eval-interval"),
    ],
)
def test_impossible_values(flags: str, message: str) -> None:
    """A value that cannot work is refused by name, not by whatever fails on it later."""
    with pytest.raises(UserError, match=message):
        configure(flags)


# Resuming


def test_resume_keeps_the_settings() -> None:
    """A resumed run has the saved settings; only where and how it is computed may differ."""
    saved = asdict(configure("--dataset camvid --lr 0.2 --workers 3"))
    flags = parse_flags(["--resume", "runs/x", "--workers", "1", "--device", "cpu", "--lr", "0.2"])
    config = resumed_config(saved, flags, Path("elsewhere/x"))
    place = {"name": "x", "output_dir": "elsewhere"}
    assert asdict(config) == {**saved, "workers": 1, "device": "cpu", **place}


def test_settings_of_a_file() -> None:
    """What a checkpoint holds is completed, where knobs have joined since, and otherwise refused with file and name:
    it may be of a newer version, or nobody's."""
    saved = asdict(configure("--dataset camvid --lr 0.2"))
    older = {name: value for name, value in saved.items() if name not in ("power", "ohem")}
    assert read_saved_config(older, Path("last.pt")) == saved
    for change, message in (
        ({"a_new_setting": 1}, "last.pt was written by a newer bcmf_ext, which has a setting 'a_new_setting'"),
        ({"epochs": "x"}, "In last.pt the setting epochs is 'x', but must be int"),
        ({"epochs": True}, "the setting epochs is True, but must be int"),
        ({"epochs": 10**5000}, "the setting epochs is an endless number, but must be int"),
        ({"bcl": 10**400}, "the setting bcl is an endless number, but must be float"),
        ({"power": 1e308}, "--power is 1e[+]308, but must be at least 0, and at most 1000"),
        ({"epochs": 0}, "The settings in last.pt cannot be: --epochs is 0, but must be at least 1"),
        ({"lr": None}, "the setting lr is None, but must be float"),
        ({"crop_size": (64,)}, r"the setting crop_size is \(64,\), but must be tuple"),
        ({"amp": "tf32"}, "the setting amp is 'tf32', and this version knows only auto, .*: update the package"),
        ({"dataset": "ade20k"}, "the setting dataset is 'ade20k', and this version knows only demo"),
    ):
        with pytest.raises(UserError, match=message):
            read_saved_config({**saved, **change}, Path("last.pt"))
    with pytest.raises(UserError, match="the setting dataset is None"):
        read_saved_config({}, Path("last.pt"))


@pytest.mark.parametrize(
    "flags", ["--dataset demo", "--model ddrnet_s", "--epochs 300", "--cpg 0", "--crop-size 64 64"]
)
def test_resume_refuses_another_run(flags: str) -> None:
    """What would change what is learnt is refused, with both values: it would be neither the old run nor a new one."""
    saved = asdict(configure("--dataset camvid"))
    flag, value = flags.split(maxsplit=1)
    with pytest.raises(UserError, match=f"{flag} .*, not {value}"):
        resumed_config(saved, parse_flags(["--resume", *flags.split()]), Path("runs/x"))


# The loss that the flags ask for


def test_losses_of_the_papers(tmp_path: Path) -> None:
    """Protects `--loss` and `--rmi`, which has the CPG paper's weight when none is given; a loss of the user's own
    cannot take its name."""
    criterion = make_criterion(configure("--loss bce --rmi --cpg"))
    assert criterion.first == "bce"
    ((name, (weight, function)),) = criterion.extra.items()
    assert (name, weight, type(function)) == ("rmi", 0.5, RMILoss)
    assert loss_words(criterion, "cpu", 0, 10).startswith("BCE + 0.1 BCL + 1 CPG3 + 0.5 RMI, and 0.4 BCE of the auxili")
    assert not make_criterion(configure()).extra
    file = tmp_path / "own.py"
    file.write_text("def rmi(logits, labels): return logits.sum()")
    with pytest.raises(UserError, match="names a loss rmi, as --rmi does"):
        make_criterion(configure(f"--rmi 0.3 --extra-loss {file}:rmi=1"))
