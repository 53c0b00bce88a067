"""Events of transformers' callbacks, early stops and learning rates, the same in the three trainers."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from reference.ppo_runs import ROWS, lines, make, prepared
from reference.tiny_chain import save_base
from transformers import EarlyStoppingCallback, TrainerCallback

from reward_models import RewardConfig, RewardTrainer
from rlhf import chat
from rlhf.errors import InputError
from rlhf.ppo.config import PPOConfig
from rlhf.run.checkpoint import latest_checkpoint
from rlhf.sft.trainer import SFTConfig, SFTTrainer

EVENTS = ("init_end", "train_begin", "epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "step_end",
          "log", "evaluate", "save", "epoch_end", "train_end")  # fmt: skip
DEMONSTRATIONS = [{"prompt": f"Count to {n}", "completion": "one, two"} for n in range(12)]
HELD_OUT = [{"prompt": f"Say {n}", "completion": "two"} for n in range(2)]
PAIRS = [{"prompt": f"Count to {n}", "chosen": "one two", "rejected": "ten"} for n in range(12)]
HELD_OUT_PAIRS = [{"prompt": f"Say {n}", "chosen": "one two", "rejected": "ten"} for n in range(2)]
OTHER_ROWS = [{"prompt": f"Name {n}", "number": n} for n in range(2)]
TRAINERS = ("sft", "reward model", "ppo")


class Spy(TrainerCallback):
    """Every event's name with the step at which it came, and the metrics of the evaluations."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.metrics: list[dict[str, float]] = []


def _seen(name: str) -> Any:
    def event(self: Spy, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append((name, state.global_step))
        if name == "evaluate":
            self.metrics.append(given["metrics"])

    return event


for _name in EVENTS:
    setattr(Spy, f"on_{_name}", _seen(_name))


class StopAt(TrainerCallback):
    """Asks for the end at a step, at the event that is named."""

    def __init__(self, step: int, event: str = "step_end") -> None:
        self.step = step
        setattr(self, f"on_{event}", self.stop)

    def stop(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def constant(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def new(kind: str, folder: Path, model: Any, tokenizer: Any, callbacks: list[TrainerCallback], **changes: Any) -> Any:
    """A trainer with three steps of one optimizer step each and an evaluation after each."""
    common = {"output_dir": str(folder), "bf16": False, "learning_rate": 1e-6, "preflight": False, "eval_steps": 1}
    common |= {"save_steps": 0} | changes
    if kind == "ppo":
        held_out = None if common["eval_steps"] == 0 else OTHER_ROWS
        small = {"updates": 3, "rollout_size": 4, "minibatch_size": 4, "inner_epochs": 1, "max_new_tokens": 4}
        given = {"rows": ROWS, "eval_rows": held_out, "tokenizer": tokenizer, "callbacks": callbacks}
        return make(folder, model, constant, **given, **small | common, missing_eos="off")
    chat.prepare_tokenizer(tokenizer)
    small = {"epochs": 1, "logging_steps": 1, "microbatch_size": 4}
    own: Any
    if kind == "sft":
        own = SFTConfig(batch_size=4, **small | common)
        given = {"train_dataset": DEMONSTRATIONS, "eval_dataset": HELD_OUT if common["eval_steps"] else None}
        return SFTTrainer(model, own, **given, processing_class=tokenizer, callbacks=callbacks)
    own = RewardConfig(prompts_per_batch=4, **small | common)
    given = {"train_dataset": PAIRS, "eval_dataset": HELD_OUT_PAIRS if common["eval_steps"] else None}
    return RewardTrainer(model, args=own, **given, processing_class=tokenizer, callbacks=callbacks)


def once(seen: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Without a log right after a log: Trainer logs an evaluation by itself, PPO together with its update."""
    return [event for at, event in enumerate(seen) if at == 0 or event != seen[at - 1] or event[0] != "log"]


def test_ppo_sends_trainers_events_in_trainers_order(tmp_path, tiny_model, tiny_tokenizer):
    spies = {kind: Spy() for kind in ("sft", "ppo")}
    for kind, spy in spies.items():
        new(kind, tmp_path / kind, copy.deepcopy(tiny_model), tiny_tokenizer, [spy], save_steps=2).train()
    expected = [event for event in once(spies["sft"].seen) if event != ("log", 3)]  # Trainer's summary is one of them
    assert [event for event in once(spies["ppo"].seen) if event != ("log", 3)] == expected
    assert [set(metrics) >= {"eval_score", "eval_kl_nats"} for metrics in spies["ppo"].metrics] == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("event", ["step_end", "evaluate"])
def test_an_early_stop_leaves_a_checkpoint(tmp_path, tiny_model, tiny_tokenizer, kind, event):
    trainer = new(kind, tmp_path, tiny_model, tiny_tokenizer, [StopAt(2, event)])
    trainer.train()
    assert trainer.state.global_step == 2
    checkpoint = latest_checkpoint(trainer.args.output_dir, trainer_settings(trainer))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"


def trainer_settings(trainer: Any) -> Any:
    from rlhf.config import resume_settings

    return trainer._settings if hasattr(trainer, "_settings") else resume_settings(trainer.args, PPOConfig)


def test_a_callback_added_later_stops_early_too(tmp_path, tiny_model, tiny_tokenizer):
    trainer = new("sft", tmp_path, tiny_model, tiny_tokenizer, [])
    trainer.add_callback(StopAt(1))
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "complete").is_file()


@pytest.mark.parametrize("kind", TRAINERS)
def test_early_stopping_of_transformers(tmp_path, tiny_model, tiny_tokenizer, kind):
    """Nothing gets better by more than 1: the second evaluation is the last one."""
    trainer = new(kind, tmp_path, tiny_model, tiny_tokenizer, [EarlyStoppingCallback(1, early_stopping_threshold=1.0)])
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.best_metric is not None
    assert list(Path(trainer.args.output_dir).glob("checkpoint-2"))


@pytest.mark.parametrize("kind", TRAINERS)
def test_early_stopping_without_an_evaluation_is_one_line(tmp_path, tiny_model, tiny_tokenizer, kind):
    trainer = new(kind, tmp_path, tiny_model, tiny_tokenizer, [EarlyStoppingCallback(1)], eval_steps=0)
    with pytest.raises(InputError, match="EarlyStoppingCallback: nothing is evaluated; give an eval_dataset"):
        trainer.train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_metric_to_watch_that_no_evaluation_gives(tmp_path, tiny_model, tiny_tokenizer, kind):
    trainer = new(kind, tmp_path, tiny_model, tiny_tokenizer, [], metric_for_best_model="eval_happiness")
    with pytest.raises(InputError, match=r"metric_for_best_model=eval_happiness: the evaluation gives .*eval_"):
        trainer.train()


class Evaluates(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_evaluate = state.global_step == 2


def test_a_callback_can_ask_ppo_for_an_evaluation(tmp_path, tiny_model, tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    given = {"tokenizer": tiny_tokenizer, "eval_rows": OTHER_ROWS, "callbacks": [Evaluates()], "updates": 3}
    make(tmp_path, tiny_model, **given).train()
    assert ["eval_score" in row for row in lines(tmp_path, "metrics.jsonl")] == [False, True, False]


# -- learning rates ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_stays_0_in_stages_by_hand_after_the_run(tmp_path, tiny_model, tiny_tokenizer, caplog, schedule):
    chat.prepare_tokenizer(tiny_tokenizer)
    trainer = make(tmp_path, tiny_model, tokenizer=tiny_tokenizer, updates=2, lr_schedule=schedule)
    trainer.train()
    with caplog.at_level(logging.WARNING, "rlhf"):
        rates = [trainer.update(prepared(trainer))["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.0] * 3, abs=1e-20)
    assert "update 3 of 2: the learning rate has fallen to 0" in caplog.text


def test_the_reward_models_cosine_ends_at_0(tmp_path, tiny_model, tiny_tokenizer):
    trainer = new("reward model", tmp_path, tiny_model, tiny_tokenizer, [], eval_steps=0, warmup_fraction=0.0)
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-6, 0.75e-6, 0.25e-6], rel=1e-6)  # (1 + cos(pi k / 3)) / 2
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("kind", ["sft", "reward model"])
def test_an_adapter_has_a_learning_rate_of_its_own(tmp_path, tiny_model, tiny_tokenizer, caplog, kind):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    rates = {}
    with caplog.at_level(logging.INFO, "rlhf"):
        for rank in (0, 4):
            trainer = new(kind, tmp_path / str(rank), str(base), tiny_tokenizer, [], learning_rate=None, lora_rank=rank)
            rates[rank] = (trainer.args.learning_rate, trainer.config.learning_rate)
    assert rates == {0: (1e-5, 1e-5), 4: (1e-4, 1e-4)}
    assert "learning_rate: 0.0001, the default of an adapter" in caplog.text


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, PPOConfig])
@pytest.mark.parametrize("value", [0.0, -1e-5, float("nan")])
def test_learning_rates_that_are_none(config, value):
    with pytest.raises(InputError, match=r"learning_rate=.* must be (positive|a number)"):
        config(learning_rate=value)


# -- numbers that JSON has not -----------------------------------------------------------------------------


def nan_at_times(prompts: Any, completions: Any, log_metric: Any = None, log_extra: Any = None, **columns: Any) -> Any:
    log_metric("odd", float("nan"))
    log_extra("width", [float("inf")] * len(completions))
    return [1.0 for _ in completions]


def test_a_run_writes_no_nan_and_resumes_with_it(tmp_path, tiny_model, tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    given = {"tokenizer": tiny_tokenizer, "save_steps": 1, "updates": 2}
    model = copy.deepcopy(tiny_model)
    make(tmp_path, tiny_model, nan_at_times, **given, callbacks=[StopAt(1)]).train()
    for file in [*(tmp_path / "run").rglob("*.json"), *(tmp_path / "run").glob("*.jsonl")]:
        assert "NaN" not in file.read_text(), file
        assert "Infinity" not in file.read_text(), file
    again = make(tmp_path, model, nan_at_times, **given)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in again.state.log_history] == [1, 2]
    assert math.isnan(again.state.log_history[0]["odd"])
