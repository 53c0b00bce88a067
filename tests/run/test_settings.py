"""Settings as people hand them in from Python: every field of the three configs with values of other types."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reward_models.config import RewardConfig
from rlhf.errors import InputError
from rlhf.hints import choices_of, hints_of
from rlhf.ppo.config import PPOConfig
from rlhf.run import settings
from rlhf.run.trl_arguments import training_arguments
from rlhf.sft.config import SFTConfig

CONFIGS = (PPOConfig, SFTConfig, RewardConfig)
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]


def wrong_values(hint: Any) -> list[Any]:
    """Values that no field of this type takes."""
    kinds = choices_of(hint)
    values: list[Any] = [object(), {1: 2}, float("nan")]
    if bool not in kinds:
        values.append(True)
    if int not in kinds and float not in kinds:
        values.append(3.5)
    if float not in kinds:
        values.append(2.5)
    if str not in kinds and not any(typing.get_origin(kind) is list for kind in kinds):
        values += ["1e-5", "yes"]
    if type(None) not in kinds:
        values.append(None)
    return values


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=[f"{c.__name__}-{name}" for c, name in FIELDS])
def test_a_wrong_type_is_one_line_that_names_the_field(config, name) -> None:
    for value in wrong_values(hints_of(config)[name]):
        with pytest.raises(InputError, match=rf"^{name}=") as caught:
            config(**{name: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_s_own_values_are_taken_back(config) -> None:
    values = {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}
    assert config(**values) == config()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a number; write 1e-5, without quotes (in YAML"),
        ({"bf16": "yes"}, "bf16='yes' must be True or False or None; write True, without quotes"),
        ({"bf16": "none"}, "bf16='none' must be True or False or None; write None, without quotes"),
        ({"updates": "20"}, "updates='20' must be a whole number; write 20, without quotes"),
        ({"updates": 2.5}, "updates=2.5 must be a whole number"),
        ({"reward_weights": [1, "2"]}, "reward_weights=[1.0, '2'] must be a list of a number or None"),
        ({"lr_schedule": "cosin"}, "lr_schedule='cosin' must be one of linear, cosine, constant"),
        ({"report_to": "tensorbord"}, "report_to: unknown tracker tensorbord; did you mean tensorboard?"),
        (
            {"lora_target_modules": r".*q_proj"},
            "lora_target_modules: '.*q_proj' is no layer's name; write q_proj,v_proj",
        ),
    ],
)
def test_the_line_says_what_to_write(values, says) -> None:
    with pytest.raises(InputError) as caught:
        PPOConfig(**values)
    assert str(caught.value).startswith(says)


def test_values_that_mean_the_same_are_the_same() -> None:
    loose = PPOConfig(output_dir=Path("x"), learning_rate=1, reward_weights=(1, np.float32(2)), updates=np.int64(3))
    assert loose == PPOConfig(output_dir="x", learning_rate=1.0, reward_weights=[1.0, 2.0], updates=3)
    assert type(loose.updates) is int
    assert type(loose.learning_rate) is float


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("given", "taken"),
    [("none", None), (["none"], None), ([], None), (None, None), ("all", ["all"]), ("tensorboard", ["tensorboard"]),
     ("tensorboard, tensorboard", ["tensorboard", "tensorboard"])],
)  # fmt: skip
def test_trackers_are_named_as_transformers_names_them(config, given, taken) -> None:
    assert config(report_to=given).report_to == taken


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("given", "taken"),
    [("all-linear", None), (None, None), ("q_proj,v_proj", ["q_proj", "v_proj"]), (["q_proj"], ["q_proj"]),
     (("q_proj", "layers.0.mlp"), ["q_proj", "layers.0.mlp"])],
)  # fmt: skip
def test_layers_are_named_as_peft_names_them(config, given, taken) -> None:
    assert config(lora_target_modules=given).lora_target_modules == taken


def test_a_tracker_that_is_missing_is_one_line_with_the_remedy(monkeypatch) -> None:
    there = settings.importlib.util.find_spec
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None if name == "wandb" else there(name))
    with pytest.raises(InputError, match=r"^report_to: wandb is not installed; pip install wandb, or leave it out"):
        PPOConfig(report_to=["tensorboard", "wandb"])
    PPOConfig(report_to="all")  # those that are installed


def test_transformers_knows_every_tracker() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(settings.TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_run_name_and_project_reach_the_trackers(tmp_path, monkeypatch) -> None:
    import os

    import transformers

    monkeypatch.setenv("WANDB_PROJECT", "before")

    def arguments(**values: Any) -> Any:
        config = SFTConfig(output_dir=str(tmp_path / "toy" / "sft"), **values)
        return training_arguments(config, transformers.TrainingArguments)

    assert (arguments().run_name, os.environ["WANDB_PROJECT"]) == ("toy/sft", "before")
    named = arguments(run_name="mine", project="ours")
    assert (named.run_name, named.project, os.environ["WANDB_PROJECT"]) == ("mine", "ours", "ours")
    assert arguments(report_to="none").report_to == []
    assert "tensorboard" in arguments(report_to="all").report_to
