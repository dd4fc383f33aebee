"""What the tests want to know of a recipe beside its variables: a function for a program's name."""

from tempfile import TemporaryDirectory
from typing import Any

import torch


def lightning_module(end: dict[str, Any]) -> dict[str, Any]:
    """Compares the resumed run with an unbroken one, and evaluates again."""
    centers = end["resumed"].criterion.separate.centers
    torch.manual_seed(0)
    unbroken = end["Classifier"]()
    end["Trainer"](max_epochs=2, **end["OFF"]).fit(unbroken, end["seen"], end["unseen"])
    before = centers.clone()
    (result,) = end["trainer"].validate(end["resumed"], end["unseen"], verbose=False)
    return {
        "unseen_loss": result["unseen"],
        "resumed_alike": torch.equal(centers, unbroken.criterion.separate.centers),
        "evaluation_moves": not torch.equal(centers, before),
    }


def transformers_trainer(end: dict[str, Any]) -> dict[str, Any]:
    """Compares as above, and loads checkpoints of the model with and without the loss."""
    centers, kind = end["trainer"].model.criterion.separate.centers, end["Classifier"]
    with TemporaryDirectory() as folder:
        unbroken = end["train"](folder, steps=100).model
    before = centers.clone()
    unseen_loss = end["trainer"].evaluate(end["examples"][:640])["eval_loss"]
    with TemporaryDirectory() as folder:
        end["trainer"].save_model(folder)
        loaded = kind.from_pretrained(folder)
        # From a checkpoint without the loss, such as one from a hub, centers start at zero.
        end["Base"](end["config"]).save_pretrained(folder)
        fresh = kind.from_pretrained(folder)
    return {
        "unseen_loss": unseen_loss,
        "resumed_alike": torch.equal(centers, unbroken.criterion.separate.centers),
        "evaluation_moves": not torch.equal(centers, before),
        "loaded_alike": torch.equal(loaded.criterion.separate.centers.cpu(), centers.cpu()),
        "fresh": not fresh.criterion.separate.centers.any(),
    }


def feature_plot(end: dict[str, Any]) -> dict[str, Any]:
    """Reads what the program wrote."""
    folder = end["folder"]
    names = (folder / "names.tsv").read_text().split("\n")
    vectors = [line.split("\t") for line in (folder / "vectors.tsv").read_text().split("\n")]
    read = torch.tensor([[float(value) for value in row] for row in vectors])
    torch.testing.assert_close(read, end["rows"])
    return {
        "sizes": [list(read.shape), len(names)],
        "names": names,
        "files": sorted(path.name for path in folder.iterdir()),
    }
