"""segmentation_models_pytorch: a U-Net in a PyTorch loop, with smp's Lovász loss beside ours.

pip install segmentation_models_pytorch
"""

import segmentation_models_pytorch as smp
import torch
from scenes import BATCH, NUM_CLASSES, report, tensors
from torch.utils.data import DataLoader

from bcmf_ext import SegmentationCriterion

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = smp.Unet("resnet18", encoder_weights=None, classes=NUM_CLASSES).to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# Any loss of (logits, labels) goes in as it is, smp's too, with a name for the log and a weight.
lovasz = smp.losses.LovaszLoss("multiclass", ignore_index=255)
criterion = SegmentationCriterion(extra={"lovasz": (0.5, lovasz)})

losses = []
for images, labels in DataLoader(tensors(), BATCH, shuffle=True):
    images, labels = images.to(device), labels.to(device)
    loss = criterion(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
report(losses)
