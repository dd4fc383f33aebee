"""A Hugging Face classifier in its Trainer, with gradient accumulation and a resumed run.

The criterion is made a part of the model. So the Trainer moves it to the model's device, puts it in
evaluation mode with the model, and keeps its centers in the model's checkpoints.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from data import NUM_CLASSES, batches
from torch import Tensor

from separate_loss import SoftmaxSeparateLoss

transformers.utils.logging.disable_progress_bar()
examples = [
    {"pixel_values": pattern.reshape(1, 4, 8), "labels": label}
    for inputs, labels in batches(80)
    for pattern, label in zip(inputs, labels, strict=True)
]
seen, unseen = examples[:-640], examples[-640:]
# A small model from a configuration; one from `from_pretrained` is treated alike.
config = transformers.ConvNextV2Config(
    num_channels=1,
    patch_size=2,
    num_stages=2,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    num_labels=NUM_CLASSES,
)


def train(folder: str, steps: int, *, resume: bool = False) -> tuple[Tensor, transformers.Trainer]:
    """Trains a new model up to `steps`, if told so from the last checkpoint in `folder` on."""
    torch.manual_seed(0)
    model = transformers.ConvNextV2ForImageClassification(config)
    model.criterion = criterion = SoftmaxSeparateLoss(model.classifier)

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        # The Trainer adds up the losses of accumulated batches: each is to give its share.
        loss: Tensor = criterion(outputs.logits, labels)
        return loss * (len(labels) / num_items_in_batch)

    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_steps=50,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=seen, eval_dataset=unseen, compute_loss_func=compute_loss
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return criterion.separate.centers, trainer


with TemporaryDirectory() as folder:
    unbroken_centers, _ = train(f"{folder}/unbroken", steps=100)
    train(f"{folder}/resumed", steps=50)
    centers, trainer = train(f"{folder}/resumed", steps=100, resume=True)

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
resumed_alike = torch.equal(centers, unbroken_centers)
before = centers.clone()
unseen_loss = trainer.evaluate()["eval_loss"]
evaluation_moves = not torch.equal(centers, before)

print(
    f"loss {losses[0]:.3f} to {losses[-1]:.3f}, unseen {unseen_loss:.3f}, "
    f"resumed alike: {resumed_alike}, evaluation moves centers: {evaluation_moves}"
)
