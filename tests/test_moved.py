"""Former module names: what was importable under them still is."""

from __future__ import annotations

import importlib

import pytest

import rlhf.ppo.math
import rlhf.run.stages
from rlhf.moved import FORMER

NAMES = {
    "rlhf.actor_critic": ("ActorCritic", "build_actor_critic", "response_logprobs"),
    "rlhf.rollout": ("Rollout", "plan_minibatches", "Responses", "TransformersEngine", "make_batch", "pad"),
    "rlhf.lora": ("fuse", "active_adapter", "share_base"),
    "rlhf.ppo_math": ("gae", "policy_loss", "token_logprobs"),
    "rlhf.ppo_config": ("PPOConfig",),
    "rlhf.sft_config": ("SFTConfig",),
    "rlhf.packing": ("Rows", "packed_hidden"),
    "rlhf.records": ("Prompt", "read_rankings"),
    "rlhf.shapes": ("ranking_fields",),
    "rlhf.sources": ("rows",),
    "rlhf.checkpoint": ("write_json_atomic",),
    "rlhf.stages": ("begin_stage", "Manifest"),
    "rlhf.report": ("write_report",),
}


@pytest.mark.parametrize("module", FORMER)
def test_a_former_module_has_its_names(module):
    found = importlib.import_module(module)
    for name in NAMES[module]:
        assert getattr(found, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        found.nothing_of_the_kind  # noqa: B018


def test_a_module_that_was_renamed_is_the_same_module():
    assert importlib.import_module("rlhf.stages") is rlhf.run.stages
    assert importlib.import_module("rlhf.ppo_math") is rlhf.ppo.math
    assert rlhf.run.stages.__spec__.name == "rlhf.run.stages"


def test_rooms_have_the_names_of_the_modules_they_replace():
    from rlhf import evaluate, models, preflight

    assert callable(models.load_policy)
    assert callable(models.score_head)
    assert callable(preflight.check_ppo)
    assert callable(evaluate.bootstrap_interval)
    assert callable(evaluate.clustered_accuracy)
