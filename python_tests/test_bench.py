"""The benches run, on tiny sizes: a GPU, when there is one, must not be wasted on a script that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench is not there")
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
        assert "cpu" in result["contenders"]
        assert result["contenders"]["cpu"]["against"].keys() == result["contenders"].keys() - {"cpu"}
        for name, row in result["contenders"].items():
            # BCL selects by comparing neighbours, which resampling makes almost equal: in fp32 they may be others.
            unsure = {"BCL", "→"} <= set(result["problem"].replace(",", "").split())
            bound = 1e-2 if unsure or "bfloat16" in result["problem"] else 1e-5
            if name != "CE alone":
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
