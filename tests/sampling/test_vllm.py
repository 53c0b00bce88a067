"""The vLLM engine against a second process that serves a tiny model's tokens over HTTP (`reference/token_server.py`).

trl's client is the real one, and so are its requests, the announcements of weights and what it reads of the answers.
What stands in for vLLM is `reference/vllm_over_http.py`: the tensors that NCCL would carry go as POST /tensor. So the
names, types, shapes, order and values of the weights are tested, and that the server waits for them while they are
sent; NCCL and vLLM's own reading of the weights are not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from reference import token_server, vllm_over_http
from reference.tiny_chain import chain, save_adapter, save_base, shake
from reference.vllm_over_http import STAND_INS, Engine, make_trainer
from requests.adapters import HTTPAdapter
from transformers import AutoModelForCausalLM
from trl.generation import vllm_client

from rlhf import chat
from rlhf.errors import InputError, RunStopped
from rlhf.metrics import METRICS, check
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.ppo import math as ppo_math
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling.engine import Follower
from rlhf.sampling.vllm import VLLMEngine, policy_weights, read_answer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def pretended_vllm(monkeypatch):
    for name, value in STAND_INS.items():
        monkeypatch.setattr(vllm_client, name, value, raising=False)


class Servers:
    """reference/token_server.py, and a copy of it that may die."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, token_server.__file__, folder], stdout=subprocess.PIPE, text=True
        )
        self.urls = [f"http://127.0.0.1:{int(port)}" for port in self.process.stdout.readline().split()]

    def url(self) -> str:
        return self.urls[0]

    def post(self, path: str, **content):
        answer = requests.post(f"{self.url()}{path}", json=content, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def log(self, path: str = "/v1/completions") -> list[dict]:
        return [entry for entry in self.post("/log")["log"] if entry["path"] == path]


STARTED: list[Servers] = []


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end() -> Iterator[None]:
    yield
    for servers in STARTED:
        servers.process.kill()
        servers.process.wait()
        servers.process.stdout.close()


@pytest.fixture
def servers(tmp_path_factory, tiny_model, tiny_tokenizer) -> Iterator[Servers]:
    """The servers begin with the weights of the folder `full/base`; importing torch takes them seconds."""
    if not STARTED:
        folder = tmp_path_factory.mktemp("models")
        for kind in ("full", "lora"):
            (folder / kind).mkdir()
            chain(folder / kind, copy.deepcopy(tiny_model), tiny_tokenizer, kind == "lora")
        STARTED.append(Servers(folder / "full" / "base"))
    STARTED[0].post("/fault", fault="")
    STARTED[0].log()
    yield STARTED[0]
    STARTED[0].post("/fault", fault="")


def policy_of(servers: Servers, kind: str = "full") -> Path:
    return servers.folder.parent.parent / kind / ("sft" if kind == "lora" else "base")


def following(servers: Servers, kind: str = "full", engine: VLLMEngine | None = None) -> VLLMEngine:
    engine = engine or Engine(servers.url())
    folder = policy_of(servers, kind)
    engine.follow(load_policy(folder), chat.stop_ids(load_tokenizer(folder)))
    return engine


def draw(engine: VLLMEngine, prompts, seed: int = 3, tokens: int = 12, temperature: float = 0.7):
    return engine.generate(prompts, tokens, temperature, torch.Generator().manual_seed(seed))


def trainer_of(servers: Servers, folder: Path, engine=None, kind: str = "full", **changes) -> PPOTrainer:
    return make_trainer(str(policy_of(servers, kind)), str(folder), engine or Engine(servers.url()), **changes)


IDS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7], [20, 21]]


# -- sampling ------------------------------------------------------------------------------------------------


def test_token_ids_in_and_out(servers):
    engine = following(servers)
    assert isinstance(engine, Follower)
    stop = engine.stop_ids = (*engine.stop_ids, 30, 40, 50, 60, 70, 80, 90)  # so that some responses stop
    responses = draw(engine, IDS * 3)
    assert len(responses.ids) == len(responses.stopped) == len(responses.logprobs) == 15
    for ids, stopped, logprobs in zip(responses.ids, responses.stopped, responses.logprobs, strict=True):
        assert len(ids) == len(logprobs)
        assert not set(ids[:-1]) & set(stop)
        assert (ids[-1] in stop) == stopped
        assert len(ids) == 12 or (stopped and len(ids) < 12)
    assert 0 < sum(responses.stopped) < 15
    asked = servers.log()
    assert sorted(request["prompt"][0] for request in asked) == sorted(IDS * 3)
    assert all(request["stop_token_ids"] == list(stop) for request in asked)
    assert {(request["max_tokens"], request["temperature"]) for request in asked} == {(12, 0.7)}
    assert len({request["seed"] for request in asked}) == 15


@pytest.mark.slow
def test_draws_are_those_of_the_generator_and_independent(servers):
    engine = following(servers)
    one, again, other = draw(engine, IDS), draw(engine, IDS), draw(engine, IDS, seed=4)
    assert one == again
    assert all(a != b for a, b in zip(one.ids, other.ids, strict=True))
    assert one.ids[0] != one.ids[3]  # the same prompt twice in one call


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_the_plain_models_at_the_temperature(servers, temperature):
    engine = following(servers)
    model = AutoModelForCausalLM.from_pretrained(policy_of(servers), dtype=torch.float32)
    responses = draw(engine, IDS, temperature=temperature)
    for prompt, ids, logprobs in zip(IDS, responses.ids, responses.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        expected = (logits / temperature).log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs, dtype=torch.double), expected, atol=1e-5, rtol=0)


# -- PPO through it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ppo_trains_with_it_and_the_server_has_the_current_weights(servers, tmp_path, kind):
    """Two updates with large steps: the second's responses come from the weights after the first."""
    trainer = trainer_of(servers, tmp_path, kind=kind, preflight=True, gradient_checkpointing=kind == "lora")
    before = {name: tensor.clone() for name, tensor in trainer.actor_critic.trained_state().items()}
    rollouts, collect = [], trainer.collect
    trainer.collect = lambda prompts: rollouts.append(collect(prompts)) or rollouts[-1]
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.actor_critic.trained_state().items())
    for rollout in rollouts:
        assert rollout.engine_logprobs is not None
        torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, atol=1e-4, rtol=0)
        assert (rollout.engine_logprobs[~rollout.mask] == 0).all()
        weights = ppo_math.importance_weights(rollout.logprobs, rollout.engine_logprobs, rollout.mask, 2.0)
        torch.testing.assert_close(weights, rollout.mask.float(), atol=1e-4, rtol=0)
    assert not torch.equal(rollouts[0].reference_logprobs, rollouts[1].logprobs)
    moved = (rollouts[1].logprobs - rollouts[1].reference_logprobs).abs().max()
    assert moved > 0.01  # or the second comparison says nothing
    logged = [row for row in trainer.loop.state.log_history if "importance_weight" in row]
    assert len(logged) == 2
    for row in logged:
        assert row["importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert row["importance_capped"] == 0
        assert abs(row["engine_kl_nats"]) < 1e-7
    assert len(servers.log("/init_weight_transfer_engine")) == 1


def test_every_sampling_gets_the_weights_and_an_empty_cache_first(servers):
    draw(following(servers), IDS[:2])
    paths = [entry["path"] for entry in servers.post("/log")["log"]]
    order = [path for path in paths if "weight" in path or "cache" in path or "completions" in path]
    assert order == [
        "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
        "/reset_prefix_cache", "/v1/completions", "/v1/completions",
    ]  # fmt: skip


class Stale(Engine):
    """Its server keeps the weights that it has."""

    def send_weights(self):
        pass


def test_a_server_with_another_model_gets_weights_that_are_truncated(servers, tmp_path):
    """Importance weights by their definition from both models' plain forwards, in the rollout, metrics and loss."""
    other = load_policy(policy_of(servers))
    shake(other, 11, 0.25)
    engine = Engine(servers.url())
    engine.follow(other, ())
    engine.send_weights()
    cap = 1.5
    trainer = trainer_of(servers, tmp_path, Stale(servers.url()), importance_cap=cap)
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


def test_the_loss_is_weighted_and_the_value_loss_is_not(servers, tmp_path):
    trainer = trainer_of(servers, tmp_path, Stale(servers.url()), inner_epochs=1, minibatch_size=8)
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


def test_the_built_in_loop_logs_nothing_of_it(servers, tmp_path):
    trainer = make_trainer(str(policy_of(servers)), str(tmp_path), None)
    assert not isinstance(trainer.engine, Follower)
    rollout = trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts())))
    assert rollout.engine_logprobs is None
    names = {"importance_weight", "importance_capped", "engine_kl_nats"}
    assert not names & set(trainer.update(rollout))
    assert names <= set(METRICS)


@pytest.mark.long
def test_of_two_processes_one_sends_the_weights_and_both_sample_with_them(servers, tmp_path):
    """Launched by torchrun; each process compares its log-probabilities with the engine's."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [vllm_over_http.__file__, servers.url(), policy_of(servers), tmp_path]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    paths = [entry["path"] for entry in servers.post("/log")["log"]]
    order = [path for path in paths if "weight" in path or "completions" in path]
    sending = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    sampling = ["/v1/completions"] * 8
    assert order == ["/init_weight_transfer_engine", *sending, *sampling, *sending, *sampling]


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


def test_mixed_precision_does_not_round_what_is_sent(servers, monkeypatch):
    engine = following(servers, "lora")
    engine.connect_weights()
    seen = {}
    monkeypatch.setattr(engine.client, "update_named_params", lambda metadata, named: seen.update(named))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.send_weights()
    exact = sent(engine.policy)
    assert exact.keys() == seen.keys()
    assert all(torch.equal(tensor, seen[name]) for name, tensor in exact.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "adapted by DoRA"),
        ({"lora_bias": True}, "LoRA with biases"),
        ({"modules_to_save": ["lm_head"]}, "a copy of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # of a layer without one: that is the case
def test_adapters_that_cannot_be_sent_are_refused_at_once(servers, changes, message):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
    policy = get_peft_model(load_policy(policy_of(servers)), config)
    with pytest.raises(InputError, match=message):
        Engine(servers.url()).follow(policy, (1,))


# -- what goes wrong -----------------------------------------------------------------------------------------


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_no_server():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"{url}: no vLLM server can be reached.*vllm serve MODEL") as error:
        VLLMEngine(url)
    one_line(error)


def test_another_server():
    """trl's client would ask it for ever whether it is healthy."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.raises(InputError, match=rf"{url}: no vLLM server in good health \(501"):
        VLLMEngine(url)
    server.shutdown()
    server.server_close()


class Misbehaving(BaseHTTPRequestHandler):
    """In good health, but its list of models is what `models` does."""

    paths: list[str]

    def do_GET(self):
        self.paths.append(self.path)
        self.send_response(302 if self.redirects and self.path != "/health" else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        if self.path == "/v1/models":
            with contextlib.suppress(OSError):
                self.models()

    def log_message(self, *args):
        pass


def redirects(handler):
    pass


def floods(handler):
    while True:
        handler.wfile.write(b" " * 10000)


def drips(handler):
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        (redirects, "Exceeded 0 redirects"),
        (floods, "its answer has more than 100000 bytes"),
        (drips, "its answer did not end in time"),
    ],
)
def test_redirects_are_not_followed_and_answers_are_bounded(monkeypatch, models, reason):
    monkeypatch.setattr("rlhf.sampling.vllm_connection.LARGEST_ANSWER", 100_000)
    attributes = {"models": models, "redirects": models is redirects, "paths": []}
    handler = type("Handler", (Misbehaving,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    before = time.monotonic()
    with pytest.raises(InputError, match=rf"{url}: not a vLLM server \(.*{reason}") as error:
        VLLMEngine(url, timeout_seconds=0.7)
    assert time.monotonic() - before < 3
    one_line(error)
    assert "/elsewhere" not in handler.paths
    server.shutdown()
    server.server_close()


def test_a_password_in_the_address_is_refused():
    with pytest.raises(InputError, match="set an environment variable") as error:
        VLLMEngine("http://me:pw@127.0.0.1:8000")
    assert "pw" not in one_line(error)


def test_vllm_is_not_installed(servers, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: False)
    with pytest.raises(InputError, match=r"pip install 'trl\[vllm\]'"):
        VLLMEngine(servers.url())


def test_without_a_gpu_no_weights_are_sent(servers):
    engine = following(servers, engine=VLLMEngine(servers.url() + "/"))
    with pytest.raises(InputError, match="over NCCL, from a GPU only, and the policy is on cpu") as error:
        draw(engine, IDS)
    one_line(error)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no weight transfer", "no weight-transfer engine"),
        ("no development endpoints", "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_was_started_otherwise(servers, fault, message):
    servers.post("/fault", fault=fault)
    with pytest.raises(InputError, match=message) as error:
        draw(following(servers), IDS)
    one_line(error)


def test_logprobs_that_leave_out_the_temperature_are_refused(servers):
    servers.post("/fault", fault="raw logprobs")
    engine = following(servers)
    with pytest.raises(InputError, match=r"logprobs_mode='raw_logprobs'.*--logprobs-mode processed_logprobs"):
        draw(engine, IDS)


def test_an_engine_without_a_policy(servers):
    with pytest.raises(ValueError, match="no policy to follow"):
        draw(Engine(servers.url()), IDS)


FAULTS = {
    "no logprobs": "sent no log-probabilities",
    "a logprob too few": "log-probabilities for",
    "logprob is NaN": r"log-probability of response token 0 \(id \d+\) is None",
    "other prompt": "answered to other tokens",
    "empty": "response of 0 tokens",
    "too long": "response of 13 tokens, from 1 to 12",
    "cut short": "ended after 1 tokens of 12 without a stop token",
    "goes on": "goes on after a stop token",
    "no token ids": "sent no 'token_ids'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_answer_ends_the_run(servers, fault):
    engine = following(servers)
    servers.post("/fault", fault=fault)
    with pytest.raises(RunStopped, match=f"{servers.url()}: sampling failed: .*{FAULTS[fault]}") as error:
        draw(engine, IDS)
    assert "restart it and run the same command again" in one_line(error)


def test_a_refused_request_and_refused_weights(servers):
    engine = following(servers)
    generate = engine.client.generate
    engine.client.generate = lambda *args, **kwargs: generate(*args, **(kwargs | {"top_p": 0.9}))
    with pytest.raises(RunStopped, match=r"sampling failed: Request failed: 400.*not the full softmax"):
        draw(engine, IDS)
    engine.policy.model.layers[0].self_attn.extra = torch.nn.Linear(2, 2)  # a name that the server doesn't know
    with pytest.raises(RunStopped, match=r"sending the weights failed: Request failed: 400.*names differ") as error:
        draw(engine, IDS)
    one_line(error)


def test_a_server_that_hangs(servers):
    engine = following(servers, engine=Engine(servers.url(), timeout_seconds=0.5))
    servers.post("/fault", fault="hangs")
    with pytest.raises(RunStopped, match=r"sampling failed: .*timed out") as error:
        draw(engine, IDS[:1])
    one_line(error)


def test_a_server_that_dies_in_the_middle_of_a_run(servers, tmp_path):
    url = servers.urls[1]
    trainer = trainer_of(servers, tmp_path, Engine(url), updates=5)
    trainer.engine.client.session.mount(url, HTTPAdapter())  # trl tries for a minute whether it comes back
    update = trainer.update

    def then_dies(rollout):
        metrics = update(rollout)
        if trainer.update_index == 2:
            requests.post(f"{url}/fault", json={"fault": "dies"}, timeout=20)
        return metrics

    trainer.update = then_dies
    with pytest.raises(RunStopped, match=f"{url}: sampling failed: .*run the same command again") as error:
        trainer.train()
    one_line(error)
    assert trainer.update_index == 2
    with pytest.raises(RunStopped, match=f"{url}: sending the weights failed"):
        trainer.collect(trainer.next_prompts())


def test_an_answer_is_read_by_its_token_and_not_by_its_place():
    """Where the server sends more than the sampled token, trl sorts them by probability."""
    answer = {
        "prompt_ids": [[1, 2]], "completion_ids": [[7, 9]],
        "logprobs": [[[-0.1, -2.0], [-0.5, -0.7]]], "logprob_token_ids": [[[8, 7], [9, 3]]],
    }  # fmt: skip
    assert read_answer(answer, [1, 2], 2, [9]) == ([7, 9], [-2.0, -0.5])
    with pytest.raises(ValueError, match="id 7"):
        read_answer(answer | {"logprob_token_ids": [[[8, 6], [9, 3]]]}, [1, 2], 2, [9])
    rounded = answer | {"logprobs": [[[-0.1, -2.0], [1e-6, -9.0]]]}
    assert read_answer(rounded, [1, 2], 2, [9]) == ([7, 9], [-2.0, 0.0])
