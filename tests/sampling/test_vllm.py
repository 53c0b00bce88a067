"""The vLLM engine against a server that speaks vLLM's HTTP over a tiny model (`reference/fake_vllm.py`).

The server loads what the engine wrote with peft and safetensors, and samples by a plain loop. The same against vLLM
itself: `test_vllm_real.py`. Of transport nccl, the names, types, shapes, order and values of the weights are tested,
and that the server waits for them; NCCL and vLLM's own reading of them are not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import vllm_over_http
from reference.fake_vllm import FakeVLLM
from reference.tiny_chain import chain, save_adapter, save_base, shake
from reference.vllm_over_http import STAND_INS, OverHTTP, make_trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.generation import vllm_client

from rlhf import chat
from rlhf.errors import InputError
from rlhf.metrics import METRICS, check
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.ppo import math as ppo_math
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling.engine import Follower
from rlhf.sampling.vllm import VLLMEngine
from rlhf.sampling.vllm_transport import NCCLTransport
from rlhf.sampling.vllm_weights import is_tied, policy_weights, save_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[dict[str, Path | FakeVLLM]]:
    """What tests share: folders of models, and the server over one of them."""
    shared: dict[str, Path | FakeVLLM] = {"folder": tmp_path_factory.mktemp("models")}
    yield shared
    if "server" in shared:
        shared["server"].stop()


@pytest.fixture
def server(made, tiny_model, tiny_tokenizer) -> FakeVLLM:
    """The server begins with the weights of `full/base`, which are those of `lora/base`."""
    if "server" not in made:
        for kind in ("full", "lora"):
            (made["folder"] / kind).mkdir()
            chain(made["folder"] / kind, copy.deepcopy(tiny_model), tiny_tokenizer, kind == "lora")
        made["server"] = FakeVLLM(made["folder"] / "full" / "base")
    made["server"].reset()
    return made["server"]


def policy_of(server: FakeVLLM, kind: str = "full") -> Path:
    return Path(server.folder).parents[1] / kind / ("sft" if kind == "lora" else "base")


def following(server: FakeVLLM, kind: str = "full", **settings) -> VLLMEngine:
    engine = VLLMEngine(server.url, **settings)
    folder = policy_of(server, kind)
    engine.follow(load_policy(folder), chat.stop_ids(load_tokenizer(folder)))
    return engine


def draw(engine: VLLMEngine, prompts, seed: int = 3, tokens: int = 12, temperature: float = 0.7):
    return engine.generate(prompts, tokens, temperature, torch.Generator().manual_seed(seed))


def trainer_of(server: FakeVLLM, folder: Path, engine=None, kind: str = "full", **changes) -> PPOTrainer:
    return make_trainer(str(policy_of(server, kind)), str(folder), engine or VLLMEngine(server.url), **changes)


IDS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7], [20, 21]]


# -- sampling ------------------------------------------------------------------------------------------------


def test_token_ids_in_and_out(server):
    engine = following(server)
    assert isinstance(engine, Follower)
    stop = engine.stop_ids = (*engine.stop_ids, 30, 40, 50, 60, 70, 80, 90)  # so that some responses stop
    engine.send_weights(IDS[2], 12, 0.7)
    server.log.clear()
    responses = engine.sample(IDS * 3, 12, 0.7, range(15))
    assert len(responses.ids) == len(responses.stopped) == len(responses.logprobs) == 15
    for ids, stopped, logprobs in zip(responses.ids, responses.stopped, responses.logprobs, strict=True):
        assert len(ids) == len(logprobs)
        assert not set(ids[:-1]) & set(stop)
        assert (ids[-1] in stop) == stopped
        assert len(ids) == 12 or (stopped and len(ids) < 12)
    assert 0 < sum(responses.stopped) < 15
    asked = server.bodies("/v1/completions")
    assert sorted(request["prompt"] for request in asked) == sorted(IDS * 3)
    assert all(request["stop_token_ids"] == list(stop) for request in asked)
    assert {(request["max_tokens"], request["temperature"], request["model"]) for request in asked} == {
        (12, 0.7, "base")
    }
    assert sorted(request["seed"] for request in asked) == list(range(15))


@pytest.mark.slow
def test_draws_are_those_of_the_generator_and_independent(server):
    engine = following(server)
    one, again, other = draw(engine, IDS), draw(engine, IDS), draw(engine, IDS, seed=4)
    assert one == again
    assert all(a != b for a, b in zip(one.ids, other.ids, strict=True))
    assert one.ids[0] != one.ids[3]  # the same prompt twice in one call


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_the_plain_models_at_the_temperature(server, temperature):
    engine = following(server)
    model = AutoModelForCausalLM.from_pretrained(policy_of(server), dtype=torch.float32)
    responses = draw(engine, IDS, temperature=temperature)
    for prompt, ids, logprobs in zip(IDS, responses.ids, responses.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        expected = (logits / temperature).log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs, dtype=torch.double), expected, atol=1e-5, rtol=0)


# -- PPO through it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "transport"),
    [
        ("full", None),
        ("lora", None),
        pytest.param("lora", "folder", marks=pytest.mark.slow),
        pytest.param("full", "nccl", marks=pytest.mark.slow),
    ],
)
def test_ppo_trains_with_it_and_the_server_has_the_current_weights(server, tmp_path, monkeypatch, kind, transport):
    """Two updates with large steps: the second's responses come from the weights after the first."""
    if transport == "nccl":
        for name, value in STAND_INS.items():
            monkeypatch.setattr(vllm_client, name, value, raising=False)
        monkeypatch.setattr(NCCLTransport, "device", lambda self, policy: torch.device("cuda"))
        OverHTTP.url = server.url
    engine = VLLMEngine(server.url, transport, tmp_path / "weights")
    trainer = trainer_of(
        server, tmp_path, engine, kind, preflight=transport is None, gradient_checkpointing=kind == "lora"
    )
    server.log.clear()
    rollouts, collect = [], trainer.collect
    trainer.collect = lambda prompts: rollouts.append(collect(prompts)) or rollouts[-1]
    trainer.train()
    for rollout in rollouts:
        assert rollout.engine_logprobs is not None
        torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, atol=1e-4, rtol=0)
        assert (rollout.engine_logprobs[~rollout.mask] == 0).all()
        weights = ppo_math.importance_weights(rollout.logprobs, rollout.engine_logprobs, rollout.mask, 2.0)
        torch.testing.assert_close(weights, rollout.mask.float(), atol=1e-4, rtol=0)
    moved = (rollouts[1].logprobs - rollouts[1].reference_logprobs).abs().max()
    assert moved > 0.01  # or the second comparison says nothing
    logged = [row for row in trainer.loop.state.log_history if "importance_weight" in row]
    assert len(logged) == 2
    for row in logged:
        assert row["importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert row["importance_capped"] == 0
        assert abs(row["engine_kl_nats"]) < 1e-7
    sends = {"lora": "/v1/load_lora_adapter", "folder": "/collective_rpc", "nccl": "/update_weights"}
    used = transport or ("lora" if kind == "lora" else "folder")
    assert {name for name, path in sends.items() if path in server.paths()} == {used}
    names = [body["lora_name"] for body in server.bodies(sends["lora"])]
    assert len(set(names)) == len(names)
    assert len(list((tmp_path / "weights").rglob("*.safetensors"))) == (1 if used == "lora" else 0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("full", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]),
        ("lora", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_lora_adapter"]),
    ],
)
def test_every_sampling_gets_the_weights_and_an_empty_cache_first(server, kind, expected):
    engine = following(server, kind)
    draw(engine, IDS[:2])
    draw(engine, IDS[:2])
    paths = [path for path in server.paths() if path not in ("/health", "/v1/models")]
    asked = "/v1/completions"
    order = [path for i, path in enumerate(paths) if i == 0 or path != asked or paths[i - 1] != asked]
    sent = [[expected[0]], expected[1:]] if kind == "lora" else [expected] * 2
    assert order == [asked, *sent[0], asked, *sent[1], asked]
    assert len(server.models) == 1 + (kind == "lora")  # no older version stays


def test_a_server_on_the_trainers_gpu_is_awake_only_while_it_samples(server):
    engine = following(server, colocated=True)
    assert draw(engine, IDS[:2]) == draw(following(server, colocated=True), IDS[:2])
    assert server.asleep
    paths = server.paths()
    assert paths.count("/wake_up") == paths.count("/sleep") == 2
    assert paths.index("/wake_up") < paths.index("/v1/completions")


def test_a_server_with_another_model_gets_weights_that_are_truncated(server, tmp_path, monkeypatch):
    """Importance weights by their definition from both models' plain forwards, in the rollout, metrics and loss."""
    other = load_policy(policy_of(server))
    shake(other, 11, 0.25)
    server.base.load_state_dict(other.state_dict())
    monkeypatch.setattr(VLLMEngine, "send_weights", lambda *args: None)
    cap = 1.5
    trainer = trainer_of(server, tmp_path, importance_cap=cap)
    rollout = trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts())))
    ratios = []
    for row, (prompt, ids) in enumerate(zip(rollout.prompt_ids, rollout.response_ids, strict=True)):
        with torch.no_grad():
            both = [
                (model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() / 0.7)
                .log_softmax(-1)[range(len(ids)), ids]
                for model in (trainer.actor_critic.policy, other)
            ]  # fmt: skip
        torch.testing.assert_close(rollout.engine_logprobs[row, : len(ids)].double(), both[1], atol=1e-4, rtol=0)
        ratios += (both[0] - both[1]).exp().tolist()
    assert max(ratios) > 2 * cap
    assert min(ratios) < 0.5
    metrics = trainer.update(rollout)
    mean = lambda values: sum(values) / len(ratios)  # noqa: E731
    assert metrics["importance_weight"] == pytest.approx(mean([min(ratio, cap) for ratio in ratios]), rel=1e-3)
    assert metrics["importance_capped"] == pytest.approx(mean([ratio > cap for ratio in ratios]), abs=1e-6)
    assert metrics["engine_kl_nats"] == pytest.approx(mean([r - 1 - math.log(r) for r in ratios]), rel=1e-3)
    assert check("importance_capped", metrics["importance_capped"]) is not None


def test_the_loss_is_weighted_and_the_value_loss_is_not(server, tmp_path):
    trainer = trainer_of(server, tmp_path, inner_epochs=1, minibatch_size=8)
    scored = trainer.score(trainer.collect(trainer.next_prompts()))
    rollout, count = trainer.advantages(scored), float(scored.mask.sum())
    draws = torch.Generator().manual_seed(0)
    theirs = torch.where(rollout.mask, rollout.logprobs + torch.randn(rollout.mask.shape, generator=draws), 0.0)
    before, losses = copy.deepcopy(trainer.state_dict()), {}
    for name, logprobs in {"plain": None, "weighted": theirs}.items():
        trainer.load_state_dict(copy.deepcopy(before))
        ready = trainer.advantages(dataclasses.replace(scored, engine_logprobs=logprobs))
        losses[name] = trainer.update(ready)
    # the ratio is 1: the objective is the advantage
    expected = sum(
        min(math.exp(float(rollout.logprobs[i, t] - theirs[i, t])), 2.0) * float(rollout.advantages[i, t])
        for i, ids in enumerate(rollout.response_ids)
        for t in range(len(ids))
    )
    assert losses["weighted"]["policy_loss"] == pytest.approx(-expected / count, rel=1e-4)
    assert abs(losses["weighted"]["policy_loss"] - losses["plain"]["policy_loss"]) > 0.01
    for name in ("value_loss", "clip_fraction", "approx_kl_nats", "ratio_max"):
        assert losses["weighted"][name] == losses["plain"][name]


def test_the_built_in_loop_logs_nothing_of_it(server, tmp_path):
    trainer = make_trainer(str(policy_of(server)), str(tmp_path), None)
    assert not isinstance(trainer.engine, Follower)
    rollout = trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts())))
    assert rollout.engine_logprobs is None
    names = {"importance_weight", "importance_capped", "engine_kl_nats"}
    assert not names & set(trainer.update(rollout))
    assert names <= set(METRICS)


@pytest.mark.long
def test_of_two_processes_one_sends_the_weights_and_both_sample_with_them(server, tmp_path):
    """Launched by torchrun; each process compares its log-probabilities with the engine's."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [vllm_over_http.__file__, server.url, policy_of(server), tmp_path]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sending = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    paths = [path for path in server.paths() if path in (*sending, "/v1/completions")]
    checked, sampling = ["/v1/completions"] * 2, ["/v1/completions"] * 8
    assert paths == [*checked, *sending, *checked, *sampling, *sending, *checked, *sampling]


# -- the weights that are sent -------------------------------------------------------------------------------


def sent(policy) -> dict[str, torch.Tensor]:
    return {name: compute() for name, _, compute in policy_weights(policy)}


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_sent_as_what_peft_would_merge(tmp_path, tiny_model, tiny_tokenizer, tied):
    tiny_model.config.tie_word_embeddings = tied
    if tied:
        tiny_model.tie_weights()
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM",
        trainable_token_indices={"embed_tokens": [1, 2, 30]},
    )  # fmt: skip
    policy = get_peft_model(load_policy(base), config)
    for name in ("reference", "value"):  # PPO's other adapters stay at home
        policy.add_adapter(name, config)
    shake(policy, 5, only="lora_")
    shake(policy, 6, only="trainable_tokens_delta")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    ours = sent(policy)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert [(n, b.shape, b.dtype) for n, b, _ in policy_weights(policy)] == [
        (n, t.shape, t.dtype) for n, t in ours.items()
    ]
    expected = dict(copy.deepcopy(policy).merge_and_unload().named_parameters())
    assert ours.keys() == expected.keys()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert ours.keys() == dict(plain.named_parameters()).keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)
    changed = {name for name, tensor in plain.named_parameters() if not torch.equal(tensor, ours[name])}
    assert {re.sub(r"layers\.\d+\.", "", name) for name in changed} == {
        "model.embed_tokens.weight", "model.self_attn.q_proj.weight", "model.mlp.up_proj.weight",
        "model.mlp.down_proj.weight",
    }  # fmt: skip


def test_an_adapter_that_peft_has_merged_is_not_added_twice(tmp_path, tiny_model, tiny_tokenizer):
    policy = load_policy(save_adapter(tmp_path, save_base(tmp_path, tiny_model, tiny_tokenizer), tiny_tokenizer))
    apart = sent(policy)
    policy.merge_adapter()
    for name, tensor in sent(policy).items():
        torch.testing.assert_close(tensor, apart[name], atol=1e-6, rtol=1e-6)


def test_mixed_precision_does_not_round_what_is_sent(server, monkeypatch):
    engine = following(server, "lora", transport="folder")
    seen = {}
    monkeypatch.setattr(engine.transport, "write", lambda policy, main: seen.update(sent(policy)))
    monkeypatch.setattr(engine.transport, "send", lambda policy: "base")
    monkeypatch.setattr("rlhf.sampling.vllm_check.Check.judge", lambda *args: None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.send_weights(IDS[0], 4, 1.0)
    exact = sent(engine.policy)
    assert exact.keys() == seen.keys()
    assert all(torch.equal(tensor, seen[name]) for name, tensor in exact.items())


@pytest.mark.parametrize("tied", [True, False])
def test_written_weights_are_in_files_of_bounded_size_with_a_head_of_their_own(tmp_path, tiny_model, monkeypatch, tied):
    tiny_model.config.tie_word_embeddings = tied
    if tied:
        tiny_model.tie_weights()
    assert is_tied(tiny_model) == tied
    monkeypatch.setattr("rlhf.sampling.vllm_weights.SHARD_BYTES", 60_000)
    save_weights(tiny_model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {name: t for file in files for name, t in load_file(file).items()}
    expected = dict(tiny_model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    assert "lm_head.weight" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "adapted by DoRA"),
        ({"lora_bias": True}, "LoRA with biases"),
        ({"modules_to_save": ["lm_head"]}, "a copy of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # of a layer without one: that is the case
def test_adapters_that_cannot_be_sent_are_refused_at_once(server, changes, message):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
    policy = get_peft_model(load_policy(policy_of(server)), config)
    with pytest.raises(InputError, match=message):
        VLLMEngine(server.url).follow(policy, (1,))
    setting = next(iter(changes))
    with pytest.raises(InputError, match=f"transport lora sends an adapter, but .* {setting}; take transport folder"):
        VLLMEngine(server.url, "lora").follow(policy, (1,))
