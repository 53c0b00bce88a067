"""The events that our own training loop sends to transformers' callbacks: trackers, progress bars, users' own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import (
    DefaultFlowCallback,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, ExportableState

from rlhf.rows.jsonl import lines_of, to_line
from rlhf.run.callbacks import (
    PPO_NUMBERS,
    Alarms,
    JsonlCallback,
    check_watched,
    prepare_early_stopping,
    watched,
    with_bar,
)
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.trl_arguments import training_arguments


def callback_arguments(config: Any, *, evaluate: bool) -> TrainingArguments:
    """Make the TrainingArguments that callbacks receive. It resets accelerate's state: call it before `Accelerator`."""
    return training_arguments(
        config,
        TrainingArguments,
        logging_steps=1,
        max_steps=config.updates,
        lr_scheduler_type="constant",
        eval_strategy="steps" if evaluate and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
    )


class CallbackLoop:
    """The state, control and callbacks of a training loop outside transformers.Trainer.

    Events come in Trainer's order and with its keywords; a step is one PPO update (with several optimizer steps), a run
    is one epoch. An update's own metrics and those of its evaluation are one log. The main process writes
    `metrics.jsonl` and `samples.jsonl` in output_dir.
    """

    def __init__(
        self,
        config: Any,
        args: TrainingArguments,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: Any,
        callbacks: Sequence[TrainerCallback] | None,
        accelerator: Accelerator,
    ):
        self.args = args
        self.main = accelerator.is_main_process
        self.state = TrainerState(is_local_process_zero=self.main, is_world_process_zero=self.main)
        self.control = TrainerControl()
        self.samples = Path(config.output_dir, "samples.jsonl")
        self.begun = False
        trackers = get_reporting_integration_callbacks(args.report_to)
        metrics = JsonlCallback(Path(config.output_dir, "metrics.jsonl"))
        self.alarms = Alarms(config.on_alarm)
        listed = [DefaultFlowCallback, metrics, self.alarms, *trackers]
        listed += with_bar(callbacks, "ppo", PPO_NUMBERS)
        self.handler = CallbackHandler(listed, model, tokenizer, optimizer, None)
        self._extra_metrics: dict[str, list[float]] = {}
        self._extra_columns: dict[str, list[Any]] = {}
        self._running = False
        self.control = self.handler.on_init_end(self.args, self.state, self.control)

    @property
    def should_stop(self) -> bool:
        """Return whether a callback has asked to end training."""
        return self.control.should_training_stop

    @property
    def should_evaluate(self) -> bool:
        """Return whether an evaluation is due, or a callback has asked for one."""
        return self.control.should_evaluate

    @property
    def should_save(self) -> bool:
        """Return whether a callback has asked for a checkpoint."""
        return self.control.should_save

    def last_metrics(self) -> dict[str, float]:
        """Return the metrics that a resumed run logged last; {} for a new run."""
        return {name: value for name, value in (self.state.log_history or [{}])[-1].items() if name != "step"}

    def begin(self, step: int, steps: int) -> None:
        """Send on_train_begin after `step` of `steps` updates; drop samples of later updates from samples.jsonl."""
        self.begun = True
        prepare_early_stopping(self.handler.callbacks, self.args, "eval_score")
        self.state.global_step, self.state.max_steps, self.state.num_train_epochs = step, steps, 1
        self.state.compute_steps(self.args, steps)
        if self.main:
            self._truncate_samples(step)
        self._running = True
        self.control = self.handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.handler.on_epoch_begin(self.args, self.state, self.control)

    def step_begin(self) -> None:
        """Send on_step_begin before an update's rollout is collected."""
        self.control = self.handler.on_step_begin(self.args, self.state, self.control)

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Send on_pre_optimizer_step and on_optimizer_step around an optimizer step of `train`; by hand, neither."""
        if self._running:
            self.control = self.handler.on_pre_optimizer_step(self.args, self.state, self.control)
        yield
        if self._running:
            self.control = self.handler.on_optimizer_step(self.args, self.state, self.control)

    def step_end(self, step: int) -> None:
        """Send on_step_end after an update: callbacks may ask for an evaluation, a save or a stop."""
        self.state.global_step = step
        self.state.epoch = step / max(1, self.state.max_steps)
        self.control = self.handler.on_step_end(self.args, self.state, self.control)

    def log(self, step: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Log a finished update and write its samples."""
        logged: dict[str, list[float]] = {}
        for of_process in gather_object([self._extra_metrics]):
            for name, values in of_process.items():
                logged.setdefault(name, []).extend(values)
        extra = {_apart(name, metrics): sum(values) / len(values) for name, values in logged.items()}
        logs = {**metrics, **extra}
        self.state.log_history.append({"step": step, **logs})
        self.control = self.handler.on_log(self.args, self.state, self.control, logs=dict(logs))
        if self.main and samples:
            columns = {_apart(name, samples[0]): values for name, values in self._extra_columns.items()}
            rows = [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(samples)]
            with self.samples.open("ab") as file:
                file.writelines(to_line(row, default=str) for row in rows)
        self._extra_metrics.clear()
        self._extra_columns.clear()

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Send on_evaluate with the evaluation's metrics, then note the best step, as Trainer does.

        Raises InputError where the evaluation lacks the metric to be watched."""
        check_watched(self.args, metrics)
        self.control = self.handler.on_evaluate(self.args, self.state, self.control, metrics=dict(metrics))
        if self.args.metric_for_best_model is None:
            return
        value, more = metrics[watched(self.args)], self.args.greater_is_better
        if self.state.best_metric is None:
            self.state.best_metric = -math.inf if more else math.inf
        if value > self.state.best_metric if more else value < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def saved(self) -> None:
        """Send on_save after a checkpoint was written."""
        self.control = self.handler.on_save(self.args, self.state, self.control)
        self.control.should_save = False

    def end(self) -> None:
        """Send on_epoch_end and on_train_end. Raises RunStopped if an alarm has ended the run."""
        self._running = False
        self.control = self.handler.on_epoch_end(self.args, self.state, self.control)
        self.control = self.handler.on_train_end(self.args, self.state, self.control)
        self.alarms.raise_if_stopped()

    def save_state(self, file: Path) -> None:
        """Save the log so far, and the state of users' callbacks that have one (transformers' ExportableState)."""
        states: Any = self.state.stateful_callbacks  # a dict at this point, unlike its annotation
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(file))
        write_json_atomic(file, json.loads(file.read_text(encoding="utf-8")))  # again, NaN as null

    def load_state(self, file: Path) -> None:
        """Restore what `save_state` wrote."""
        self.state = TrainerState.load_from_json(str(file))
        for row in self.state.log_history:  # what is not finite was written as null or as text
            row.update({name: math.nan if value is None else float(value) for name, value in row.items()})
        states: Any = self.state.stateful_callbacks
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                vars(callback).update(states.get(type(callback).__name__, {}).get("attributes", {}))
        self.state.is_local_process_zero = self.state.is_world_process_zero = self.main

    def log_metric(self, name: str, value: float) -> None:
        """Record a number from a reward function, to be averaged over the update and logged (as in trl)."""
        self._extra_metrics.setdefault(name, []).append(float(value))

    def log_extra(self, name: str, values: Sequence[Any]) -> None:
        """Record a column from a reward function for samples.jsonl, one value per response (as in trl)."""
        self._extra_columns.setdefault(name, []).extend(values)

    def _truncate_samples(self, step: int) -> None:
        """Drop the samples that a killed run wrote after its last checkpoint: the resumed run writes them again."""
        self.samples.parent.mkdir(parents=True, exist_ok=True)
        if self.samples.is_file():
            writing = self.samples.with_name(f".{self.samples.name}.writing")
            writing.unlink(missing_ok=True)
            with writing.open("xb") as file:  # never through a link that somebody left there
                file.writelines(line for line in lines_of(self.samples) if _step(line) <= step)
            writing.replace(self.samples)


def _apart(name: str, ours: Mapping[str, Any]) -> str:
    """Return the name under which a reward function's number or column is logged beside the trainer's own."""
    return f"reward_function/{name}" if name in ours or name == "step" else name


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")
