"""A Hugging Face classifier in its Trainer, with gradient accumulation and a resumed run.

The criterion is a submodule of the model. So the Trainer moves it to the model's device, switches
it to evaluation mode with the model, and saves its centers in the model's checkpoints. The loss
uses the head's output in `forward`, because mixed precision may convert the model's output.
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
# A small model from a configuration; one from `from_pretrained` works the same way.
config = transformers.ConvNextV2Config(
    num_channels=1,
    patch_size=2,
    num_stages=2,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    num_labels=NUM_CLASSES,
)


class Classifier(transformers.ConvNextV2ForImageClassification):  # type: ignore[misc]
    """The model with the joint loss of its logits."""

    def __init__(self, config: transformers.ConvNextV2Config) -> None:
        super().__init__(config)
        self.criterion = SoftmaxSeparateLoss(self.classifier)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> Any:
        outputs = super().forward(pixel_values)
        outputs.loss = self.criterion(outputs.logits, labels)
        if num_items_in_batch is not None:
            # The Trainer sums the losses of accumulated batches, so each returns its share.
            outputs.loss = outputs.loss * (len(labels) / num_items_in_batch)
        return outputs


def train(folder: str, steps: int, *, resume: bool = False) -> tuple[Tensor, transformers.Trainer]:
    """Trains a new model up to `steps`, if told so from the last checkpoint in `folder` on."""
    torch.manual_seed(0)
    model = Classifier(config)
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
    trainer = transformers.Trainer(model, arguments, train_dataset=seen, eval_dataset=unseen)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return model.criterion.separate.centers, trainer


with TemporaryDirectory() as folder:
    unbroken_centers, _ = train(f"{folder}/unbroken", steps=100)
    train(f"{folder}/resumed", steps=50)
    centers, trainer = train(f"{folder}/resumed", steps=100, resume=True)

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
resumed_alike = torch.equal(centers, unbroken_centers)
before = centers.clone()
unseen_loss = trainer.evaluate()["eval_loss"]
evaluation_moves = not torch.equal(centers, before)

with TemporaryDirectory() as folder:
    trainer.save_model(folder)
    loaded = Classifier.from_pretrained(folder)
    loaded_alike = torch.equal(loaded.criterion.separate.centers.cpu(), centers.cpu())
    # From a checkpoint without the loss, such as one from a hub, centers start at zero.
    transformers.ConvNextV2ForImageClassification(config).save_pretrained(folder)
    fresh = not Classifier.from_pretrained(folder).criterion.separate.centers.any()

print(
    f"loss {losses[0]:.3f} to {losses[-1]:.3f}, unseen {unseen_loss:.3f}, "
    f"resumed alike: {resumed_alike}, evaluation moves centers: {evaluation_moves}, "
    f"loaded alike: {loaded_alike}, fresh without a checkpoint: {fresh}"
)
