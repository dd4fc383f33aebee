"""Hugging Face: a text classifier, with two lines beside its Trainer.

As a submodule of the model, the loss follows it to its device and
into evaluation mode, and its centers are saved in the checkpoints.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from data import NUM_CLASSES, texts
from torch import Tensor

from separate_loss import SoftmaxSeparateLoss

examples = texts(9600)
torch.manual_seed(0)
# Or `from_pretrained`, and the tokens of its tokenizer.
config = transformers.BertConfig(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=NUM_CLASSES,
)
model: Any = transformers.BertForSequenceClassification(config)
model.criterion = SoftmaxSeparateLoss(model.classifier)


def joint_loss(outputs: Any, labels: Tensor, **counts: Any) -> Any:
    """The share of this batch, since the Trainer sums the losses."""
    share = len(labels) / counts["num_items_in_batch"]
    return share * model.criterion(outputs.logits, labels)


with TemporaryDirectory() as folder:
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
        ),
        train_dataset=examples[640:],
        eval_dataset=examples[:640],
        compute_loss_func=joint_loss,
    )
    trainer.train()
    unseen_loss = trainer.evaluate()["eval_loss"]
log = trainer.state.log_history
losses = [entry["loss"] for entry in log if "loss" in entry]
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"unseen {unseen_loss:.3f}")
