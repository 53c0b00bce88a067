"""The counted memory of a 7B run: the shapes are the real classes', and the guide shows what the script counts."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference.documents import ROOT
from reference.tiny_chain import save_base
from transformers import AutoModelForCausalLM, Qwen2Config

from rlhf.models.adapters import lora_config
from rlhf.ppo.build import build_actor_critic

spec = importlib.util.spec_from_file_location("memory_7b", ROOT / "recipes" / "studies" / "memory_7b.py")
assert spec is not None
assert spec.loader is not None
memory = importlib.util.module_from_spec(spec)
sys.modules["memory_7b"] = memory
spec.loader.exec_module(memory)
SHAPE, PLAN = memory.QWEN_7B, memory.PLAN


def qwen(shape, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip


def test_parameters_are_those_of_the_real_classes():
    """Qwen2.5-7B's own configuration, without memory (the meta device), and an adapter of rank 64 on it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen(SHAPE, 28, 28), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == SHAPE.whole == 7_615_616_512
    assert sum(p.numel() for p in model.model.parameters()) == SHAPE.trunk
    adapted = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == SHAPE.lora(64)


def kept_bytes(shape, layers: int, checkpointing: bool) -> float:
    """What autograd keeps per token of a forward in bfloat16 under an adapter of rank 8, weights apart."""
    model = AutoModelForCausalLM.from_config(qwen(shape, layers, 28), dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other tensor gets its address
        return tensor

    ids = torch.zeros(4, 128, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.model(input_ids=ids, use_cache=False)
    storages = [tensor.untyped_storage() for place, tensor in kept.items() if place not in weights]
    return sum(storage.nbytes() for storage in storages) / ids.numel()


@pytest.mark.slow
@pytest.mark.long
def test_activations_are_what_autograd_keeps():
    """A layer of an eighth of the width: with and without checkpointing, from the difference of two depths."""
    small = memory.Shape(hidden=448, layers=1, key_value=64, intermediate=2368, vocabulary=512)
    layer = kept_bytes(small, 2, False) - kept_bytes(small, 1, False)
    assert small.layer(1, 8) == pytest.approx(layer, rel=0.05)
    recomputed = kept_bytes(small, 3, True) - kept_bytes(small, 2, True)
    assert 2 * small.hidden == recomputed


def test_adapters_are_float32_on_a_base_in_bfloat16(tmp_path, tiny_model, tiny_tokenizer):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    models = build_actor_critic(base, lora=lora_config(4, 8.0), dtype=torch.bfloat16)
    kinds = {"lora_" in name or "value_head" in name: p.dtype for name, p in models.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_the_arithmetic_by_hand():
    rows = {what: size for what, _, size in memory.lora_ppo(SHAPE, PLAN)}
    assert rows["the base, in bfloat16"] == 2 * 7_615_616_512
    assert SHAPE.cache(1) == 57_344
    assert SHAPE.layer(1, 64) == 240_512
    held = 2 * 7_615_616_512 + 32 * 161_480_704
    assert rows["**held all the time**"] == held
    cache, prompts, probabilities = 64 * 1024 * 57_344, 64 * 512 * 240_512, 64 * 152_064 * 12
    assert rows["while it samples: cache, prompts, probabilities"] == cache + prompts + probabilities
    update = 2 * 4 * 161_480_704 + 8192 * (28 * 3584 * 2 + 2 * 240_512) + 2**26 * 10
    assert rows["in the update: gradients, recomputed activations, logits"] == update


def test_every_way_by_hand():
    """Against the other tables' rows, and QLoRA's base from a layer's weights: 2 of 3584 x 3584, 2 of 3584 x 512, 3 of
    3584 x 18944."""
    cards, adapter, whole = memory.cards(SHAPE, PLAN), 161_480_704, 7_615_616_512
    held, sampled = (memory.lora_ppo(SHAPE, PLAN)[row][2] for row in (3, 4))
    assert cards["LoRA, 1 card"].held == held
    assert cards["LoRA, 1 card"].peak == held + sampled
    peaks = {what: size for what, _, size in memory.stages(SHAPE, PLAN)}
    both = cards["LoRA, 8 cards (DDP)"]
    assert both.held + both.update == peaks["PPO in the update, DDP: both models in one backward"]
    rows = {what: size for what, _, size in memory.full_ppo(SHAPE, PLAN, 8)}
    eight = cards["full, 8 cards (FSDP2)"]
    assert eight.held == rows["**held all the time**"]
    sampled, updated, start = list(rows.values())[-3:]
    assert eight.held + eight.sampling == sampled
    assert eight.held + eight.update == updated
    embeddings = 152_064 * 3584  # of policy, value model and reference, and two heads: five such matrices
    assert eight.sampling == cards["full, 1 card"].sampling + 3 * 2 * embeddings
    assert start == (2 * whole + SHAPE.trunk) / 2 + 2 * SHAPE.trunk + 5 * 4 * embeddings
    layers = 2 * 8192 * (28 * 3584 * 2 + 2 * SHAPE.layer(1, 0)) + 4 * whole / 28 + 2**26 * 10
    assert updated - eight.held == pytest.approx((whole + SHAPE.trunk) / 2 + layers + (5 + 3) * 2 * embeddings)
    linear = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    qlora = cards["QLoRA, 1 card"]
    bits = 4 + 8 / 64 + 32 / 16384  # a byte per block of 64, a float32 per 256 blocks
    assert qlora.base == linear * bits / 8 + 2 * (whole - linear)
    assert qlora.update - cards["LoRA, 1 card"].update == 2 * 3584 * 18944
    assert qlora.policy == 12 * adapter
    eighth = cards["QLoRA, 8 cards (DDP)"]
    assert eighth.held == qlora.held  # DDP cuts nothing
    assert eighth.update - qlora.update == both.update - cards["LoRA, 1 card"].update
    one = cards["full, 1 card"]
    assert one.policy + one.value + one.reference == 16 * whole + 12 * SHAPE.trunk
    assert memory.ways(SHAPE, PLAN).splitlines()[-1] == "| fits 80 GB | yes | yes | no | yes | yes | yes |"
    assert memory.ways(SHAPE, PLAN, 141e9).splitlines()[-1] == "| fits 141 GB | yes | yes | no | yes | yes | yes |"


def test_the_guide_shows_these_tables():
    guide = ROOT / "recipes" / "guides" / "model_7b.md"
    text = guide.read_text(encoding="utf-8")
    assert memory.written(text) == text, "run: python recipes/studies/memory_7b.py recipes/guides/model_7b.md"
    for name, table in memory.tables().items():
        assert len(table.splitlines()) > 4, name
    for number in ("7.62e9", "57,344", "240,512", "161e6"):
        assert number in text


def test_the_guides_settings_are_those_that_are_counted():
    """The YAML's own numbers, so that nobody counts one run and starts another."""
    import yaml
    from reference.documents import configs

    config = yaml.safe_load(configs()["7b.yaml"])
    ppo = config["ppo"]
    assert config["sft"]["lora_rank"] == PLAN.rank
    assert (ppo["max_prompt_tokens"], ppo["max_new_tokens"]) == (PLAN.prompt_tokens, PLAN.new_tokens)
    assert (ppo["generation_batch_size"], ppo["tokens_per_microbatch"]) == (
        PLAN.generation_batch,
        PLAN.microbatch_tokens,
    )
    assert ppo["gradient_checkpointing"]
    assert config["sft"]["microbatch_size"] * config["sft"]["max_length"] == 8192
    assert config["reward_model"]["microbatch_size"] * 2 * config["reward_model"]["max_length"] == 8192
    assert config["evaluation"]["max_prompt_tokens"] == config["evaluation"]["max_new_tokens"] == 256
