"""Objects of Lightning, whose state is made while they are trained with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from dcp_async import CheckpointEngine
from tests.support.doubles import assert_same

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainer says much of this machine


class Net(LightningModule):  # type: ignore[misc]  # without types where it is not installed
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _callbacks(directory: Path) -> list[Any]:
    return [
        ModelCheckpoint(directory, monitor="loss", save_top_k=2, save_last=True),
        EarlyStopping(monitor="loss", patience=9, check_on_train_epoch_end=True),
    ]


async def test_callbacks_get_back_what_they_had_learned(tmp_path: Path) -> None:
    """Of a fresh ModelCheckpoint best_model_score is None and best_k_models empty."""
    trained, fresh = _callbacks(tmp_path / "theirs"), _callbacks(tmp_path / "theirs")
    data: DataLoader[Any] = DataLoader(list(torch.randn(8, 4)), batch_size=4)  # type: ignore[arg-type]  # as it is
    trainer = Trainer(
        callbacks=trained,
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Net(), data)
    assert isinstance(trained[0].best_model_score, torch.Tensor)
    assert len(trained[0].best_k_models) == 2
    async with CheckpointEngine(tmp_path / "run") as engine:
        await engine.save({"callbacks": trained})
        await engine.wait()
        report = await engine.load({"callbacks": fresh})
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    handed = _callbacks(tmp_path / "theirs")  # not all that they tell do they take back
    for one, other, third in zip(trained, fresh, handed, strict=True):
        third.load_state_dict(copy.deepcopy(one.state_dict()))
        assert_same(other.state_dict(), third.state_dict())
    assert_same(fresh[0].best_k_models, trained[0].best_k_models)
