"""transformers callbacks that every trainer gets: whole checkpoints, metrics.jsonl, a progress bar, alarms, SIGTERM.

They are kept apart from checkpoint.py, metrics.py and console.py so that those import without transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import EarlyStoppingCallback, IntervalStrategy, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import ProgressCallback as TqdmCallback

from rlhf import cpu, metrics
from rlhf.errors import InputError, RunStopped
from rlhf.run import checkpoint, console, distributed, strategy
from rlhf.run.lock import training_in
from rlhf.run.owner import wait_for_all
from rlhf.run.resume import Termination, resume_point

log = logging.getLogger("rlhf")

OnAlarm = Literal["warn", "save", "stop"]
PPO_NUMBERS = ("score", "kl_nats", "clip_fraction", "explained_variance", "response_tokens")
"""What PPO's bar shows, the most important first."""


def attach(trainer: Any, stage: str, numbers: Sequence[str], folder: str | Path) -> None:
    """Give a trainer a bar of its own and ``folder/metrics.jsonl``, in place of those that it has."""
    for older in (PrinterCallback, TqdmCallback, JsonlCallback, ProgressCallback):
        trainer.remove_callback(older)
    trainer.add_callback(JsonlCallback(Path(folder) / "metrics.jsonl"))
    trainer.add_callback(ProgressCallback(stage, numbers))


def with_bar(callbacks: Sequence[TrainerCallback] | None, stage: str, numbers: Sequence[str]) -> list[TrainerCallback]:
    """Return the callbacks, with a progress bar among them: the given one, or a new one."""
    given = list(callbacks or ())
    if any(isinstance(callback, ProgressCallback) for callback in given):
        return given
    return [*given, ProgressCallback(stage, numbers)]


class Babysitter:
    """What watches a transformers Trainer of ours: whole checkpoints, alarms, finite gradients, SIGTERM."""

    def __init__(self, trainer: Any, settings: Mapping[str, Any], keep: int, on_alarm: OnAlarm):
        self.trainer, self.settings = trainer, settings
        self.alarms = Alarms(on_alarm)
        self.termination = Termination(trainer.accelerator)
        self.device = trainer.accelerator.device
        self.folder = Path(trainer.args.output_dir)
        self._begins = True  # else training goes on from a checkpoint
        for callback in (MarkComplete(settings, keep), self.alarms, FiniteGradients(), SaveAndStop(self.termination)):
            trainer.add_callback(callback)

    @contextmanager
    def watch(self, resume_from_checkpoint: bool | str | Path | None) -> Iterator[Path | None]:
        """Around `Trainer.train`, while the folder is locked: yields the checkpoint to continue from.

        Leaves with SystemExit(143) after SIGTERM, with KeyboardInterrupt after SIGINT, with RunStopped after an alarm
        that stops or on a full disk."""
        with training_in(self.folder):
            cpu.give_way(self.device)
            prepare_early_stopping(self.trainer.callback_handler.callbacks, self.trainer.args, "eval_loss")
            found = resume_point(self.folder, resume_from_checkpoint, self.settings)
            self._begins = found is None
            if found is not None:
                strategy.check_kind(found, self.trainer.accelerator)
            try:
                with self.termination, checkpoint.full_disk_explained(self.folder):
                    yield found
            finally:
                for module in self.trainer.model.modules():  # hooks of gradient checkpointing can't be pickled
                    if hasattr(module, "_require_grads_hooks"):
                        module.disable_input_require_grads()
            self.termination.leave()
            self.alarms.raise_if_stopped()

    @contextmanager
    def fast(self) -> Iterator[bool]:
        """Let the model use what makes CPUs faster inside the context; not where its weights are cut over processes.

        Yields whether its rows may be packed, if it computes the same with them (`rlhf.models.packing`)."""
        accelerator = self.trainer.accelerator
        whole = not strategy.spreads(accelerator)
        with cpu.for_training(self.trainer.model) if whole else nullcontext():
            yield not strategy.deepspeed(accelerator)

    def check(self, preflight: Callable[[Any], object]) -> None:
        """Run a trainer's preflight, if its training begins: at once, or once its weights are cut (FSDP2, DeepSpeed).

        Called inside `watch`."""
        self.trainer.remove_callback(OnceSharded)
        if self._begins and strategy.spreads(self.trainer.accelerator):
            self.trainer.add_callback(OnceSharded(partial(preflight, self.trainer)))
        elif self._begins:
            preflight(self.trainer)


class OnceSharded(TrainerCallback):
    """Do something before the first step, once the model is cut over the processes."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action()


class MarkComplete(TrainerCallback):
    """Mark transformers' checkpoint-N complete once it is on disk, then delete older ones: a killed save leaves none
    marked, and the last good one is always there."""

    def __init__(self, settings: Mapping[str, Any] | None = None, keep: int = 2) -> None:
        self.settings, self.keep = settings or {}, keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_all()  # every process has written its random state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            checkpoint.mark_complete(folder, self.settings)
            checkpoint.prune(args.output_dir, self.keep)
        wait_for_all()  # reading gigabytes takes minutes, and NCCL waits for ten


class Alarms(TrainerCallback):
    """One warning when a metric leaves its healthy range, and no other until it has been back.

    on_alarm: "warn" says it and goes on; "save" also writes a checkpoint; "stop" writes one and ends the run, which the
    same command takes up again from there. What was said before a resume is not said again: it follows from the
    logged lines.
    """

    def __init__(self, on_alarm: OnAlarm = "warn") -> None:
        self.on_alarm = on_alarm
        self.watch = metrics.Watch()
        self.stopped: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch, self.stopped = metrics.Watch(), None
        for line in state.log_history:
            self.watch.see(metrics.from_logs(line))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        found = self.watch.see(metrics.from_logs(logs or {}))
        if not found:
            return
        if state.is_world_process_zero:
            for advice in found:
                log.warning("step %d: %s", state.global_step, advice)
        if self.on_alarm != "warn":
            control.should_save = True
        if self.on_alarm == "stop":
            control.should_training_stop = True
            self.stopped = f"step {state.global_step}: {found[0]}"

    def raise_if_stopped(self) -> None:
        if self.stopped:
            raise RunStopped(
                f"{self.stopped}. Saved (on_alarm=stop); run the same command again to go on from here, or mend the "
                "cause and start anew"
            )


class FiniteGradients(TrainerCallback):
    """Refuse an optimizer step on a gradient that is NaN or infinite: the weights stay as they are."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if grads and not distributed.sum_is_finite(list(grads.values())):
            broken = [name for name, g in grads.items() if not bool(distributed.whole_tensor(g).isfinite().all())]
            if broken:
                raise RunStopped(
                    f"step {state.global_step + 1}: the gradient of {broken[0]} (and {len(broken) - 1} other tensors) "
                    "is not finite; lower the learning rate, or look for a broken row in the data. No step was taken "
                    "on it; the last checkpoint is good"
                )


def prepare_early_stopping(callbacks: Sequence[TrainerCallback], args: TrainingArguments, metric: str) -> None:
    """Let transformers' EarlyStoppingCallback, if there is one, watch `metric` where the settings name none.

    Raises InputError where nothing is evaluated."""
    if not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        return
    if args.eval_strategy == IntervalStrategy.NO:
        raise InputError("EarlyStoppingCallback: nothing is evaluated; give an eval_dataset, and set eval_steps")
    args.metric_for_best_model = args.metric_for_best_model or metric
    if args.greater_is_better is None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")


def watched(args: TrainingArguments) -> str:
    """Return the full name of the metric by which the best step is chosen; transformers takes it without eval_, too."""
    return f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"


def check_watched(args: TrainingArguments, metrics: Mapping[str, float]) -> None:
    """Raise InputError where the settings name a metric that an evaluation does not give."""
    if args.metric_for_best_model is not None and watched(args) not in metrics:
        names = ", ".join(metrics)
        raise InputError(f"metric_for_best_model={args.metric_for_best_model}: the evaluation gives {names}; name one")


class SaveAndStop(TrainerCallback):
    """After SIGTERM or SIGINT, or where a callback ends the run early: the step in hand was the last one, and a
    checkpoint is written."""

    def __init__(self, termination: Termination) -> None:
        self.termination = termination
        self.saved: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.termination.agreed():
            control.should_save = control.should_training_stop = True
        if control.should_save:  # a line of the log never reaches over a checkpoint: a resumed run couldn't write it
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        early = control.should_training_stop and state.global_step < state.max_steps
        if early and self.saved != state.global_step:  # comes after every other event of a run's last step
            control.should_save = control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if any(name.startswith("eval_") for name in metrics):
            check_watched(args, metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step


class JsonlCallback(TrainerCallback):
    """Append every log to ``path`` as a line ``{"step": ., "<metric>": .}``.

    A run that goes on at step s first cuts what the killed run had logged after s.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            metrics.truncate(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            numbers = metrics.from_logs(logs or {})
            if numbers:
                metrics.append_metrics(self.path, state.global_step, numbers)


class ProgressCallback(TrainerCallback):
    """One bar for a stage, with the numbers that matter; off a terminal, a line every ``every`` seconds."""

    def __init__(self, stage: str, numbers: Sequence[str] = ("loss",), every: float = 15.0) -> None:
        self.stage, self.names, self.every = stage, tuple(numbers), every
        self.bar: console.StageBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = console.StageBar(self.stage, state.max_steps, state.global_step, self.every)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar:
            numbers = metrics.from_logs(logs or {})
            self.bar.show({name: numbers[name] for name in self.names if name in numbers})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.close()
            self.bar = None
