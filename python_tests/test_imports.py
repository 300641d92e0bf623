"""What importing the package loads: a loss alone must not cost Pillow, bars, plots or the trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bcmf_ext

# torch imports tqdm where it finds it; a name that is None in sys.modules cannot be imported.
WITHOUT = """
import sys
for name in ("PIL", "tqdm", "matplotlib"):
    sys.modules[name] = None
import torch
import bcmf_ext
"""


def run(code: str) -> None:
    """Runs Python in a process of its own, which imports everything anew."""
    root = Path(bcmf_ext.__file__).parents[1]
    subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=root, check=True)


def test_a_loss_needs_torch_alone() -> None:
    """Protects host programs from what only our trainer needs: a loss and its gradient load neither Pillow, tqdm,
    matplotlib nor our trainer, data sets and networks."""
    run(
        "logits = torch.randn(2, 3, 8, 8, requires_grad=True)\n"
        "bcmf_ext.SegmentationCriterion()(logits, torch.zeros(2, 8, 8, dtype=torch.uint8)).backward()\n"
        "ours = {name.removeprefix('bcmf_ext.').partition('.')[0] for name in sys.modules if 'bcmf_ext.' in name}\n"
        "wrong = ours & {'data', 'models', 'metrics', 'inference', 'engine', 'train', 'config', 'report', 'errors'}\n"
        "assert not wrong, wrong\n"
    )


def test_metrics_and_networks_need_no_pictures() -> None:
    """Protects the same of metrics and networks, which know nothing of files of pictures."""
    run(
        "ids = torch.zeros(1, 4, 4, dtype=torch.uint8)\n"
        "confusion = bcmf_ext.metrics.ConfusionMatrix(2)\n"
        "confusion.update(ids, ids)\n"
        "confusion.update(ids.numpy(), ids.numpy())\n"
        "assert confusion.pixel_accuracy() == 1\n"
        "bcmf_ext.models.NETWORKS['bcmfnet'](2)\n"
    )


def test_every_public_name_is_there() -> None:
    """Protects ``bcmf_ext.data.X``, ``from bcmf_ext import models`` and completion in editors: what is imported late is
    found as what is not."""
    assert set(bcmf_ext.__all__) <= set(dir(bcmf_ext))
    for name in bcmf_ext.__all__:
        assert getattr(bcmf_ext, name) is not None
    for package in (bcmf_ext.data, bcmf_ext.metrics, bcmf_ext.models):
        assert all(hasattr(package, name) for name in package.__all__)
    assert not hasattr(bcmf_ext, "no_such_name")
