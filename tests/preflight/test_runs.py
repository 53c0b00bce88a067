"""Preflight on whole trainers: healthy ones pass unchanged, each planted fault is refused by the check named for it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import forked, recipe
from reference.tiny_chain import chain, save_base, shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from reward_models import RewardModel
from reward_models.preflight import reward_model_findings
from reward_models.trainer import RewardConfig, RewardTrainer
from rlhf import chat
from rlhf.chat import rendering
from rlhf.config import fingerprint, load
from rlhf.errors import InputError
from rlhf.models.loading import load_policy
from rlhf.models.scalar import ScoreNormalizer
from rlhf.ppo import preflight_checks as preflight_models
from rlhf.ppo.preflight import check_ppo, ppo_findings
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.preflight import run as preflight
from rlhf.rows.records import write_jsonl
from rlhf.sampling import decode
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import Responses, model_stop_ids
from rlhf.sft.preflight import sft_findings
from rlhf.sft.trainer import SFTConfig, SFTTrainer

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [{"prompt": f"Count to {word}" + ", please" * (i % 3)} for i, word in enumerate(WORDS)]
DEMONSTRATIONS = [
    {"prompt": f"Count to {w}" + ", please" * (i % 4), "completion": f"one {w}"} for i, w in enumerate(WORDS)
]
PAIRS = [
    {"prompt": f"Count to {w}", "chosen": f"one {w}" + " Paris" * (i % 4), "rejected": "dog"}
    for i, w in enumerate(WORDS)
]


def low_share(prompts, completions, completion_ids, **columns):
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def ppo(folder, model, functions=low_share, tokenizer=None, engine=None, **changes) -> PPOTrainer:
    config = {
        "updates": 2,
        "rollout_size": 4,
        "minibatch_size": 4,
        "inner_epochs": 1,
        "max_new_tokens": 8,
        "bf16": False,
    }
    return PPOTrainer(
        model, functions, PPOConfig(**config | {"output_dir": str(folder / "run")} | changes), ROWS,
        processing_class=tokenizer, engine=engine,
    )  # fmt: skip


def seen(phases) -> dict[str, preflight.Finding]:
    return {finding.check: finding for phase in phases for finding in phase}


def failed(phases) -> dict[str, str]:
    """Return the failures that refuse a run: those of the first phase that has any."""
    for phase in phases:
        if wrong := {finding.check: str(finding) for finding in phase if not finding.ok}:
            return wrong
    return {}


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


@pytest.fixture
def lora(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    return save_base(tmp_path, tiny_model, tiny_tokenizer)


# -- healthy -----------------------------------------------------------------------------------------------

PPO_CHECKS = {
    "vocabulary", "template", "injection", "stop token", "frozen reference", "optimizer", "logits", "step-0 ratio",
    "step-0 KL", "sampled log-probs", "padding", "gradients", "precision", "reward functions", "score spread", "reload",
}  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_healthy_ppo_passes(tmp_path, kind, bf16, request):
    policy, scorer = request.getfixturevalue(kind)
    found = seen(ppo_findings(ppo(tmp_path, policy, RewardModel.load(scorer), bf16=bf16)))
    assert found.keys() == PPO_CHECKS
    assert [str(f) for f in found.values() if not f.ok] == []
    for exact in ("step-0 ratio", "step-0 KL") if not bf16 else ():
        assert "by 0 nats" in found[exact].measured
    assert re.search("drawn with log-probabilities .* nats", found["sampled log-probs"].measured)
    assert ("float32" in found["precision"].measured) == (not bf16)
    assert found["precision"].note == bf16
    assert "differ by 0 after" in found["reload"].measured


def test_a_run_is_the_same_with_preflight_and_without(tmp_path, full):
    """Weights are equal to the last bit, though the reward draws from the global generators."""

    def chance(prompts, completions, **columns):
        return [random.random() + np.random.rand() + float(torch.rand(())) for _ in prompts]

    results = []
    for on in (True, False):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        trainer = ppo(tmp_path, full[0], [chance, RewardModel.load(full[1])], preflight=on)
        modes = {name: module.training for name, module in trainer.module.named_modules()}
        before = trainer.accelerator.unwrap_model(trainer.module).trained_state()
        before = {name: tensor.clone() for name, tensor in before.items()}
        assert bool(check_ppo(trainer)) == on
        assert modes == {name: module.training for name, module in trainer.module.named_modules()}
        assert all(p.grad is None for p in trainer.module.parameters())
        state = trainer.accelerator.unwrap_model(trainer.module).trained_state()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        trainer.train()
        results.append({name: tensor.clone() for name, tensor in state.items()})
        results[-1] |= {"drawn next": torch.rand(2), "numpy's": torch.tensor(np.random.rand())}
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], before[name]) for name in before)


def test_it_is_quiet_and_can_be_left_out(tmp_path, full, caplog):
    broken = [ppo(tmp_path, full[0], preflight=False), ppo(tmp_path, full[0]), ppo(tmp_path, full[0])]
    for trainer in broken:
        shake(trainer.module.reference, 3)
    assert check_ppo(broken[0]) == []
    broken[1].update_index = 1  # goes on: the KL is no longer 0
    assert check_ppo(broken[1]) == []
    with pytest.raises(
        InputError, match=r"^preflight: step-0 KL: policy and reference differ by .* leave ref_model out"
    ):
        broken[2].train()
    with caplog.at_level("INFO", logger="rlhf"):
        caplog.clear()
        assert len(check_ppo(ppo(tmp_path, full[0]))) == 14
        assert caplog.text == ""  # float32: nothing to tell
        check_ppo(ppo(tmp_path, full[0], bf16=True))
        assert len(caplog.records) == 1
        assert "14 checks passed" in caplog.text
        assert "bfloat16 moves log-probabilities by" in caplog.text


def test_all_processes_stop_when_one_has_to(tmp_path, full, monkeypatch):
    trainer = ppo(tmp_path, full[0])
    monkeypatch.setattr(preflight, "gather_object", lambda mine: [*mine, "template: seen by another process"])
    with pytest.raises(InputError, match=r"^preflight: template: seen by another process$"):
        check_ppo(trainer)


ON_ONE_PROCESS = """
import os, sys
from rlhf import InputError
from rlhf.ppo import PPOConfig, PPOTrainer

def second_fails(prompts, completions, **columns):
    return [float("nan") if os.environ["RANK"] == "1" else 1.0 for _ in prompts]

config = PPOConfig(output_dir=sys.argv[2], rollout_size=4, minibatch_size=4, max_new_tokens=4, bf16=False)
try:
    PPOTrainer(sys.argv[1], second_fails, config, [{"prompt": f"Count to {i}"} for i in range(6)]).train()
except InputError as error:
    open(f"{sys.argv[2]}-{os.environ['RANK']}", "w").write(str(error))
"""


@pytest.mark.slow
def test_none_of_two_processes_waits_for_ever(tmp_path, full):
    script = tmp_path / "one_fails.py"
    script.write_text(ON_ONE_PROCESS)
    done = forked.shared().together([script, full[0], tmp_path / "told"], limit=120)
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith("preflight: reward functions: second_fails returned nan for response 0")


def test_every_failure_is_told_in_one_line(tmp_path, full):
    trainer = ppo(tmp_path, full[0])
    trainer.processing_class.add_tokens(["<new>"])
    trainer.module.reference.requires_grad_(True)
    with pytest.raises(InputError) as error:
        check_ppo(trainer)
    line = str(error.value)
    assert line.startswith("preflight: vocabulary: largest token id 400 outside the model's 400 embeddings; ")
    assert " | frozen reference: 21 of its tensors are trained" in line
    assert "\n" not in line


@pytest.mark.parametrize("config", [PPOConfig, SFTConfig, RewardConfig])
def test_the_setting(tmp_path, config):
    (tmp_path / "off.yaml").write_text("preflight: off\n")
    assert load(config, []).preflight is True
    assert load(config, ["--preflight", "off"]).preflight is False
    assert load(config, ["--config", str(tmp_path / "off.yaml")]).preflight is False
    assert fingerprint(config()) == fingerprint(config(preflight=False))


# -- PPO: one fault each -----------------------------------------------------------------------------------


class Colder(TransformersEngine):
    def _decode(self, prompts, max_new_tokens, temperature, numbers):
        return super()._decode(prompts, max_new_tokens, temperature * 0.7, numbers)


class LiesAboutStops(TransformersEngine):
    def generate(self, *args):
        responses = super().generate(*args)
        return Responses(responses.ids, [not stopped for stopped in responses.stopped])


def dropout(trainer):
    for module in trainer.module.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5


def moved_reference(trainer):
    shake(trainer.module.reference, 3, 1e-6)


def shared_reference(trainer):
    trainer.module.reference.model.norm.weight = trainer.module.policy.model.norm.weight


def trained_reference(trainer):
    trainer.module.reference.lm_head.requires_grad_(True)


def not_in_the_optimizer(trainer):
    del trainer.optimizer.param_groups[0]["params"][3]


def foreign_stops(trainer):
    trainer.engine.stop_ids = (5,)


def stops_outside(trainer):
    trainer.stop_ids = trainer.engine.stop_ids = (2, 500)


def masked_stop(trainer):
    trainer.module.policy.lm_head.register_forward_hook(
        lambda m, args, logits: logits.index_fill(-1, torch.tensor([2]), -1e9)
    )


def colder(trainer):
    trainer.engine = Colder(trainer.module.policy, trainer.stop_ids, trainer.pad_id)


def lying(trainer):
    trainer.engine = LiesAboutStops(trainer.module.policy, trainer.stop_ids, trainer.pad_id)


def broken_cache(trainer):
    def shift(module, args, kwargs):
        past = kwargs.get("past_key_values")
        late = past is not None and past.get_seq_length() > 0
        return args, kwargs | ({"position_ids": kwargs["position_ids"] + 40} if late else {})

    trainer.module.policy.model.register_forward_pre_hook(shift, with_kwargs=True)


def looks_at_neighbours(model):
    def mix(module, args, outputs):
        outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.mean((0, 1))
        return outputs

    model.register_forward_hook(mix)


def neighbours_in_value(trainer):
    looks_at_neighbours(trainer.module.value.model)
    nn.init.normal_(trainer.module.value_head.weight)


def unused_weight(trainer):
    trainer.module.policy.spare = nn.Parameter(torch.zeros(3))
    trainer.optimizer.param_groups[0]["params"].append(trainer.module.policy.spare)


def detached_value(trainer):
    def detach(module, args, outputs):
        outputs.last_hidden_state = outputs.last_hidden_state.detach()
        return outputs

    trainer.module.value.model.register_forward_hook(detach)


def other_logits(trainer):
    trainer.module.policy.lm_head.register_forward_hook(lambda m, args, logits: logits * 1.3)


FAULTS = {
    dropout: ("step-0 ratio", "something is random (dropout"),
    moved_reference: ("step-0 KL", "not a copy of the policy"),
    shared_reference: ("frozen reference", "1 lie in the policy's memory"),
    trained_reference: ("frozen reference", "first reference.lm_head.weight"),
    not_in_the_optimizer: ("optimizer", "is not in the optimizer"),
    foreign_stops: ("stop token", "the engine's [5], end of turn 2"),
    stops_outside: ("stop token", "[500] outside the 400 logits"),
    masked_stop: ("stop token", "masks the token that ends a turn"),
    colder: ("sampled log-probs", "another temperature"),
    lying: ("sampled log-probs", "the engine stops at other tokens"),
    broken_cache: ("sampling a few responses", "left padding"),
    neighbours_in_value: ("padding", "rows of a batch are not independent"),
    unused_weight: ("gradients", "policy.spare gets none"),
    detached_value: ("gradients", "value.model.embed_tokens.weight gets none"),
    other_logits: ("logits", "changes logits after the head"),
}


CONSEQUENCES = {
    dropout: ["step-0 KL", "padding", "sampled log-probs", "logits"],
    trained_reference: ["optimizer"],  # which doesn't move it
    other_logits: ["sampled log-probs"],
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_in_ppo_is_refused_by_its_name(tmp_path, full, plant):
    trainer = ppo(tmp_path, full[0])
    plant(trainer)
    check, words = FAULTS[plant]
    found = failed(ppo_findings(trainer))
    assert words in found[check], found
    assert found.keys() <= {check, *CONSEQUENCES.get(plant, [])}


def test_an_engine_with_the_stops_that_the_refusal_names_passes(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.generation_config.eos_token_id = [2, 7]  # of which the tokenizer knows one
    trainer = ppo(tmp_path, str(save_base(tmp_path, tiny_model, tiny_tokenizer)))
    policy, tokenizer = trainer.module.policy, trainer.processing_class
    trainer.engine.stop_ids = chat.stop_ids(tokenizer)
    assert "from rlhf.sampling.engine.model_stop_ids(model, tokenizer)" in failed(ppo_findings(trainer))["stop token"]
    trainer.engine.stop_ids = model_stop_ids(policy, tokenizer)
    assert failed(ppo_findings(trainer)) == {}


def test_a_filter_in_sampling_is_refused(tmp_path, full, monkeypatch):
    def top_two(logits, temperature, numbers):
        least = logits.topk(2).values[:, -1:]
        return torch.multinomial(logits.masked_fill(logits < least, -torch.inf).softmax(-1), 1)[:, 0]

    monkeypatch.setattr(decode, "sample", top_two)
    assert "filters (top-k" in failed(ppo_findings(ppo(tmp_path, full[0])))["sampled log-probs"]


class NoPositions(GPT2LMHeadModel):
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("family", [GPT2LMHeadModel, NoPositions])
def test_a_model_that_ignores_position_ids_is_sampled_without_padding(tmp_path, tiny_tokenizer, family, caplog):
    chat.prepare_tokenizer(tiny_tokenizer)
    torch.manual_seed(0)
    model = family(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=256, eos_token_id=2))
    shake(model, 0, 0.2)
    found = failed(ppo_findings(ppo(tmp_path, model, tokenizer=tiny_tokenizer)))
    assert found == {}
    assert ("so transformers' generate samples" in caplog.text) == (family is NoPositions)


def test_faults_of_adapters(tmp_path, lora):
    trainer = ppo(tmp_path, lora[0], RewardModel.load(lora[1]))
    own = dict(trainer.module.named_parameters())
    name = next(name for name in own if "lora_A.default" in name)
    own[name].requires_grad_(False)
    found = failed(ppo_findings(trainer))
    assert f"adapter {name} is frozen" in found["optimizer"]
    own[name].requires_grad_(True)
    norm = next(name for name in own if name.endswith("norm.weight"))
    own[norm].requires_grad_(True)  # of the base, which the reference shares
    assert f"first {norm}" in failed(ppo_findings(trainer))["frozen reference"]
    own[norm].requires_grad_(False)
    policy = [p for name, p in own.items() if ".default." in name]
    for parameter in policy:
        parameter.requires_grad_(False)
    assert "policy: nothing is trainable" in failed(ppo_findings(trainer))["optimizer"]


def test_a_given_reference_may_differ(tmp_path, full, tiny_model, tiny_tokenizer):
    shake(tiny_model, 9)
    trainer = PPOTrainer(
        full[0], low_share, PPOConfig(output_dir=str(tmp_path / "run"), bf16=False), ROWS, ref_model=tiny_model
    )
    found = seen(ppo_findings(trainer))
    assert all(finding.ok for finding in found.values())
    assert "given reference differ by" in found["step-0 KL"].measured


def test_an_engine_that_draws_elsewhere(tmp_path, full):
    class Elsewhere:
        def generate(self, prompt_ids, max_new_tokens, temperature, generator):
            return Responses([[7, 8, 2] for _ in prompt_ids], [True] * len(prompt_ids))

    found = seen(ppo_findings(ppo(tmp_path, full[0], engine=Elsewhere())))
    assert found["sampled log-probs"].measured == "not measured: Elsewhere draws tokens elsewhere"
    assert all(finding.ok for finding in found.values())


@pytest.mark.parametrize("rows_per_batch", [1, 2])
def test_small_generation_batches(tmp_path, full, rows_per_batch):
    found = seen(ppo_findings(ppo(tmp_path, full[0], generation_batch_size=rows_per_batch, temperature=0.6)))
    assert "were drawn" in found["sampled log-probs"].measured
    assert all(finding.ok for finding in found.values())


# -- texts -------------------------------------------------------------------------------------------------


def test_a_template_whose_last_turn_is_another(tmp_path, full, monkeypatch):
    trainer, plain = ppo(tmp_path, full[0]), chat.encode_conversation
    monkeypatch.setattr(chat, "encode_conversation", lambda *args: ([*plain(*args)[0], 5], []))
    assert "renders a turn differently" in failed(ppo_findings(trainer))["template"]


def test_a_decoder_that_loses_text(tmp_path, full, monkeypatch):
    trainer, plain = ppo(tmp_path, full[0]), chat.decode_response
    monkeypatch.setattr(chat, "decode_response", lambda *args: plain(*args)[2:])
    found = failed(ppo_findings(trainer))["template"]
    assert "0 of 8 responses come back from their tokens: 'Count to seven, please' comes back as 'unt to" in found


def test_a_template_that_can_be_injected(tmp_path, full, monkeypatch):
    trainer = ppo(tmp_path, full[0])
    monkeypatch.setattr(rendering, "inert", lambda value, *_: value)
    found = failed(ppo_findings(trainer))
    assert found.keys() == {"injection"}
    assert "the text '<|endoftext|>' inside a message becomes control token 0" in found["injection"]


# -- scores ------------------------------------------------------------------------------------------------


def not_finite(prompts, completions, **columns):
    return [float("nan")] * len(prompts)


def breaks(prompts, completions, **columns):
    raise ZeroDivisionError("no words")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (not_finite, "not_finite returned nan"),
        (breaks, r"ZeroDivisionError: no words \(test_runs.py:\d+\)"),
    ],
)
def test_reward_functions_that_fail(tmp_path, full, function, words):
    found = failed(ppo_findings(ppo(tmp_path, full[0], function)))
    assert found.keys() == {"reward functions"}
    assert re.search(words, found["reward functions"])


def test_a_reward_model_that_tells_nothing_apart(tmp_path, full):
    constant, other = RewardModel.load(full[1]), RewardModel.load(full[1])
    torch.nn.init.zeros_(constant.model.score.weight)
    other.normalizer = ScoreNormalizer(0.0, 1e-6, 10)
    for scorer in (constant, other):
        found = failed(ppo_findings(ppo(tmp_path, full[0], scorer)))
        assert "one score to everything, or its normaliser" in found["score spread"]
        assert ("reload" in found) == (scorer is constant)  # whose weights were changed in memory


def test_a_reward_model_may_read_and_normalise_otherwise_than_its_folder(tmp_path, full):
    """In memory it may have no folder at all: its model's name is that of what it was trained from."""
    scorer = RewardModel.load(full[1])
    scorer.reads_rendered, scorer.normalizer = True, ScoreNormalizer(3.0, 2.0, 10)
    unsaved = RewardModel(scorer.model, scorer.tokenizer)
    unsaved.model.name_or_path = str(full[0])
    found = seen(ppo_findings(ppo(tmp_path, full[0], [scorer, unsaved])))
    assert [str(finding) for finding in found.values() if not finding.ok] == []
    weights = load_file(full[1] / "model.safetensors")
    save_file(weights | {"score.weight": weights["score.weight"] + 0.1}, full[1] / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert "its folder lacks the trained head" in failed(ppo_findings(ppo(tmp_path, full[0], scorer)))["reload"]


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_an_adapter_over_weights_that_only_memory_has(tmp_path, base, tiny_model, tiny_tokenizer, stage):
    """Its folder would name a base with other weights. One that was only rounded passes."""

    def findings(model):
        if stage == "ppo":
            return ppo_findings(ppo(tmp_path, model, tokenizer=tiny_tokenizer, lora_rank=2))
        args = SFTConfig(output_dir=str(tmp_path / "run"), bf16=False, lora_rank=2)
        return sft_findings(SFTTrainer(model, args, DEMONSTRATIONS, processing_class=tiny_tokenizer))

    for dtype in (torch.float32, torch.bfloat16):
        found = seen(findings(load_policy(base, dtype=dtype)))
        assert [str(finding) for finding in found.values() if not finding.ok] == []
        assert re.fullmatch(rf"0 of 21 weights differ from those of {base}", found["base"].measured)
    trained = load_policy(base)
    with torch.no_grad():
        trained.get_parameter("model.layers.1.mlp.up_proj.weight")[0, :8] += 1e-3
    words = (
        rf"1 of 21 weights differ from those of {base}, first model\.layers\.1\.mlp\.up_proj\.weight; .* and pass its"
    )
    assert re.search(words, failed(findings(trained))["base"])
    assert "read from no folder; " in failed(findings(tiny_model))["base"]


def test_a_reward_model_whose_folder_lost_its_head(tmp_path, full):
    weights = load_file(full[1] / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, full[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its files lack 1 tensors .*, first score\.weight"):
        RewardModel.load(full[1])


def test_precision_that_is_no_rounding():
    assert preflight_models.drift((1.5, 0.03)).ok
    assert not preflight_models.drift((5.0, 0.03)).ok
    assert not preflight_models.drift((float("nan"), float("nan"))).ok
    assert preflight_models.limits(True).refuse((2e-3, 1e-4))
    assert preflight_models.limits(True).refuse((float("nan"), 0.0))


# -- supervised fine-tuning --------------------------------------------------------------------------------


def sft(folder, model, rows=DEMONSTRATIONS, **changes) -> SFTTrainer:
    return SFTTrainer(
        str(model), SFTConfig(**{"output_dir": str(folder / "run"), "batch_size": 4, "microbatch_size": 2, "epochs": 1,
                                 "save_steps": 0, "bf16": False} | changes), rows,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"dropout": 0.4}, {"bf16": True, "lora_rank": 4}])
def test_healthy_sft_passes(tmp_path, base, changes):
    rows = [*DEMONSTRATIONS, {"messages": [{"role": role, "content": f"{role} {i}"} for i in range(3)
                                           for role in ("user", "assistant")]}]  # fmt: skip
    found = seen(sft_findings(sft(tmp_path, base, rows[::-1], max_length=90, **changes)))
    assert found.keys() == {
        "vocabulary", "template", "injection", "trained tokens", "stop token", "padding", "gradients", "precision"
    }  # fmt: skip
    assert [str(f) for f in found.values() if not f.ok] == []
    assert found["trained tokens"].measured.startswith("8 rows")


def test_sft_is_the_same_with_preflight_and_without(tmp_path, base):
    weights = []
    for on in (True, False):
        trainer = sft(tmp_path, base, dropout=0.3, preflight=on)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def all_trained(trainer):
    trainer.train_dataset = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in trainer.train_dataset
    ]


def no_end(trainer):
    trainer.train_dataset = [
        row | {"labels": [-100 if i == 2 else i for i in row["labels"]]} for row in trainer.train_dataset
    ]


def other_rows(trainer):
    trainer.train_dataset = trainer.train_dataset.select(range(3, 9))


def no_stop(trainer):
    trainer.model.generation_config.eos_token_id = 0


def neighbours(trainer):
    looks_at_neighbours(trainer.model.model)


def spare(trainer):
    trainer.model.spare = nn.Parameter(torch.zeros(3))


def nothing_trainable(trainer):
    trainer.model.requires_grad_(False)


SFT_FAULTS = {
    all_trained: ("trained tokens", "the loss mask covers other tokens"),
    no_end: ("trained tokens", "without its end of turn"),
    other_rows: ("trained tokens", "row 1 trains 'one three', its answers are 'one zero'"),
    no_stop: ("stop token", "end of turn 2 is not among generation_config's stops [0]"),
    neighbours: ("padding", "rows of a batch are not independent"),
    spare: ("gradients", "spare gets none"),
    nothing_trainable: ("gradients", "nothing is trainable"),
}


@pytest.mark.parametrize("plant", SFT_FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_in_sft_is_refused_by_its_name(tmp_path, base, plant):
    trainer = sft(tmp_path, base)
    plant(trainer)
    found = failed(sft_findings(trainer))
    assert found.keys() == {SFT_FAULTS[plant][0]}
    assert SFT_FAULTS[plant][1] in found[SFT_FAULTS[plant][0]]
    with pytest.raises(InputError, match=r"^preflight: "):
        trainer.train()


# -- reward models -----------------------------------------------------------------------------------------


def rewards(folder, model, **changes) -> RewardTrainer:
    config = {"prompts_per_batch": 4, "microbatch_size": 2, "save_steps": 0, "normalizer_samples": 16, "bf16": False}
    return RewardTrainer(
        str(model), args=RewardConfig(**config | {"output_dir": str(folder / "run")} | changes), train_dataset=PAIRS
    )


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"lora_rank": 4, "lora_dropout": 0.5}, {"bf16": True}])
def test_healthy_reward_model_passes(tmp_path, base, changes):
    found = seen(reward_model_findings(rewards(tmp_path, base, **changes)))
    assert found.keys() == {"vocabulary", "injection", "pairs", "scores", "padding", "gradients", "reload"}
    assert [str(f) for f in found.values() if not f.ok] == []
    assert "differ by 0 after" in found["reload"].measured


def frozen_head(trainer):
    trainer.model.score.requires_grad_(False)


def lost_head(trainer):
    plain = trainer.model.save_pretrained

    def save(folder, **kwargs):
        state = trainer.model.state_dict()
        del state["score.weight"]
        plain(folder, state_dict=state)

    trainer.model.save_pretrained = save


def same_pairs(trainer):
    trainer.train_dataset = [row | {"rejected_ids": row["chosen_ids"]} for row in trainer.train_dataset]


def last_column(trainer):
    def scores(model, inputs):
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return model.score(hidden[:, -1]).squeeze(-1)

    trainer.scores = scores


def nan_head(trainer):
    nn.init.constant_(trainer.model.score.weight, torch.nan)


def rows_mixed(trainer):
    looks_at_neighbours(trainer.model.model)


REWARD_FAULTS = {
    frozen_head: ({"gradients"}, "the scalar head is frozen"),
    lost_head: ({"reload"}, "first score.weight"),
    same_pairs: ({"pairs"}, "11 of the first 11 rankings have the same tokens"),
    last_column: ({"padding", "scores"}, "training reads them at another position"),
    nan_head: ({"scores", "padding", "gradients", "reload"}, "scores are not finite"),
    rows_mixed: ({"padding", "reload"}, "rows of a batch are not independent"),
    spare: ({"gradients"}, "spare gets none"),
}


@pytest.mark.parametrize("plant", REWARD_FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_in_a_reward_model_is_refused_by_its_name(tmp_path, base, plant):
    trainer = rewards(tmp_path, base)
    plant(trainer)
    found = failed(reward_model_findings(trainer))
    names, words = REWARD_FAULTS[plant]
    assert found.keys() == names
    assert any(words in line for line in found.values()), found
    with pytest.raises(InputError, match=r"^preflight: "):
        trainer.train()


def test_large_models_are_not_written(tmp_path, base, monkeypatch):
    from reward_models import preflight as preflight_rewards

    monkeypatch.setattr(preflight_rewards, "SAVED", 10)
    found = seen(reward_model_findings(rewards(tmp_path, base)))
    assert found["reload"].ok
    assert "too many to write" in found["reload"].measured


# -- the recipe --------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path, full, tiny_tokenizer) -> Path:
    """Make a run's folders up to the reward model, without manifests, like models from elsewhere."""
    for folder, name in ((full[0], "sft"), (full[1], "reward_model")):
        if folder.name != name:
            (tmp_path / name).symlink_to(folder)
    for name in ("data", "rankings"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "data/demonstrations.jsonl", DEMONSTRATIONS)
    write_jsonl(tmp_path / "rankings/train.jsonl", PAIRS)
    write_jsonl(tmp_path / "rankings/prompts.jsonl", ROWS)
    return tmp_path


def test_the_recipe(run_folder):
    before = sorted(run_folder.rglob("*"))
    result = recipe.run("preflight", "--output_dir", run_folder)
    assert result.code == 0, result.out + result.err
    assert result.out.count("ok") >= 31
    assert "FAILED" not in result.out
    assert sorted(run_folder.rglob("*")) == before, "it writes nothing"
    (run_folder / "rankings/train.jsonl").unlink()
    result = recipe.run("preflight", "--output_dir", run_folder, "--stage", "reward_model")
    assert result.code == 0
    assert "reward_model  not checked: --train_data is missing, and no earlier stage left" in result.out


def test_the_recipe_tries_all_that_scores(run_folder):
    """A grader is a score function of the run as the reward model is, with a weight of its own."""
    (run_folder / "mine.py").write_text("def graded(text):\n    return 'A'\n")
    (run_folder / "rubric.yaml").write_text(
        "instructions: Is it good?\nchoices: {A: {description: Yes., score: 1}, B: {description: No., score: 0}}\n"
    )
    flags = ["--stage", "ppo", "--ppo.grader", f"{run_folder / 'mine.py'}:graded", "--ppo.rubric",
             run_folder / "rubric.yaml", "--ppo.reward_weights", "[1, 0.5]"]  # fmt: skip
    result = recipe.run("preflight", "--output_dir", run_folder, *flags)
    assert result.code == 0, result.err
    assert "FAILED" not in result.out
    refused = recipe.run("preflight", "--output_dir", run_folder, *flags[:-1], "[1, 0.5, 2]")
    assert "reward_weights has 3 numbers for 2 reward functions" in refused.err


def test_the_recipe_refuses(run_folder, tiny_tokenizer):
    tiny_tokenizer.add_tokens(["<new>", "<newer>"])
    tiny_tokenizer.save_pretrained(run_folder / "sft")
    result = recipe.run("preflight", "--output_dir", run_folder, "--stage", "ppo")
    assert result.code == 2
    assert "FAILED" in result.out
    assert "preflight: ppo: vocabulary: largest token id 401 outside the model's 400 embeddings" in result.err
    assert "--stage: expected one of sft, reward_model, ppo or null" in recipe.run("preflight", "--stage", "base").err
