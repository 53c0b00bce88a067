"""The precision that every stage computes in, and the numbers that stay float32."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from reference.ppo_runs import make, prepared
from reference.resume_worker import make as make_stage
from reference.resume_worker import weights
from reference.tiny_chain import chain
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward_models.config import RewardConfig
from reward_models.config import trl_arguments as reward_arguments
from rlhf.models import loading as models
from rlhf.models.adapters import lora_config
from rlhf.padding import make_batch
from rlhf.run import precision
from rlhf.sft.config import SFTConfig
from rlhf.sft.trainer import trl_arguments as sft_arguments

FOUND = "a CPU that has it"


@pytest.fixture
def hardware(monkeypatch):
    """Set the hardware that is reported; conftest.py sets it for all other tests."""

    def is_there(name: str | None) -> None:
        monkeypatch.setattr(precision, "bf16_hardware", lambda: name)

    return is_there


@pytest.mark.parametrize("found", [None, FOUND])
def test_fine_tuning_and_reward_models_follow_the_same_rule(hardware, tmp_path, caplog, found):
    hardware(found)
    for settings, arguments in ((SFTConfig, sft_arguments), (RewardConfig, reward_arguments)):
        chosen = [
            arguments(settings(output_dir=str(tmp_path), bf16=x), evaluate=False).bf16 for x in (None, True, False)
        ]
        assert chosen == [found is not None, True, False]


def test_what_the_hardware_decides_is_logged_once_asked(hardware, caplog):
    hardware(FOUND)
    with caplog.at_level(logging.INFO, "rlhf"):
        for setting in (True, False, None):
            precision.log_choice(setting)
    assert caplog.messages == [f"precision: bfloat16 autocast ({FOUND}); bf16: false computes in float32"]


@pytest.mark.parametrize("found", [None, FOUND])
@pytest.mark.parametrize(("setting", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_setting_wins_over_the_hardware_and_needs_no_word(hardware, caplog, setting, expected, found):
    hardware(found)
    with caplog.at_level(logging.INFO, "rlhf"):
        assert precision.compute_dtype(setting) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("found", "expected", "line"),
    [
        (None, torch.float32, "precision: float32"),
        (FOUND, torch.bfloat16, f"precision: bfloat16 autocast ({FOUND}); bf16: false computes in float32"),
    ],
)
def test_without_a_setting_the_hardware_decides_and_what_is_logged(hardware, found, expected, line):
    hardware(found)
    assert precision.compute_dtype(None) == expected
    assert f"precision: {precision.explained()}" == line


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, None),
        ({"avx512": True, "avx2": True}, None),  # it can, and gains nothing
        ({"avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True}, "avx512_bf16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "amx_bf16"),
        ({"sve_bf16": True}, "sve_bf16"),
    ],
)
def test_instructions_of_a_cpu(monkeypatch, capabilities, expected):
    monkeypatch.undo()  # conftest.py's answer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.bf16_hardware() == expected


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_for_what_it_does_itself(monkeypatch, supported):
    """Before Ampere, torch emulates bfloat16, slowly, and reports it as supported."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert precision.bf16_hardware() == ("a GPU" if supported else None)


@pytest.mark.parametrize(
    ("lora", "value_model"),
    [(False, "separate"), (False, "shared_trunk"), (True, "adapter"), (True, "separate"), (True, "shared_trunk")],
)
def test_updates_in_bfloat16(tmp_path, tiny_model, tiny_tokenizer, hardware, lora, value_model):
    """The hardware decides. Trained weights, Adam's moments and every number of the rollout are float32."""
    hardware(FOUND)
    policy = chain(tmp_path, tiny_model, tiny_tokenizer, lora)[0]
    trainer = make(tmp_path, policy, bf16=None, value_kind=value_model)
    models = trainer.actor_critic
    base = next(p for name, p in models.policy.named_parameters() if "embed_tokens" in name)
    assert base.dtype == (torch.bfloat16 if lora else torch.float32), "a frozen base is kept as it is computed in"
    before = {name: p.detach().clone() for name, p in models.named_parameters()}
    products: list[torch.dtype] = []
    layer = next(m for name, m in models.policy.named_modules() if name.endswith("up_proj"))
    layer.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    rollout = prepared(trainer)
    assert set(products) == {torch.bfloat16}
    metrics = trainer.update(rollout)
    for name in ("logprobs", "reference_logprobs", "entropy", "values", "rewards", "advantages", "returns"):
        column = getattr(rollout, name)
        assert column.dtype == torch.float32, name
        assert column.isfinite().all(), name
    assert metrics["kl_nats"] == 0.0
    assert metrics["step0_ratio_error"] == 0.0
    trained = [p for p in models.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    moments = [
        state[key] for state in trainer.optimizer.state_dict()["state"].values() for key in ("exp_avg", "exp_avg_sq")
    ]
    assert {t.dtype for t in moments} == {torch.float32}
    for name, parameter in models.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    with trainer.accelerator.autocast():
        outputs = models(make_batch([[5, 6, 7]], [[8, 9]], 3, "cpu"), 1.0, ("policy", "value", "reference"))
    assert {getattr(outputs, name).dtype for name in outputs._fields} == {torch.float32}
    assert len(set(outputs.values[0].tolist())) == 2
    assert outputs.values.bfloat16().float().ne(outputs.values).any(), "values have more than bfloat16's digits"


# ---------------------------------------------------------------- model objects


@pytest.mark.parametrize("stage", ["sft", "reward_model", "trained reward_model", "ppo"])
def test_an_object_in_bfloat16_is_trained_as_its_folder_is(tmp_path, tiny_model, tiny_tokenizer, caplog, stage):
    """transformers gives an object in its checkpoint's precision. Independent: the same run from the folder."""
    start: Any
    start, rewards = chain(tmp_path, tiny_model.bfloat16(), tiny_tokenizer, lora=False)
    given = AutoModelForCausalLM.from_pretrained(start)
    if stage.startswith("trained"):  # only an object is trained further, with its head: here one in float32
        given = AutoModelForSequenceClassification.from_pretrained(rewards, dtype=torch.bfloat16)
        start = copy.deepcopy(given).float()
    assert given.dtype == torch.bfloat16
    ends = []
    for model in (start, given):
        with caplog.at_level(logging.INFO, "rlhf"):
            trainer = make_stage(stage.split()[-1], model, rewards, tmp_path / f"run{len(ends)}")
        assert any("bfloat16: trained in float32" in line for line in caplog.messages) == (
            model is given and stage != "reward_model"  # which copies the weights
        )
        trainer.train()
        ends.append(weights(trainer))
    if stage == "ppo":
        assert trainer.state.log_history[0]["kl_nats"] == 0.0
    assert {tensor.dtype for tensor in ends[0].values()} == {torch.float32}
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_of_an_object_under_an_adapter_only_the_adapter_is_converted(tmp_path, tiny_model, tiny_tokenizer):
    """A frozen base stays as it is; the adapter of a loaded one may be in bfloat16, too."""
    chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapted = models.load_policy(tmp_path / "base", lora=lora_config(2, 4.0)).bfloat16()
    for given, lora in ((plain, {"lora_rank": 2}), (adapted, {})):
        trainer = make(tmp_path, given, tokenizer=tiny_tokenizer, **lora)
        found = {(p.requires_grad, p.dtype) for p in trainer.actor_critic.policy.parameters() if p.requires_grad}
        assert found == {(True, torch.float32)}
        assert {p.dtype for p in trainer.actor_critic.policy.parameters() if not p.requires_grad} >= {torch.bfloat16}


def test_a_reference_object_in_bfloat16_is_that_of_its_folder(tmp_path, tiny_model, tiny_tokenizer):
    folder, _ = chain(tmp_path, tiny_model.bfloat16(), tiny_tokenizer, lora=False)
    given = AutoModelForCausalLM.from_pretrained(folder)
    rollout = prepared(make(tmp_path, folder, ref_model=given))
    assert torch.equal(rollout.logprobs, rollout.reference_logprobs)
