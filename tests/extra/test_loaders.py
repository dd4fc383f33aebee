"""Loaders of other libraries, which set values without `load_state_dict`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor, nn

from benchmarks.networks import complete_torchvision
from separate_loss import SeparateLoss

SHAPE = 5, 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": torch.arange(1.0, 6)},
    {"center_update": "gradient"},
    {"center_update": "none", "center_init": torch.eye(*SHAPE) + 1},
]
each_option = pytest.mark.parametrize("options", OPTIONS)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(10, SHAPE[1]), torch.arange(10) % SHAPE[0]


@each_option
@pytest.mark.parametrize("include_buffers", [True, False])
def test_accelerate_loads_centers(
    tmp_path: Path, options: dict[str, Any], include_buffers: bool
) -> None:
    source = nn.ModuleDict({"loss": SeparateLoss(*SHAPE, **options)})
    with torch.no_grad():
        source["loss"].state_dict()["centers"].normal_()
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with init_empty_weights(include_buffers=include_buffers):
        empty = nn.ModuleDict({"loss": SeparateLoss(*SHAPE, **options)})
    loaded: Any = load_checkpoint_and_dispatch(
        empty, str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"}
    )
    values = loaded["loss"].state_dict()
    torch.testing.assert_close(values, source["loss"].state_dict(), rtol=0, atol=0)
    features, target = batch()
    assert torch.equal(loaded["loss"](features, target), source["loss"](features, target))


@pytest.fixture(scope="module")
def transformers() -> Any:
    complete_torchvision()
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    module.utils.logging.set_verbosity_error()
    return module


@each_option
def test_transformers_loads_centers_or_starts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transformers: Any, options: dict[str, Any]
) -> None:
    """A checkpoint without centers leaves memory, which the initial values replace."""

    class Model(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any, with_loss: bool = True) -> None:
            super().__init__(config)
            self.body = nn.Linear(3, SHAPE[1])
            if with_loss:
                self.loss = SeparateLoss(*SHAPE, **options)
            self.post_init()

    source = Model(transformers.PretrainedConfig())
    initial = source.loss.state_dict()
    with torch.no_grad():
        source.loss.centers.normal_()
    source.save_pretrained(tmp_path / "whole")
    loaded = Model.from_pretrained(tmp_path / "whole")
    values = loaded.loss.state_dict()
    torch.testing.assert_close(values, source.loss.state_dict(), rtol=0, atol=0)
    assert loaded.loss(*batch()).isfinite()

    empty_like = torch.empty_like

    def used(*arguments: Any, **keywords: Any) -> Tensor:
        tensor = empty_like(*arguments, **keywords)
        if not tensor.is_meta:
            tensor.data.fill_(7)
        return tensor

    Model(transformers.PretrainedConfig(), with_loss=False).save_pretrained(tmp_path / "body")
    monkeypatch.setattr(torch, "empty_like", used)
    fresh = Model.from_pretrained(tmp_path / "body").loss
    if fresh.center_init == "sphere":
        torch.testing.assert_close(fresh.centers.norm(dim=-1), torch.ones(SHAPE[0]))
    else:
        torch.testing.assert_close(fresh.centers.detach(), SeparateLoss(*SHAPE, **options).centers)
    assert fresh(*batch()).isfinite()
    if "weight" in initial:
        assert torch.equal(fresh.weight, initial["weight"])
