"""Transformers: SegFormer in the Trainer.

pip install transformers accelerate
"""

import tempfile

from scenes import BATCH, NUM_CLASSES, STEPS, pictures, report
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bcmf_ext import SegmentationCriterion

set_seed(0)
processor = SegformerImageProcessor(do_resize=False)  # It rescales images; labels keep their 255.
model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=NUM_CLASSES))  # It is as large as B0.
criterion = SegmentationCriterion()


def collate(pairs):
    images, labels = zip(*pairs, strict=True)
    return processor(list(images), list(labels), return_tensors="pt")  # These are pixel_values and labels.


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        average_tokens_across_devices=False,  # Otherwise the loss is multiplied by the number of processes.
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=pictures(),
        compute_loss_func=lambda outputs, labels, **_: criterion(outputs, labels),  # _ is num_items_in_batch.
    )
    trainer.loss_is_scaled_for_ga = False  # Our loss is a mean, so the Trainer is to average accumulated ones.
    trainer.train()
report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
