"""Folders as they are found: whole ones load, others are refused by the name of what they lack."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference.tiny_chain import chain, save_adapter, save_base
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaForCausalLM,
)

from rlhf.errors import InputError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.pretrained import check_folder
from rlhf.models.scalar import last_token_scores, load_scalar_model, new_scalar_model

IDS = torch.tensor([[5, 6, 7, 8]])
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    return save_base(tmp_path, tiny_model, tiny_tokenizer)


def edit(folder: Path, drop: str = "", file: str = "model.safetensors", **tensors: torch.Tensor) -> None:
    """Rewrite a file of weights without the names that contain `drop`, and with some tensors replaced or added."""
    weights = load_file(folder / file)
    kept = {name: tensor for name, tensor in weights.items() if not drop or drop not in name}
    save_file(kept | tensors, folder / file, {"format": "pt"})


def settings(folder: Path, file: str = "config.json", **changes: object) -> None:
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def refused(*words: str):
    """Expect an InputError of one line with these words."""

    class Refusal:
        def __enter__(self):
            self.raised = pytest.raises(InputError)
            self.info = self.raised.__enter__()

        def __exit__(self, *error):
            result = self.raised.__exit__(*error)
            text = str(self.info.value)
            assert "\n" not in text
            assert all(word in text for word in words), text
            return result

    return Refusal()


# -- whole models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_policy, lambda path: new_scalar_model(path, seed=0)])
def test_a_missing_layer_is_refused_by_name(base, load):
    edit(base, drop="layers.1.mlp.up_proj")
    with refused(str(base), LAYER, "lack 1 tensors"):
        load(base)


def test_a_missing_language_head_is_refused_unless_it_is_tied_or_not_needed(base, tmp_path, tiny_model):
    edit(base, drop="lm_head")
    with refused(str(base), "lm_head.weight"):
        load_policy(base)
    assert new_scalar_model(base, seed=0).score.weight.shape == (1, 32)  # a reward model has no use for it
    tiny_model.config.tie_word_embeddings = True
    tied = LlamaForCausalLM(tiny_model.config)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_policy(tmp_path / "tied")(IDS).logits, tied.eval()(IDS).logits)


@pytest.mark.parametrize("load", [load_policy, lambda path: new_scalar_model(path, seed=0)])
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(base, load):
    edit(base, **{LAYER: torch.zeros(60, 32)})
    with refused(str(base), LAYER, "[60, 32]", "[64, 32]"):
        load(base)


def test_a_reward_model_without_its_head_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    _, folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    load_scalar_model(folder)
    edit(folder, drop="score")
    with refused(str(folder), "score.weight"):
        load_scalar_model(folder)


def test_an_encoder_may_lack_head_and_pooler_but_no_layer(tmp_path):
    bert = BertForMaskedLM(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    bert.save_pretrained(tmp_path / "bert")
    assert not any("pooler" in name for name in load_file(tmp_path / "bert" / "model.safetensors"))
    assert new_scalar_model(tmp_path / "bert", seed=0).classifier.weight.shape == (1, 16)
    edit(tmp_path / "bert", drop="layer.1.output.dense.weight")
    with refused("bert.encoder.layer.1.output.dense.weight"):
        new_scalar_model(tmp_path / "bert", seed=0)


def test_a_classifier_of_other_labels_gets_a_new_head_where_one_is_asked_for(tmp_path, tiny_model):
    config = copy.deepcopy(tiny_model.config)
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "three")
    assert new_scalar_model(tmp_path / "three", seed=0).score.weight.shape == (1, 32)
    with refused("num_labels=3"):
        load_scalar_model(tmp_path / "three")


def test_a_head_of_one_row_needs_no_num_labels(tmp_path, tiny_model, tiny_tokenizer):
    _, folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    before = last_token_scores(load_scalar_model(folder)[0], IDS, torch.ones_like(IDS))
    settings(folder, num_labels="absent", id2label="absent", label2id="absent")
    assert torch.equal(last_token_scores(load_scalar_model(folder)[0], IDS, torch.ones_like(IDS)), before)
    edit(folder, **{"score.weight": torch.zeros(2, 32)})
    with refused("score.weight", "[2, 32]", "[1, 32]"):
        load_scalar_model(folder)


def test_the_configuration_of_another_architecture_is_refused(base):
    GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2).save_pretrained(base)
    with refused(str(base), "GPT2LMHeadModel", "transformer."):
        load_policy(base)


def test_layers_that_the_configuration_does_not_count_are_named(base, caplog):
    settings(base, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, "rlhf"):
        load_policy(base)
    assert "does not use 9 tensors of its files, first model.layers.1." in caplog.text


def test_shards_that_are_missing_or_incomplete_are_refused(base, tiny_model):
    (base / "model.safetensors").unlink()
    tiny_model.save_pretrained(base, max_shard_size="40KB")
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 2
    with torch.no_grad():
        assert torch.equal(load_policy(base)(IDS).logits, tiny_model.eval()(IDS).logits)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    broken = copy.deepcopy(index)
    lost = broken["weight_map"].pop(LAYER)
    edit(base, drop=LAYER, file=lost)
    (base / "model.safetensors.index.json").write_text(json.dumps(broken))
    with refused(LAYER):
        load_policy(base)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    shards[1].unlink()
    with refused(str(base), shards[1].name):
        load_policy(base)


def test_weights_in_the_older_format_load(base, tiny_model):
    (base / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), base / "pytorch_model.bin")
    with torch.no_grad():
        assert torch.equal(load_policy(base)(IDS).logits, tiny_model.eval()(IDS).logits)
    (base / "pytorch_model.bin").write_bytes(b"no pickle")
    with refused(str(base), "no model could be loaded"):
        load_policy(base)


def test_a_damaged_file_is_refused_in_one_line(base):
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with refused(str(base), "no model could be loaded"):
        load_policy(base)
    (base / "config.json").write_text("{")
    with refused(str(base)):
        load_policy(base)


def test_code_in_a_models_folder_never_runs(base, tmp_path, monkeypatch):
    (base / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    settings(base, model_type="unheard_of", auto_map=names)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on stdin"))
    with refused(str(base), "trust_remote_code=True", "model object"):
        load_policy(base)
    settings(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.T", None]}, tokenizer_class="T")
    with refused(str(base), "trust_remote_code=True"):
        load_tokenizer(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "max_length": 4096},
        {"early_stopping": True, "length_penalty": 2.0},
        {"pad_token_id": -1, "top_k": 3},
    ],
)
def test_a_generation_config_that_could_not_be_saved_is_mended(base, tmp_path, wrong, caplog):
    (base / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 7], **wrong}))
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.generation_config.eos_token_id = [2]
    with pytest.raises(ValueError, match="Fix these issues"):
        plain.save_pretrained(tmp_path / "plain")
    with caplog.at_level(logging.WARNING, "rlhf"):
        policy = load_policy(base)
    assert "generation_config.json" in caplog.text
    assert policy.generation_config.eos_token_id == [2, 7]
    policy.generation_config.eos_token_id = [2]  # as fine-tuning does
    policy.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (1, [2])
    load_policy(plain)  # an object, too
    plain.save_pretrained(tmp_path / "object")


def test_a_runs_folder_names_the_models_in_it(tmp_path, tiny_model, tiny_tokenizer):
    chain(tmp_path / "run", tiny_model, tiny_tokenizer, lora=True)
    with refused("no config.json and no adapter_config.json", "base or reward_model or sft"):
        check_folder(tmp_path / "run")


# -- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, base, tiny_tokenizer) -> Path:
    return save_adapter(tmp_path, base, tiny_tokenizer)


def test_an_adapter_is_loaded_whole_or_refused(adapter):
    load_policy(adapter)
    file, whole = "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in whole if "lora_B" in name)
    edit(adapter, drop=name, file=file)
    with refused(str(adapter / file), "lacks 1 tensors"):
        load_policy(adapter)
    with refused(str(adapter), "lacks 1 weights", name):
        new_scalar_model(adapter, seed=0)
    save_file(whole | {"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 32)}, adapter / file)
    with refused(str(adapter / file), "model.norm.lora_A"):
        load_policy(adapter)
    save_file(whole | {name: torch.zeros(3, 3)}, adapter / file)
    with refused(str(adapter), "no adapter could be loaded"):
        load_policy(adapter)
    (adapter / file).unlink()
    with refused(str(adapter), f"{file} is missing"):
        load_policy(adapter)


def test_a_reward_models_adapter_without_its_head_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    _, folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    load_scalar_model(folder)
    edit(folder, drop="score", file="adapter_model.safetensors")
    with refused(str(folder), "score.weight"):
        load_scalar_model(folder)


def test_the_bases_path_is_kept_absolute(tmp_path, base, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    load_policy("base", lora=lora).save_pretrained("sft")
    tiny_tokenizer.save_pretrained("sft")
    assert json.loads(Path("sft/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    load_policy(tmp_path / "sft")
    settings(tmp_path / "sft", "adapter_config.json", base_model_name_or_path="../base")  # from the adapter's folder
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    policy = load_policy(tmp_path / "sft")
    assert os.path.samefile(policy.peft_config["default"].base_model_name_or_path, base)
    assert os.path.isabs(policy.peft_config["default"].base_model_name_or_path)


def test_errors_about_the_base_name_the_adapters_file(tmp_path, adapter, tiny_tokenizer):
    settings(adapter, "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with refused(f"{adapter}/adapter_config.json", "base_model_name_or_path", str(tmp_path / "gone")):
        load_policy(adapter)
    settings(adapter, "adapter_config.json", base_model_name_or_path=str(adapter))
    with refused(f"{adapter}/adapter_config.json", "itself an adapter", "merge"):
        load_policy(adapter)
    settings(adapter, "adapter_config.json", base_model_name_or_path=None)
    with refused(f"{adapter}/adapter_config.json", "is empty"):
        load_policy(adapter)
    (adapter / "adapter_config.json").write_text("[")
    with refused(f"{adapter}/adapter_config.json", "cannot be read"):
        load_policy(adapter)


@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_that_saved_more_embeddings_than_its_tokenizer_has(tmp_path, tiny_model, tiny_tokenizer, tie):
    tiny_model.config.tie_word_embeddings = tie
    model = LlamaForCausalLM(tiny_model.config)
    base = save_base(tmp_path, model, tiny_tokenizer)
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(len(tiny_tokenizer) + 1, pad_to_multiple_of=64)
    lora = get_peft_model(grown, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "sft")
    tiny_tokenizer.save_pretrained(tmp_path / "sft")
    policy = load_policy(tmp_path / "sft")
    assert isinstance(policy, PeftModel)
    with torch.no_grad():
        assert torch.equal(policy.eval()(IDS).logits, lora.eval()(IDS).logits)
    scalar = new_scalar_model(tmp_path / "sft", seed=0)
    assert torch.equal(scalar.get_input_embeddings().weight, grown.get_input_embeddings().weight)
