"""torchvision: DeepLabV3 with its auxiliary head, and LRASPP; the criterion takes their outputs as they are.

pip install torchvision
"""

import torch
from scenes import BATCH, NUM_CLASSES, pictures, report
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large
from torchvision.transforms import v2

from bcmf_ext import SegmentationCriterion
from bcmf_ext.data import MEAN, STD

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
transform = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomHorizontalFlip(),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),  # Labels stay uint8.
        v2.Normalize(MEAN, STD),
    ]
)
samples = [transform(image, tv_tensors.Mask(label)) for image, label in pictures()]
criterion = SegmentationCriterion(aux_weight=0.5)  # It is 0.5 in torchvision's references.

random = {"weights": None, "weights_backbone": None, "num_classes": NUM_CLASSES}
for network in (deeplabv3_mobilenet_v3_large(aux_loss=True, **random), lraspp_mobilenet_v3_large(**random)):
    model = network.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for images, labels in DataLoader(samples, BATCH, shuffle=True):
        images, labels = images.to(device), labels.to(device)
        loss = criterion(model(images), labels)  # DeepLabV3 gives {"out", "aux"}, LRASPP {"out"}.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{type(model).__name__}: ", end="")
    report(losses)
