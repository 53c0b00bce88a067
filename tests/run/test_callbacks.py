"""Our callbacks in a real transformers.Trainer: a killed run goes on and its metrics.jsonl is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from rlhf.metrics import read_metrics
from rlhf.run import callbacks
from rlhf.run.callbacks import JsonlCallback, MarkComplete, ProgressCallback, attach, with_bar
from rlhf.run.checkpoint import latest_checkpoint


class Line(torch.nn.Module):
    """One weight, squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(folder: Path) -> Trainer:
    rows = [{"x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(12)]
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, logging_steps=1, save_steps=2, learning_rate=0.01,
        disable_tqdm=True, report_to=[], use_cpu=True, dataloader_pin_memory=False, save_total_limit=2,
    )  # fmt: skip
    made = Trainer(Line(), arguments, train_dataset=rows)
    for _ in range(2):  # a recipe may attach again what the trainer attached itself
        attach(made, "sft", ("loss",), folder)
    made.add_callback(MarkComplete({}))
    return made


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    killed = trainer(tmp_path / "killed")
    killed.add_callback(KillAt(4))  # step 3 is logged after the checkpoint at 2
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    checkpoint = latest_checkpoint(tmp_path / "killed", {})
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    trainer(tmp_path / "killed").train(resume_from_checkpoint=str(checkpoint))
    expected, found = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row.get("loss") for row in found] == [row.get("loss") for row in expected]
    handlers = [type(callback) for callback in whole.callback_handler.callbacks]
    assert PrinterCallback not in handlers
    assert handlers.count(JsonlCallback) == 1
    assert "sft           6/6" in capsys.readouterr().out


def test_a_bar_is_there_by_itself_and_a_given_one_is_kept() -> None:
    (bar,) = with_bar(None, "ppo", ("score",))
    assert isinstance(bar, ProgressCallback)
    assert (bar.stage, bar.names) == ("ppo", ("score",))
    own, other = ProgressCallback("mine"), KillAt(3)
    assert with_bar([other, own], "ppo", ("score",)) == [other, own]
    added = with_bar([other], "ppo", ("score",))
    assert added[0] is other
    assert isinstance(added[1], ProgressCallback)


def test_no_process_goes_on_while_the_first_marks_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(callbacks, "wait_for_all", lambda: events.append("wait"))
    monkeypatch.setattr(callbacks.checkpoint, "mark_complete", lambda *given: events.append("mark"))
    (tmp_path / "checkpoint-3").mkdir()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    MarkComplete({}).on_save(arguments, TrainerState(global_step=3, is_world_process_zero=True), None)
    assert events == ["wait", "mark", "wait"]
