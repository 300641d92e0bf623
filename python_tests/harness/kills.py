"""Stops tiny runs at random moments and goes on with them until they are finished: each equals one never stopped.

    cd python_tests && python -m harness.kills --kills 100 --terminations 40 --interrupts 40

Runs are children of this process, which has imported everything: each is killed, not the seconds before it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bcmf_ext import train
from bcmf_ext.errors import run_command
from bcmf_ext.files import TEMPORARY
from bcmf_ext.models import NETWORKS
from harness.tiny import TinyNet, write_folder

TIMINGS = ("seconds", "images_per_second")
EPOCHS = 3
EXITS: dict[int, set[int]] = {signal.SIGKILL: {-9, 0}, signal.SIGTERM: {143, -15, 0}, signal.SIGINT: {130, 0}}


def start(output: Path, flags: list[str]) -> int:
    """Begins a run in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    with open(output, "ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    try:
        run_command(lambda: train.main(flags))
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    # With sys.exit the child would end what the parent began. Loading processes see that their parent is gone.
    os._exit(code or 0)


def wait(child: int) -> int:
    """The exit status; minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_of(run: Path) -> list[Any]:
    """Everything that must not depend on where a run was stopped."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]
    last, best = (torch.load(run / name, weights_only=True) for name in ("last.pt", "best.pt"))
    momentum = [entry["momentum_buffer"].tolist() for entry in last["optimizer"]["state"].values()]
    weights = [{name: tensor.tolist() for name, tensor in saved["model"].items()} for saved in (last, best)]
    return [log, momentum, weights, last["scheduler"], last["epoch"], last["best_epoch"], best["epoch"]]


def stop_and_go_on(folder: Path, flags: list[str], number: int, rng: random.Random, longest: float) -> tuple[int, str]:
    """Stops a run by signals of this number until one comes too late; returns how often it was stopped, and what was
    wrong: nothing, if all is well."""
    run, said = folder / "runs" / "x", folder / "said.txt"
    for stops in range(100):
        resume = ["--resume", str(run)] if any((run / name).exists() for name in ("last.pt", "last-1.pt")) else flags
        said.unlink(missing_ok=True)
        child = start(said, resume)
        if stops < 3 and rng.random() < 0.8:
            time.sleep(rng.uniform(0, longest))
            os.kill(child, number)
        status = wait(child)
        # The loading processes of a killed trainer complain.
        if status not in EXITS[number] or (status != -signal.SIGKILL and "Traceback" in said.read_text()):
            return stops, f"exit {status}: {said.read_text()}"
        if status == 0:
            left = [path for path in run.rglob("*") if TEMPORARY.fullmatch(path.name)]
            return stops, f"temporary files are left: {left}" if left else ""
    return stops, "it never ends"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("kills", "terminations", "interrupts"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in EXITS.keys() - {signal.SIGKILL}:  # A shell lets what it starts with & ignore Ctrl-C.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    NETWORKS["bcmfnet"] = TinyNet
    rng, stopped = random.Random(arguments.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        data = write_folder(Path(place, "data"))
        flags = f"--dataset folder --batch-size 2 --epochs {EPOCHS} --crop-size 64 64 --device cpu --amp off".split()
        flags += ["--data-root", str(data), "--name", "x"]

        def run_flags(folder: Path, workers: int) -> list[str]:
            folder.mkdir()
            return [*flags, "--output-dir", str(folder / "runs"), "--workers", str(workers)]

        durations = {}
        for workers in (0, 2):
            whole, began = Path(place, f"whole-{workers}"), time.monotonic()
            status = wait(start(Path(place, "said.txt"), run_flags(whole, workers)))
            assert status == 0, Path(place, "said.txt").read_text()
            durations[workers] = time.monotonic() - began
        expected = state_of(whole / "runs" / "x")
        for name, number in (
            ("kills", signal.SIGKILL),
            ("terminations", signal.SIGTERM),
            ("interrupts", signal.SIGINT),
        ):
            trial = 0
            while stopped[name] < getattr(arguments, name):
                folder, workers = Path(place, f"{name}-{trial}"), 2 * (trial % 2)
                stops, wrong = stop_and_go_on(folder, run_flags(folder, workers), number, rng, durations[workers])
                if not wrong and state_of(folder / "runs" / "x") != expected:
                    wrong = "the finished run is another one"
                if wrong:
                    sys.exit(f"{name}, trial {trial}, {workers} workers, seed {arguments.seed}: {wrong}")
                stopped[name] += stops
                trial += 1
            print(f"{stopped[name]} {name} in {trial} runs, all equal to one that was not stopped", flush=True)


if __name__ == "__main__":
    main()
