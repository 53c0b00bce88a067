"""Model families: what PPO stands on, one step of each stage, saving, and who is refused.

One tiny random model per family, built from its configuration, with every dropout that the configuration knows
switched on and weights far from their start, so that a wrong position or a wrong mask shows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference.batches import left_padded
from reference.families import BY_GENERATE, EXPERTS, FAMILIES, MORE, REFUSED, VARIANTS, new_model
from reference.prepared import prepared_models
from reference.tiny_chain import NORMALIZER, shake
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from reward_models import RewardConfig, RewardModel, RewardTrainer
from rlhf import SFTConfig, SFTTrainer, chat
from rlhf.errors import InputError
from rlhf.models.adapters import backbone, lora_config
from rlhf.models.forward import response_logprobs
from rlhf.models.loading import load_policy
from rlhf.models.scalar import load_scalar_model, new_scalar_model, score_head
from rlhf.padding import make_batch
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.draw import sample
from rlhf.sft.model import set_dropout

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [30, 31], [9, 8, 7, 6]]
TWICE = [*PROMPTS, PROMPTS[2]]
RESPONSES = [[30, 31], [32, 33, 34, 35], [36], [40, 41, 42, 43, 44, 45, 46, 47], [50, 51, 52]]
ROWS = [{"prompt": f"Count to {word}"} for word in ("one", "two", "three", "four", "five", "six")]
NO_EFFECT = ("k_proj.bias",)  # the same number on every attention score: their softmax doesn't see it
ALIKE = {"qwen2", "olmo2", "stablelm", "gpt_bigcode", "opt", "cohere"}  # as another one, in all that our code sees
UNTOLD = ("ernie4_5", "mpt")  # their attention's dropout isn't in the config, or only as a whole number
FEW = ["gpt2", "gpt_neox", "falcon", "gemma2", "granite"]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> dict[str, Path]:
    return {}


def folder_of(name: str, built: dict[str, Path], tmp_path_factory, tokenizer) -> Path:
    """The family's model and tokenizer, saved once."""
    if name not in built:
        chat.prepare_tokenizer(tokenizer)
        folder = tmp_path_factory.mktemp(name)
        new_model(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        built[name] = folder
    return built[name]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.long] if name in {*ALIKE, *MORE, *EXPERTS} else [])
        for name in [*FAMILIES, *VARIANTS, *MORE, *EXPERTS]
    ]
)
def family(request, built, tmp_path_factory, tiny_tokenizer) -> Path:
    return folder_of(request.param, built, tmp_path_factory, tiny_tokenizer)


@pytest.fixture(params=FEW)
def few(request, built, tmp_path_factory, tiny_tokenizer) -> Path:
    return folder_of(request.param, built, tmp_path_factory, tiny_tokenizer)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def check_logprobs(model, logprobs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Independent: each row alone, without padding, through the model's own forward and head."""
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        own = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
        expected = own[range(len(response)), response]
        np.testing.assert_allclose(logprobs[i, : len(response)].detach(), expected, atol=tolerance)
        assert len(response) < 8 or expected.std() > 0.1, "the model should be far from uniform"


def save_reward_model(base: Path, folder: Path, tokenizer, lora: bool) -> Path:
    adapter = lora_config(2, 4.0, task_type="SEQ_CLS") if lora else None
    scalar = new_scalar_model(base, seed=2, lora=adapter)
    shake(scalar, 2, 0.1, only="lora_" if lora else "")
    scalar.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    NORMALIZER.save(folder)
    return folder


# -- what PPO stands on ------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_whatever_the_padding(family):
    actor_critic = prepared_models(family)
    shake(actor_critic.value_head, 3, 0.3)
    batch = make_batch(PROMPTS, RESPONSES, 3, "cpu")
    expected = actor_critic(batch, 1.0)
    check_logprobs(AutoModelForCausalLM.from_pretrained(family).eval(), expected.logprobs)
    wide = make_batch([*PROMPTS, [7] * 20], [*RESPONSES, [8] * 9], 17, "cpu")  # another pad token, and more of it
    for other in (left_padded(batch), wide, left_padded(wide)):
        outputs = actor_critic(other, 1.0)
        for name in ("logprobs", "values"):
            seen, wanted = getattr(outputs, name).detach()[:5, :8], getattr(expected, name).detach()
            np.testing.assert_allclose(seen, wanted, atol=1e-5, err_msg=name)
    assert expected.values.std() > 0.1


def greedy(model, prompt: list[int], stops: list[int]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=3)
    model.generation_config = GenerationConfig()
    return model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()


def test_temperature_0_is_generate(family):
    """Each prompt alone through transformers' own `generate`; ours has left padding, rows that leave, and a prompt with
    two responses."""
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    free = [greedy(model, prompt, [400]) for prompt in PROMPTS]
    stops = sorted({free[0][-8], free[2][-6], free[4][-3]})
    responses = TransformersEngine(model, stops, 3).generate(TWICE, 12, 0.0, generator())
    expected = [greedy(model, prompt, stops) for prompt in TWICE]
    assert responses.ids == expected
    assert responses.stopped == [ids[-1] in stops for ids in expected]
    assert len({len(ids) for ids in expected}) > 1, "rows should leave the batch at different steps"


def test_sampled_tokens_have_the_probabilities_that_are_scored(family, monkeypatch):
    from rlhf.sampling import decode

    seen, plain = [], sample

    def spy(logits, temperature, generator):
        token = plain(logits, temperature, generator)
        seen.append((logits.float() / temperature).log_softmax(-1).gather(-1, token[:, None]).squeeze(-1))
        return token

    monkeypatch.setattr(decode, "sample", spy)
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    engine = TransformersEngine(model, list(range(0, 400, 12)), 3)
    ids = engine.generate(TWICE, 12, 1.5, generator()).ids
    with torch.no_grad():
        scored, _ = response_logprobs(model, make_batch(TWICE, ids, 3, "cpu"), 1.5)
    order = sorted(range(len(TWICE)), key=lambda i: len(TWICE[i]))
    assert len({len(row) for row in ids}) > 1
    for step, logprobs in enumerate(seen):
        rows = [i for i in order if len(ids[i]) > step]
        np.testing.assert_allclose(logprobs, scored[rows, step], atol=1e-5)


def test_lora_finds_every_linear_layer_of_the_trunk(family):
    policy = load_policy(family, lora=lora_config(2, 4.0))
    layers = {
        name
        for name, module in backbone(AutoModelForCausalLM.from_pretrained(family)).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    adapted = {name for name, module in backbone(policy).named_modules() if hasattr(module, "lora_A")}
    assert len(layers) >= 4
    assert adapted >= layers  # more where experts are one parameter (Mixtral, Qwen3-MoE), which peft adapts, too


# -- one step of each stage --------------------------------------------------------------------------------


def low_share(prompts, completions, completion_ids, **columns):
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def ppo(model: Path, folder: Path, score: Any, lora: bool) -> PPOTrainer:
    args = PPOConfig(
        output_dir=str(folder / "ppo"), updates=1, rollout_size=6, minibatch_size=2, inner_epochs=1, max_new_tokens=6,
        learning_rate=1e-3, tokens_per_microbatch=150, bf16=False, lora_rank=2 if lora else 0,
    )  # fmt: skip
    return PPOTrainer(model, score, args, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["reward model", pytest.param("zero head", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "lora", [pytest.param(False, id="full"), pytest.param(True, id="lora", marks=pytest.mark.long)]
)
def test_a_ppo_step(family, tmp_path, tiny_tokenizer, lora, start):
    """From exact zero KL and ratio 1 (dropout is in every config), every trained weight moves, and what is saved
    is what was trained."""
    if lora and "llama4" in family.name:
        pytest.skip("peft cannot adapt its router, a linear layer that returns two tensors")
    score: Any = low_share
    if start == "reward model":
        chat.prepare_tokenizer(tiny_tokenizer)
        score = RewardModel.load(save_reward_model(family, tmp_path / "reward_model", tiny_tokenizer, lora))
    trainer = ppo(family, tmp_path, score, lora)
    module = trainer.accelerator.unwrap_model(trainer.module)
    assert bool((module.value_head.weight != 0).any()) == (start == "reward model")
    assert (module.value is None) == lora  # under LoRA an adapter on the policy's backbone
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    rollout = trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts())))
    assert (rollout.kl == 0).all()
    metrics = trainer.update(rollout)
    assert metrics["step0_ratio_error"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all()
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad or name.endswith(NO_EFFECT), name
    trainer.save_model(tmp_path / "saved")
    with torch.no_grad():
        logprobs = module(make_batch(PROMPTS, RESPONSES, 3, "cpu"), 1.0, ("policy",)).logprobs
    check_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval(), logprobs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in EXPERTS)) for name in [*FAMILIES, *MORE, *EXPERTS]]
)
def test_dropout_is_that_of_a_model_whose_config_says_so(name):
    """Independent: the family built with that probability in its config draws the same at the same seed."""
    configured, other = new_model(name, 0.4).train(), new_model(name, 0.0).train()
    for module in [*configured.modules(), *other.modules()]:
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
    ids, found = torch.tensor(PROMPTS[2:3]), []
    with torch.no_grad():
        plain = other(ids).logits
        try:
            set_dropout(other, 0.4)
        except InputError:
            assert torch.equal(configured(ids).logits, plain), "the family has a dropout"
            return
        for model in (configured, other):
            torch.manual_seed(0)
            found.append(model(ids).logits)
    assert torch.equal(*found) or name in UNTOLD
    assert not torch.equal(found[1], plain)
    assert not any("drop" in field and value == 0.4 for field, value in vars(other.config).items()), "it is saved"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [pytest.param(0, id="full"), pytest.param(2, id="lora", marks=pytest.mark.long)])
def test_an_sft_step(few, tmp_path, lora):
    rows = [{"prompt": row["prompt"], "completion": "one two three"} for row in ROWS]
    config = SFTConfig(
        output_dir=str(tmp_path), epochs=1, batch_size=6, microbatch_size=3, learning_rate=1e-3, bf16=False,
        lora_rank=lora,
    )  # fmt: skip
    trainer = SFTTrainer(few, config, train_dataset=rows)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])]
    assert all("lora_B" in name or "token" in name or not lora for name in moved)
    assert moved
    trainer.save_model()
    actor_critic = prepared_models(tmp_path)
    logprobs = actor_critic(make_batch(PROMPTS, RESPONSES, 3, "cpu"), 1.0, ("policy",)).logprobs
    check_logprobs(trainer.model.eval(), logprobs)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [pytest.param(0, id="full", marks=pytest.mark.long), pytest.param(2, id="lora")])
def test_a_reward_model_step(few, tmp_path, lora):
    rows = [{"prompt": row["prompt"], "chosen": "one two three", "rejected": "The fox."} for row in ROWS]
    config = RewardConfig(
        output_dir=str(tmp_path), prompts_per_batch=6, microbatch_size=3, learning_rate=1e-2, bf16=False,
        warmup_fraction=0, lora_rank=lora,
    )  # fmt: skip
    trainer = RewardTrainer(few, config, train_dataset=rows)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])]
    assert any("score" in name for name in moved)
    assert any("score" not in name for name in moved)
    trainer.save_model()
    conversations = [
        [{"role": "user", "content": "Count to ten"}, {"role": "assistant", "content": text}]
        for text in ("one", "one, two, three, four", "The lazy dog")
    ]
    judge = RewardModel.load(tmp_path)
    scores = judge.raw_scores(conversations)
    alone = []  # independent: each conversation alone, head over backbone by hand
    scalar = trainer.model.eval()
    for messages in conversations:
        ids = torch.tensor([chat.encode_conversation(judge.tokenizer, messages)[0]])
        with torch.no_grad():
            alone.append(score_head(scalar)(backbone(scalar)(ids).last_hidden_state[0, -1]).item())
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert np.std(alone) > 0.01


# -- scalar heads ------------------------------------------------------------------------------------------


def test_a_reward_model_of_the_family_keeps_its_trunk_and_its_head(family, tmp_path, tiny_tokenizer):
    scalar = new_scalar_model(family, seed=1)
    policy = load_policy(family)
    trunk = backbone(policy).state_dict()
    assert trunk.keys() == backbone(scalar).state_dict().keys()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in backbone(scalar).state_dict().items())
    copied = new_scalar_model(policy, seed=1)  # from an object, not from a folder
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in backbone(copied).state_dict().items())
    chat.prepare_tokenizer(tiny_tokenizer)
    scalar.save_pretrained(tmp_path)
    loaded, _ = load_scalar_model(tmp_path)
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in scalar.state_dict().items())
    assert type(loaded).__name__.endswith("ForSequenceClassification")


# -- whose state only `generate` can use -------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_GENERATE)
def test_a_family_without_a_cache_of_keys_is_sampled_by_generate(name, caplog):
    model = new_model(name)
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=9.0)  # as a hub model might ship
    engine = TransformersEngine(model, [], 3, rows_per_batch=2)
    prompts = [*PROMPTS, [40, 41]]  # two alike, and two batches of that length
    expected = []
    for prompt in prompts:  # independent: the whole row again for every token, without any state
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert engine.generate(prompts, 5, 0.0, generator()).ids == expected
    assert "so transformers' generate samples" in caplog.text
    engine.stop_ids = (expected[0][2], expected[3][1])
    stopped = engine.generate(prompts, 5, 0.0, generator())
    cut = [next((i + 1 for i, t in enumerate(row) if t in engine.stop_ids), 5) for row in expected]
    assert stopped.ids == [row[:n] for row, n in zip(expected, cut, strict=True)]
    assert stopped.stopped == [row[n - 1] in engine.stop_ids for row, n in zip(expected, cut, strict=True)]
    assert model.generation_config.top_k == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float32 weights: the limit is that of the logits' precision
        assert len(TransformersEngine(model, [], 3).generate(prompts, 2, 0.0, generator()).ids) == len(prompts)


def test_generate_draws_from_the_full_softmax_at_the_temperature():
    """Counts of 4,000 first tokens against 0.5-temperature probabilities; and the same seed draws the same."""
    model, rows = new_model("mamba"), 4000
    model.generation_config = GenerationConfig(top_k=1)
    engine = TransformersEngine(model, [], 3, rows_per_batch=rows)
    state = torch.get_rng_state()
    ids = engine.generate([[5, 6]] * rows, 1, 0.5, generator()).ids
    assert ids == engine.generate([[5, 6]] * rows, 1, 0.5, generator()).ids
    assert ids != engine.generate([[5, 6]] * rows, 1, 0.5, generator(1)).ids
    assert torch.equal(state, torch.get_rng_state()), "the global generator should be put back"
    with torch.no_grad():
        probabilities = (model(torch.tensor([[5, 6]])).logits[0, -1].double() / 0.5).softmax(-1).numpy()
    counts = np.bincount([row[0] for row in ids], minlength=400)
    common = probabilities * rows >= 5
    expected = np.append(probabilities[common], probabilities[~common].sum()) * rows
    seen = np.append(counts[common], counts[~common].sum())
    assert common.sum() > 50
    assert ((seen - expected) ** 2 / expected).sum() < len(expected) + 4 * (2 * len(expected)) ** 0.5


@pytest.mark.parametrize("name", BY_GENERATE)
def test_ppo_with_generate(name, built, tmp_path_factory, tmp_path, tiny_tokenizer):
    """One update, preflight's checks included: among them that KL is 0 and the ratio 1 before it. What PPO scores is
    what the model says."""
    trainer = ppo(folder_of(name, built, tmp_path_factory, tiny_tokenizer), tmp_path, low_share, lora=False)
    metrics = trainer.train()
    assert abs(metrics["kl_nats"]) < 1e-4
    assert metrics["policy_grad_norm"] > 0.0
    module = trainer.accelerator.unwrap_model(trainer.module)
    trainer.save_model(tmp_path / "saved")
    with torch.no_grad():
        logprobs = module(make_batch(PROMPTS, RESPONSES, 3, "cpu"), 1.0, ("policy",)).logprobs
    check_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval(), logprobs)


# -- who is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_sampled_from_are_refused(name):
    model = new_model(name)
    engine = TransformersEngine(model, [0], 3)
    with pytest.raises(InputError, match=rf"{type(model).__name__}: .*{REFUSED[name][1]}.*PPO needs a causal decoder"):
        engine.generate(PROMPTS, 4, 1.0, generator())


def test_lora_on_mamba_says_what_to_do():
    with pytest.raises(InputError, match=r"LoRA: .*incompatible with Mamba.*name the layers to adapt in lora_target"):
        load_policy(new_model("mamba"), lora=lora_config(2, 4.0))


def test_an_adapter_is_checked_like_its_base(built, tmp_path_factory, tiny_tokenizer):
    policy = load_policy(folder_of("llama", built, tmp_path_factory, tiny_tokenizer), lora=lora_config(2, 4.0))
    assert isinstance(policy, PeftModel)
    assert TransformersEngine(policy, [0], 3).generate(PROMPTS, 2, 1.0, generator()).ids
