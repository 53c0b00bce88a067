"""What an adapter_config.json may say; tests/ppo/test_adapter_kinds.py holds that it is then computed exactly."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf.errors import InputError
from rlhf.models.adapter_check import adapted_layers, check_config, check_same, layers_named, read_adapter
from rlhf.models.adapters import lora_config
from rlhf.models.loading import load_policy


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"init_lora_weights": "pissa"}, "rewrites the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "rewrites the base's weights"),
        ({"init_lora_weights": "olora"}, "rewrites the base's weights"),
        ({"init_lora_weights": "OLoRA"}, "rewrites the base's weights"),
        ({"init_lora_weights": "corda"}, "rewrites the base's weights"),
        ({"init_lora_weights": "loftq"}, "rewrites the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "rewrites the base's weights"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "language head"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "language head"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is not supported"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"peft_type": None}, "peft_type is None"),
        ({"brand_new": {"rate": 3}}, "brand_new"),
    ],
)
def test_what_is_refused_from_a_folder(tmp_path, settings, word):
    LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    read_adapter(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(InputError) as error:
        read_adapter(tmp_path)
    text = str(error.value)
    assert str(file) in text
    assert word in text
    assert "\n" not in text
    assert ";" in text, "what to do"


def test_what_a_folder_may_say(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=3, lora_dropout=0.1, use_rslora=True, use_dora=True, target_modules=["q_proj", "v_proj"],
        exclude_modules=["k_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, layers_to_transform=[1],
        layers_pattern="layers", modules_to_save=["lm_head"], trainable_token_indices=[3], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert vars(read_adapter(tmp_path)) == vars(config)


@pytest.mark.parametrize("start", ["pissa", "eva", False, "mica", "loftq"])
def test_a_new_adapter_starts_at_the_base_itself(start):
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = start
    with pytest.raises(InputError, match=r"peft_config: init_lora_weights=.*; take True or 'gaussian' or 'orthogonal'"):
        check_config(config, "peft_config")
    for other in (IA3Config(), LoHaConfig()):
        with pytest.raises(InputError, match="peft_type is"):
            check_config(other, "peft_config")


def test_settings_for_a_new_adapter_equal_those_of_the_adapter_that_it_is(tiny_model):
    """peft's own expansion of "all-linear" is the answer for the layers that it means."""
    held = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, held)
    layers = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 2 * 7
    assert layers_named("all-linear", model) == set(adapted_layers(model)) == layers
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    check_same(lora_config(4, 8.0), model, "the model")
    check_same(lora_config(4, 8.0, target_modules=kinds), model, "the model")
    check_same(LoraConfig(r=4, lora_alpha=8, target_modules=r".*_proj"), model, "the model")
    for asked, word in (
        (lora_config(8, 8.0), "lora_rank=8, but the model is already an adapter of rank 4"),
        (lora_config(4, 16.0), "lora_alpha=16.0, but the model is already an adapter with lora_alpha 8"),
        (lora_config(4, 8.0, target_modules=["q_proj"]), "lora_target_modules=q_proj, but"),
        (lora_config(4, 8.0, dropout=0.1), "lora_dropout=0.1"),
    ):
        with pytest.raises(InputError) as error:
            check_same(asked, model, "the model")
        assert word in str(error.value)
        assert "leave lora_rank at 0" in str(error.value)


def test_an_adapter_of_fewer_layers_is_not_one_of_all(tiny_model):
    model = get_peft_model(tiny_model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match=r"lora_target_modules=down_proj, gate_proj.* with lora_target_modules q_proj"):
        check_same(lora_config(4, 8.0), model, "the model")


def test_a_peft_model_object_is_checked_too(tiny_model):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora")
    with pytest.raises(InputError, match="rewrites the base's weights"):
        load_policy(get_peft_model(tiny_model, config))
    twin = AutoModelForCausalLM.from_config(tiny_model.config)
    named = get_peft_model(twin, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(InputError, match="has the adapters mine"):
        load_policy(named)


def test_an_adapters_saved_modules_are_trained_in_float32_over_a_base_in_bfloat16(tiny_model):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    policy = load_policy(tiny_model.to(torch.bfloat16), lora=config)
    trained = {name: p.dtype for name, p in policy.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    assert policy.get_input_embeddings().weight.dtype == torch.bfloat16
