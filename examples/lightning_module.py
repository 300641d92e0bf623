"""Lightning: BCMFNet in a LightningModule, with every term of the loss in the log.

pip install lightning
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from scenes import BATCH, NUM_CLASSES, STEPS, report, tensors
from torch.utils.data import DataLoader

from bcmf_ext import SegmentationCriterion
from bcmf_ext.models import bcmfnet


class Segmenter(L.LightningModule):
    """BCMFNet and its loss."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = bcmfnet(num_classes)  # In training it gives (main, auxiliary) logits.
        self.criterion = SegmentationCriterion()  # Class weights go to the GPU with the network.

    def training_step(self, batch, batch_idx):
        images, labels = batch
        terms = self.criterion.terms(self.network(images), labels)
        self.log_dict(terms)  # These are total, ce, bcl, cpg and aux.
        return terms["total"]  # Without a log self.criterion(self.network(images), labels) will do.

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


L.seed_everything(0)
losses = []
trainer = L.Trainer(
    max_steps=STEPS,
    callbacks=LambdaCallback(on_train_batch_end=lambda t, m, outputs, *_: losses.append(outputs["loss"].item())),
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Segmenter(NUM_CLASSES), DataLoader(tensors(), BATCH, shuffle=True))
report(losses)
print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
