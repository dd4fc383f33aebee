"""Tries the heads that docs/recipes.md tells to watch in text classifiers of transformers."""

from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import nn

from separate_loss import SoftmaxSeparateLoss

SIZES = {"vocab_size": 50, "num_labels": 7, "pad_token_id": 0}
ENCODER = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DECODER = ENCODER | {"num_key_value_heads": 2}
BART = {
    "d_model": 16,
    "eos_token_id": 2,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
}
# Name in the table, name in transformers, sizes, head.
MODELS: list[tuple[str, str, dict[str, Any], str]] = [
    ("BERT", "Bert", ENCODER, "classifier"),
    ("ALBERT", "Albert", ENCODER | {"embedding_size": 8}, "classifier"),
    ("DeBERTa V2", "DebertaV2", ENCODER, "classifier"),
    ("ModernBERT", "ModernBert", ENCODER, "classifier"),
    ("RoBERTa", "Roberta", ENCODER, "classifier.out_proj"),
    ("XLM-RoBERTa", "XLMRoberta", ENCODER, "classifier.out_proj"),
    ("ELECTRA", "Electra", ENCODER | {"embedding_size": 16}, "classifier.out_proj"),
    ("MPNet", "MPNet", ENCODER, "classifier.out_proj"),
    ("BART", "Bart", SIZES | BART, "classification_head.out_proj"),
    (
        "DistilBERT",
        "DistilBert",
        SIZES | {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
        "classifier",
    ),
    ("GPT-2", "GPT2", SIZES | {"n_embd": 16, "n_layer": 1, "n_head": 2}, "score"),
    ("Llama", "Llama", DECODER, "score"),
    ("Qwen2", "Qwen2", DECODER, "score"),
]


def try_head(kind: str, sizes: dict[str, Any], head: str) -> dict[str, Any]:
    """Calls the loss as the table says, on texts padded on the left."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    model.config.output_hidden_states = True
    tokens, labels = torch.randint(3, 50, (32, 9)), torch.arange(32) % 7
    tokens[:, -1] = 2  # the end of the text, which BART looks for
    if kind != "Bart":
        tokens[:8, :3] = 0
    layer, seen = attrgetter(head)(model), []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(input_ids=tokens, attention_mask=(tokens != 0).long())
    hook.remove()
    signed = bool((seen[0] < 0).float().mean() > 0.2)
    if not signed:
        model.classifier = nn.Sequential(nn.BatchNorm1d(model.config.dim), model.classifier)
    criterion = SoftmaxSeparateLoss(layer)
    outputs = model(input_ids=tokens, attention_mask=(tokens != 0).long())
    try:
        loss, needs_features = criterion(outputs.logits, labels), False
    except RuntimeError:
        features = outputs.hidden_states[-1][:, -1]
        torch.testing.assert_close(layer(features), outputs.logits)
        loss, needs_features = criterion(outputs.logits, labels, features=features), True
    loss.backward()
    assert criterion.separate.centers.any(-1).all()
    return {"head": head, "signed": signed, "needs_features": needs_features}


if __name__ == "__main__":
    found = {name: try_head(kind, sizes, head) for name, kind, sizes, head in MODELS}
