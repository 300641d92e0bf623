"""The benches run, on tiny sizes: a GPU, when there is one, must not be wasted on a script that does not."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.mark.thorough
def test_gpu_script_as_far_as_it_goes_without_one(tmp_path: Path) -> None:
    """Protects bench/gpu.sh: its stages run, their logs and results are where it says, a failure is its exit status."""
    out = tmp_path / "out"
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env["TORCH_COMPILE_DISABLE"] = "1"  # compiling would take most of the time
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", out, "sanitize", "bench", "profile"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "all stages passed" in done.stdout
    record = json.loads((out / "kernels-cpu.json").read_text())
    assert {"commit", "sources", "versions", "labels", "results"} <= record.keys()
    for result in record["results"]:
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
    assert Image.open(out / "kernels-cpu.png").size[0] > 400
    assert "GB/s on its bytes" in (out / "profile.log").read_text()
    unknown = subprocess.run([ROOT / "bench" / "gpu.sh", out, "dance"], env=env, capture_output=True, text=True)
    assert unknown.returncode == 2


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
