"""The benches run, on tiny sizes: a GPU, when there is one, must not be wasted on a script that does not."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ptx
from PIL import Image

from bcmf_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


needs_bench = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench is not there")


@needs_bench
def test_pilot_plans_and_compares(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects what decides the losses' defaults: every arm once, the best of each term with a warm-up, then five
    seeds, nothing twice, in whatever slices; and signs and verdicts of the paired differences."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "experiments"))
    pilot = importlib.import_module("pilot")
    challenger = "2 CPG3"

    def run(arm: Any, seed: int, *_: Any) -> dict[str, Any]:
        score = 0.4 + 0.01 * seed + 0.05 * (arm.name in ("0.4 BCL flipped, step 1+2", "1.5 CPG7"))
        score += 0.002 * (1 + seed % 2) * (arm.name == pilot.OLD_DEFAULT.name)
        scores = {**dict.fromkeys(pilot.SCORES, score), "selected": 0.01}
        shares = {"last epoch": {"ce": 1.0}}
        return {"arm": arm.name, "seed": seed, "folder": "deleted", **scores, "gradient_share": shares}

    monkeypatch.setattr(pilot, "run", run)
    monkeypatch.setattr(pilot, "halve", lambda source, target: source)
    for minutes in ("0", "1", "1"):
        flags = ["--data", "camvid", "--minutes", minutes, "--output", str(tmp_path), "--challenger", challenger]
        monkeypatch.setattr(sys, "argv", ["pilot.py", *flags])
        pilot.main()
    printed = capsys.readouterr().out
    runs = json.loads((tmp_path / "pilot.json").read_text())["runs"]
    assert printed.count("---") == len(runs)
    names = [run["arm"] for run in runs if run["seed"] == 0]
    assert names[: len(pilot.SINGLE)] == [arm.name for arm in pilot.SINGLE]
    assert names[len(pilot.SINGLE) :] == [
        *(f"{best}, warm-up" for best in ("0.4 BCL flipped, step 1+2", "1.5 CPG7")),
        f"CE + 0.4 BCL + {challenger}",
        *(arm.name for arm in pilot.PAPER if arm.network == "ddrnet_s"),
    ]
    assert len(runs) == len(names) + 4 * (4 + len(pilot.PAPER))
    assert len({(run["arm"], run["seed"]) for run in runs}) == len(runs)
    assert not list(pilot.plan(runs, [challenger]))
    arm = pilot.challenger(pilot.ARMS[challenger])
    assert (arm.bcl, arm.cpg) == (pilot.OLD_DEFAULT.bcl, pilot.ARMS[challenger].cpg)
    assert len(pilot.SINGLE) == 2 + 18 + 7
    assert {arm.bcl.steps for arm in pilot.SINGLE if arm.bcl} == {(1,), (2,), (1, 2)}

    pairs = [0.002, 0.004, 0.002, 0.004, 0.002]
    assert pilot.differences(runs, pilot.OLD_DEFAULT.name, "CE", "miou") == pytest.approx(pairs)
    assert pilot.verdict(pairs) == "+0.28 ± 0.10     "
    assert pilot.verdict([-0.01, 0.01, -0.01, 0.01, 0.01]) == "+0.20 ± 0.98 none"
    assert pilot.verdict([0.01, 0.02]).endswith("few ")
    lines = pilot.table(runs).splitlines()
    from_ce, _, from_spec, *_ = (index for index, line in enumerate(lines) if line.startswith("minus"))
    default = next(line for line in lines[from_ce:] if line.startswith(pilot.OLD_DEFAULT.name))
    assert re.search(r" 5 +\+0.28 ± 0.10", default)
    assert re.search(r" 5 +-0.28 ± 0.10", next(line for line in lines[from_spec:] if line.startswith("CE ")))


@needs_bench
def test_refine_plans_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects hours of training: every arm and seed is run once, from the starting point, and compared in pairs."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "experiments"))
    refine = importlib.import_module("refine")
    trained: list[Path] = []

    def train(arm: Any, seed: int, root: Path, folder: Path, **flags: Any) -> None:
        assert flags == (
            {"pretrained": str(tmp_path / "start" / "last.pt"), "lr": 0.0075} if trained else {"epochs": 20}
        )
        folder.mkdir()
        (folder / "last.pt").touch()
        trained.append(folder)

    def evaluate(checkpoint: Path, root: Path) -> dict[str, float]:
        return dict.fromkeys(refine.SCORES, 0.4 + 0.02 * checkpoint.parent.name.startswith("SRM-seed"))

    monkeypatch.setattr(refine, "train", train)
    monkeypatch.setattr(refine, "evaluate", evaluate)
    monkeypatch.setattr(refine, "halve", lambda source, target: source)
    for minutes in ("0", "1", "1"):
        flags = ["--data", "camvid", "--minutes", minutes, "--work", str(tmp_path), "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["refine.py", *flags])
        refine.main()
    runs = json.loads((tmp_path / "refine.json").read_text())["runs"]
    assert {path.name for path in tmp_path.iterdir()} >= {"start"}
    assert len(runs) == len({(run["arm"], run["seed"]) for run in runs}) == 6 * 5 + 2
    assert len(set(trained)) == len(runs) + 1
    printed = capsys.readouterr().out
    assert re.search(r"\nminus BCMFNet\nSRM  +5 +\+2\.00 ± 0\.00", printed)
    for arm in refine.ARMS:
        assert arm.criterion().first in ("ce", "bce")
    with pytest.raises(UserError, match=r"another starting point, of mIoU 0\.4: move it away"):
        refine.read_record(tmp_path / "refine.json", dict.fromkeys(refine.SCORES, 0.5))
    for damaged in ('{"start": {}, "runs": [7]}', "{}", "[]", "{ no JSON"):
        (tmp_path / "damaged.json").write_text(damaged)
        with pytest.raises(UserError, match="is not what was written there"):
            refine.read_record(tmp_path / "damaged.json", {})


GPU_SCRIPT = ROOT / "bench" / "gpu.sh"
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *"import xdist"*) exit 1 ;;
  *"torch.ones"*) exit 0 ;;
  *get_device_name*) echo "A fake, torch 2.11" ;;
  *why_not*) [ -e "{folder}/built" ] || {{ echo "cuda: not built"; exit 1; }} ;;
  *"pip install"*) [ -e "{folder}/cannot-build" ] && exit 1; touch "{folder}/built" ;;
  *"-m pytest"*) echo "7 skipped" ;;
  *"--op lmfm"*) echo "cuda: not measured (not built)" ;;
  *"--op sizes"*) echo one problem; exec sleep 30 ;;
esac
"""
# A stage has a second, whatever the script gives it, where the variable SECOND says so.
FAKE_TIMEOUT = """#!/bin/sh
[ "$1" = -s ] && [ -n "$SECOND" ] || exec {timeout} "$@"
shift 5
exec {timeout} -s INT -k 1 1 "$@"
"""


@pytest.fixture
def fake_gpu(tmp_path: Path) -> dict[str, str]:
    """An environment in which bench/gpu.sh believes in a GPU, and its stages take no time, but for `sizes`."""
    for name, script in (
        ("python", FAKE_PYTHON.format(folder=tmp_path)),
        ("nvidia-smi", "#!/bin/sh\necho Unable to determine the device handle\nexit 9\n"),
        ("timeout", FAKE_TIMEOUT.format(timeout=shutil.which("timeout"))),
    ):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run_gpu_script(env: dict[str, str], out: Path, *stages: str) -> tuple[int, str, set[str]]:
    """Its exit status, the summary that it leaves, and what is in its archive."""
    done = subprocess.run([GPU_SCRIPT, out, *stages], env=env, capture_output=True, text=True)
    return done.returncode, *left_in(out)


def left_in(out: Path) -> tuple[str, set[str]]:
    """The summary and the archive's files; there is nothing else."""
    summary, archive = sorted(out.iterdir(), key=lambda path: path.suffix, reverse=True)
    with tarfile.open(archive) as opened:
        assert opened.extractfile("./summary.txt").read().decode() == summary.read_text()
        return summary.read_text(), {Path(name).name for name in opened.getnames()}


@needs_bench
def test_gpu_script_wants_a_gpu(tmp_path: Path) -> None:
    """Protects from an empty run that looks like a good one: without a GPU nothing runs, and the status and the summary
    say so."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    status, summary, _ = run_gpu_script({**os.environ, "PYTHON": sys.executable}, tmp_path / "out")
    assert status == 1
    assert re.search(r"FAILED: no GPU answers \(.+\), so that nothing was run; --dry-run tries", summary)
    assert "passed" not in summary
    unknown = subprocess.run([GPU_SCRIPT, tmp_path / "other", "dance"], capture_output=True, text=True)
    assert (unknown.returncode, unknown.stderr.split(".")[0]) == (2, "There is no stage dance")
    assert not (tmp_path / "other").exists()


@needs_bench
def test_gpu_script_builds_the_kernels_or_fails(fake_gpu: dict[str, str], tmp_path: Path) -> None:
    """Protects from benches without CUDA that pass: where kernels are missing they are built first, and where that
    fails nothing runs; a test run of skipped tests, and a bench that left CUDA out, have failed."""
    status, summary, files = run_gpu_script(fake_gpu, tmp_path / "a", "profile", "training")
    assert (status, "all stages passed" in summary) == (0, True), summary
    assert re.findall(r"^(\S+) +\d+ s  passed$", summary, re.M) == ["build", "triton-cache", "profile", "training"]
    assert "A fake, torch 2.11; driver, clock and memory: nvidia-smi does not tell" in summary
    status, summary, files = run_gpu_script(fake_gpu, tmp_path / "b", "cuda-tests", "lmfm", "rmi")
    assert (status, "all stages passed" in summary) == (1, False)
    assert re.search(r"cuda-tests .*FAILED: no test ran\nlmfm .*FAILED: cuda: not measured.*\nrmi .*passed", summary)
    assert {"cuda-tests.log", "lmfm.log", "rmi.log"} <= files
    (tmp_path / "built").unlink()
    (tmp_path / "cannot-build").touch()
    status, summary, files = run_gpu_script(fake_gpu, tmp_path / "c", "training")
    assert status == 1
    assert re.search(r"build .*FAILED.*\ntriton-cache.*\ntraining .*FAILED: not run, since there are no", summary)
    assert "training.log" not in files


@needs_bench
def test_gpu_script_keeps_what_it_has(fake_gpu: dict[str, str], tmp_path: Path) -> None:
    """Protects minutes on a GPU: a stage that takes too long, or a call that is interrupted, leaves what it has
    written, and the summary says what to call next; that is another status than a failure's."""
    (tmp_path / "built").touch()
    status, summary, files = run_gpu_script({**fake_gpu, "SECOND": "1"}, tmp_path / "a", "profile", "sizes", "rmi")
    assert status == 3
    assert re.search(r"profile .*passed\nsizes .*CUT OFF after .*\nrmi .*passed", summary)
    assert summary.splitlines()[-1] == "one problem"
    assert "the next call: bench/gpu.sh OUT sizes\n" in summary
    for number, status in ((signal.SIGINT, 3), (signal.SIGTERM, 3), (signal.SIGKILL, -9)):
        out = tmp_path / number.name
        with subprocess.Popen(
            [GPU_SCRIPT, out, "profile", "sizes", "rmi"], env=fake_gpu, stdout=subprocess.PIPE
        ) as run:
            assert run.stdout is not None
            assert b"profile: passed" in run.stdout.readline()
            time.sleep(0.5)
            run.send_signal(number)
            assert run.wait(20) == status
        summary, files = left_in(out)
        assert "profile.log" in files
        assert ("sizes.log" in files) == (number != signal.SIGKILL)
        assert "the next call: bench/gpu.sh OUT sizes rmi\n" in summary


@pytest.mark.thorough
def test_gpu_script_as_far_as_it_goes_without_one(tmp_path: Path) -> None:
    """Protects bench/gpu.sh: its benches run, their logs and results are where it says."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env["TORCH_COMPILE_DISABLE"] = "1"  # compiling would take most of the time
    ops = ("training", "cross_entropy", "segmentation_loss", "sizes", "blocks", "table4", "rmi", "lmfm", "srm")
    stages = ("cuda-tests", "profile", *ops, "inference", "train_step", "metrics", "memcheck")
    done = subprocess.run([GPU_SCRIPT, "--dry-run", tmp_path / "out", *stages], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "NOTHING WAS SHOWN OF CUDA" in done.stdout
    assert "all stages passed" not in done.stdout
    left_in(tmp_path / "out")
    fill = [sys.executable, ROOT / "bench" / "fill_triton_cache.py", "--size", "2", "19", "24", "32", "--device", "cpu"]
    filled = subprocess.run([*fill, "--op", "training", "lmfm"], env=env, capture_output=True, text=True)
    assert filled.stdout.startswith("0 problems ran in Triton"), filled.stderr
    out = tmp_path / "unpacked"
    with tarfile.open(next((tmp_path / "out").glob("*.tar.gz"))) as archive:
        archive.extractall(out)
    records = [json.loads((out / f"kernels-{op}-cpu.json").read_text()) for op in ops]
    for record in records:
        assert {"commit", "sources", "versions", "labels", "results"} <= record.keys()
    for result in (result for record in records for result in record["results"]):
        if not result["problem"].startswith("RMI,"):  # It has no kernels.
            assert result["contenders"]["cpu"]["against"].keys() == result["contenders"].keys() - {"cpu"}
        for name, row in result["contenders"].items():
            # BCL selects by comparing neighbours, which resampling makes almost equal: in fp32 they may be others.
            unsure = {"BCL", "→"} <= set(result["problem"].replace(",", "").split())
            bound = 1e-2 if unsure or "bfloat16" in result["problem"] else 1e-5
            if not name.endswith(" alone"):
                assert row["error"]["value"] < bound
                # Eager rounds to bfloat16 between a norm and its ReLU, and where that crosses 0, passes no gradient.
                loose = name == "eager" and "LMFM" in result["problem"] and bound == 1e-2
                assert unsure or row["error"]["gradient"] < (0.3 if loose else bound)
            assert row["both"]["ms"] > 0
            assert row["both"]["roofline"] > 0
    steps = json.loads((out / "train_step-cpu.json").read_text())["result"]["impls"]
    assert steps.keys() == {"cpu", "torch"}
    assert all(row["loss"] > 0 and row["mib"] > 0 for row in steps.values())
    metrics = json.loads((out / "metrics-cpu.json").read_text())["result"]["rows"]
    assert {"all four, kernels", "all four, PyTorch", "ConfusionMatrix, from logits"} <= metrics.keys()
    assert all(row["ms"] > 0 for row in metrics.values())
    assert Image.open(out / "kernels-segmentation_loss-cpu.png").size[0] > 400
    assert "GB/s on its bytes" in (out / "profile.log").read_text()


@needs_bench
@pytest.mark.parametrize(
    "bench",
    [
        "kernels",
        "experiments/pilot",
        *(pytest.param(bench, marks=pytest.mark.thorough) for bench in ("metrics", "inference", "train_step")),
    ],
)
def test_wrong_flags_are_sentences(bench: str, tmp_path: Path) -> None:
    """No data, no GPU: one line, status 2, and nothing written."""
    wrong = {
        "experiments/pilot": ["--data", str(tmp_path / "absent"), "--work", str(tmp_path / "work")],
        "inference": ["--device", "cuda"],
        "train_step": ["--data", str(tmp_path / "absent")],
    }.get(bench, ["--labels", str(tmp_path / "absent")])
    if torch.cuda.is_available() and bench == "inference":
        pytest.skip("a GPU is there")
    command = [sys.executable, ROOT / "bench" / f"{bench}.py", *wrong, "--output", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


@needs_bench
@pytest.mark.parametrize(
    "held",
    [
        pytest.param("[]", marks=pytest.mark.thorough),
        pytest.param('{"schedule": ', marks=pytest.mark.thorough),
        '{"schedule": {"epochs": 1}, "runs": []}',
    ],
)
def test_pilot_leaves_what_it_cannot_go_on_from(held: str, tmp_path: Path) -> None:
    """Protects hours of runs: a broken record, or one of another schedule, is a sentence, and stays as it was."""
    record = tmp_path / "pilot.json"
    record.write_text(held)
    pilot = ROOT / "bench" / "experiments" / "pilot.py"
    command = [sys.executable, pilot, "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    done = subprocess.run([*command, "--data", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"error: {record}" in done.stderr
    assert record.read_text() == held


@needs_bench
def test_model_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the model's arithmetic: what binds a kernel, few blocks, and occupancy by the scarcest resource."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    model = importlib.import_module("gpu_model")
    gpu = model.Gpu(90, multiprocessors=100, clock=1e9, memory=1e12, fp64=64, shared=100 << 10)
    work = model.Work(instructions=4e8, integer=0, fp64=0, special=0, passes=1e8, sectors=0, bytes=3e9, blocks=1000)
    assert model.times(gpu, work) == pytest.approx(
        {"issue": 1, "memory": 3, "shared": 1, "integer": 0, "fp64": 0, "special": 0}
    )
    few = model.times(gpu, model.Work(**{**vars(work), "integer": 1e8, "special": 1e8, "blocks": 10}))
    assert few == pytest.approx({"issue": 10, "memory": 3, "shared": 10, "integer": 5, "fp64": 0, "special": 20})
    for threads, registers, shared, share in (
        (256, 32, 0, 1),  # as many as there are threads
        (256, 128, 0, 2 * 256 / 2048),  # two blocks by registers
        (256, 32, 60 << 10, 256 / 2048),  # one by shared memory
        (32, 32, 0, 32 * 32 / 2048),  # 32 blocks
    ):
        assert model.occupancy(gpu, threads, registers, shared) == share


@needs_bench
@pytest.mark.skipif(ptx.why_not() is not None, reason=str(ptx.why_not()))
def test_profile_refuses_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects from minutes of counting for nothing; and kinds of instructions, which tuning goes by."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    profile = importlib.import_module("ptx_profile")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"version": 1, "size": [1, 2, 8, 8], "labels": "drawn scenes", "times": 1}))
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for flags, words in (
        (["--diff", str(other)], r"has the size \[1, 2, 8, 8\]"),
        (["--diff", str(other), "--size", "1", "2", "8", "8", "--times", "2"], "has the times 1, this run 2"),
        (["--diff", str(damaged)], "is no profile"),
        (["--diff", str(tmp_path / "missing.json")], "is no profile"),
        (["--size", "1", "2", "4", "8"], "sides of 8 pixels or more"),
        (["--output", str(tmp_path)], "cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", ["ptx_profile.py", *flags])
        with pytest.raises(UserError, match=words):
            profile.main()
    kinds = {
        **{"add.f32": "fp32", "setp.lt.f64": "fp64", "mad.lo.s32": "int", "mul.wide.u32": "int", "add.s64": "int64"},
        **{"div.rn.f32": "division", "rem.u32": "division", "ex2.approx.ftz.f32": "special", "cvt.s64.s32": "convert"},
        **{"selp.b32": "move", "ld.global.v4.u32": "global", "ld.f32": "global", "atom.shared.or.b32": "shared"},
        **{"ld.param.u64": "parameter", "bra.uni": "branch", "ret": "branch", "bar.sync": "barrier"},
    }
    assert {opcode: profile.kind_of(opcode) for opcode in kinds} == kinds
