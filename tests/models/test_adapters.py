"""Names of a peft model's parameters, and the model under its adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference.families import new_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rlhf.errors import InputError
from rlhf.models.adapter_check import check_same
from rlhf.models.adapters import adapter_of, backbone, base_model, base_name
from rlhf.models.scalar import new_scalar_model


def llama():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def bert():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=1, **sizes))


KINDS = {
    "linear layers": (llama, {"target_modules": "all-linear"}),
    "embeddings, DoRA": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "trained tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "layers called value": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier", "pooler"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_tell_adapters_from_the_base(kind):
    make, settings = KINDS[kind]
    plain = make()
    expected = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    model = get_peft_model(plain, LoraConfig(r=2, **settings))
    model.add_adapter("other", LoraConfig(r=2, **settings))
    found: dict[str | None, set[int]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(adapter_of(name), set()).add(id(parameter))
        if adapter_of(name) is None:
            assert torch.equal(parameter, expected.pop(base_name(name).removeprefix("base_model.model.")))
    assert not expected, "every parameter of the base is found under its own name"
    assert found.keys() == {None, "default", "other"}
    for adapter in ("default", "other"):  # peft's own idea of what belongs to one
        model.set_adapter(adapter)
        assert {id(p) for p in model.parameters() if p.requires_grad} == found[adapter]


def test_the_model_under_its_adapters():
    plain = llama()
    assert base_model(plain) is plain
    trunk = plain.model
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(adapted, PeftModel)
    assert base_model(adapted) is plain
    assert backbone(adapted) is backbone(plain) is trunk


def test_a_family_whose_prefix_names_nothing():
    """Llama 4's says language_model, and holds the transformer as `model`."""
    plain = new_model("llama4_text")
    assert backbone(plain) is plain.model
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    check_same(LoraConfig(r=2, target_modules="all-linear"), adapted, "the model")
    scalar = new_scalar_model(new_model("llama4_text"), seed=0)
    assert torch.equal(backbone(scalar).norm.weight, new_model("llama4_text").model.norm.weight)
    with pytest.raises(InputError, match="LlamaModel: no transformer under its head is known; take another family"):
        backbone(llama().model)
