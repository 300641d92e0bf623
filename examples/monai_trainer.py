"""MONAI: a two-dimensional U-Net in the SupervisedTrainer, with MONAI's transforms.

pip install 'monai[ignite]'
"""

import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, EnsureChannelFirstd, NormalizeIntensityd, RandFlipd
from monai.utils import set_determinism
from scenes import BATCH, NUM_CLASSES, pictures, report

from bcmf_ext import SegmentationCriterion

set_determinism(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
transform = Compose(
    [
        EnsureChannelFirstd("image", channel_dim=-1),
        EnsureChannelFirstd("label", channel_dim="no_channel"),  # MONAI's losses take (N, 1, H, W).
        NormalizeIntensityd("image", channel_wise=True),
        RandFlipd(["image", "label"], prob=0.5, spatial_axis=1),
    ]
)
samples = [{"image": image, "label": label} for image, label in pictures()]
network = BasicUNet(2, in_channels=3, out_channels=NUM_CLASSES, features=(16, 16, 32, 64, 128, 16)).to(device)
trainer = SupervisedTrainer(
    device,
    max_epochs=1,
    train_data_loader=DataLoader(Dataset(samples, transform), batch_size=BATCH, shuffle=True),
    network=network,
    optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
    loss_function=SegmentationCriterion(),
    decollate=False,
)
losses = []
trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item()))
trainer.run()
report(losses)
