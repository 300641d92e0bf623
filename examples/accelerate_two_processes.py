"""accelerate: DDRNet-23-slim on two processes, each on a GPU of its own if there are two, else on the CPU.

pip install accelerate

`python accelerate_two_processes.py` starts both itself; a script that `accelerate launch --num_processes 2` starts
calls train() instead.
"""

import torch
from accelerate import Accelerator, notebook_launcher
from accelerate.utils import set_seed
from scenes import BATCH, NUM_CLASSES, report, tensors
from torch.utils.data import DataLoader

from bcmf_ext import SegmentationCriterion
from bcmf_ext.models import ddrnet_s

PROCESSES = 2


def train() -> None:
    accelerator = Accelerator(cpu=torch.cuda.device_count() < PROCESSES)
    set_seed(0)
    model = ddrnet_s(NUM_CLASSES)  # In training it gives (main, auxiliary) logits.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(tensors(), BATCH // PROCESSES, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    criterion = SegmentationCriterion()

    losses = []
    model.train()
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        report(losses)
    accelerator.end_training()


if __name__ == "__main__":
    notebook_launcher(train, num_processes=PROCESSES, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
