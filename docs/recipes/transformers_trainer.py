"""Hugging Face: the loss inside the model, and a resumed run.

As a submodule in the model's class, the loss is saved with the model
and loaded by `from_pretrained`.
"""

from tempfile import TemporaryDirectory
from typing import Any

import transformers
from data import NUM_CLASSES, pictures
from torch import Tensor

from separate_loss import SoftmaxSeparateLoss

examples = pictures(5760)
config = transformers.ConvNextV2Config(
    num_channels=1,
    patch_size=2,
    num_stages=2,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    num_labels=NUM_CLASSES,
)
Base: Any = transformers.ConvNextV2ForImageClassification


class Classifier(Base):  # type: ignore[misc]
    """The model with the joint loss of its logits."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.criterion = SoftmaxSeparateLoss(self.classifier)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        outputs = super().forward(pixel_values)
        outputs.loss = self.criterion(outputs.logits, labels)
        return outputs


def train(folder: str, steps: int, *, resume: bool = False) -> Any:
    """Trains up to `steps`, from the last checkpoint if told so."""
    transformers.set_seed(0)
    settings: Any = {"learning_rate": 3e-3, "logging_steps": 1}
    settings |= {"max_steps": steps, "lr_scheduler_type": "constant"}
    settings |= {"gradient_accumulation_steps": 4}
    arguments = transformers.TrainingArguments(folder, **settings)
    seen, model = examples[640:], Classifier(config)
    trainer = transformers.Trainer(model, arguments, None, seen)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


with TemporaryDirectory() as folder:
    train(folder, steps=50)
    trainer = train(folder, steps=100, resume=True)
log = trainer.state.log_history
losses = [entry["loss"] for entry in log if "loss" in entry]
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
