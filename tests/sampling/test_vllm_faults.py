"""What goes wrong with a vLLM server: old weights, malformed answers, another setting, its death in the middle."""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from reference.fake_vllm import FakeVLLM
from reference.tiny_chain import chain, shake
from reference.vllm_over_http import make_trainer
from trl.generation import vllm_client

from rlhf import chat
from rlhf.errors import InputError, RunStopped
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.sampling import vllm_check, vllm_nccl
from rlhf.sampling.vllm import RETURNS, VLLMEngine
from rlhf.sampling.vllm_check import BASE, CUT, HEAD, KEPT, OTHER, TEMPERATURE, Asked, Check, Own, Seen, fault
from rlhf.sampling.vllm_connection import ServerGone

IDS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7], [20, 21]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[dict[str, Path | FakeVLLM]]:
    shared: dict[str, Path | FakeVLLM] = {"folder": tmp_path_factory.mktemp("models")}
    yield shared
    if "server" in shared:
        shared["server"].stop()


@pytest.fixture
def server(made, tiny_model, tiny_tokenizer, monkeypatch) -> FakeVLLM:
    """A server over `full/base`, whose weights are those of `lora/base`; one that dies is looked for at once."""
    monkeypatch.setattr("rlhf.sampling.vllm_connection.POLL_SECONDS", 0.02)
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


def draw(engine: VLLMEngine, prompts=IDS, tokens: int = 12, temperature: float = 0.7):
    return engine.generate(prompts, tokens, temperature, torch.Generator().manual_seed(3))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# -- the comparison ------------------------------------------------------------------------------------------

TEXT, RESPONSE = [-1.0, -2.0, -3.0], [-0.5, -1.5]


def off(server: Seen, before=([-9.0, -9.0, -9.0], None), base=None, still=1e-4):
    return fault(server, Seen(TEXT, RESPONSE), 1e-3, before, base, [-0.9, -1.9], still)


def test_fault_by_hand():
    near = [x + 5e-4 for x in TEXT]
    assert off(Seen(near, RESPONSE)) is None
    assert off(Seen([-1.0, -2.0, -3.3], RESPONSE)) == (pytest.approx(0.1), OTHER)
    assert off(Seen(TEXT, [-0.9, -1.9])) == (pytest.approx(0.4), TEMPERATURE)
    assert off(Seen(TEXT, [-0.6, -1.6])) == (pytest.approx(0.1), CUT)
    old = [-1.5, -2.0, -3.0]
    assert off(Seen(old, RESPONSE), before=(old, None)) == (pytest.approx(1 / 6), KEPT)
    assert off(Seen(old, RESPONSE), before=(old, None), base=old) == (pytest.approx(1 / 6), BASE)


def test_numbers_that_stand_still_while_the_policy_moves_are_old_however_little_it_moves():
    near = [x + 3e-4 for x in TEXT]  # below the limit, as after a small step
    assert off(Seen(near, RESPONSE), before=(near, near)) == (pytest.approx(3e-4), KEPT)
    assert off(Seen(near, RESPONSE), before=(near, near), base=near) == (pytest.approx(3e-4), BASE)
    assert off(Seen(near, RESPONSE), before=(near, TEXT)) is None  # evaluated again, nothing moved
    assert off(Seen(near, RESPONSE), before=([x + 1e-9 for x in near], near)) is None  # it moved
    assert off(Seen(near, RESPONSE), before=(near, near), still=4e-4) is None
    assert off(Seen(near, RESPONSE), before=(near, [x + 1e-6 for x in TEXT]), still=0.0) == (pytest.approx(3e-4), KEPT)


STAYED, FLOAT, HALF = [-1.0, -2.0], True, False
MOVEMENTS = {
    "float32, a tenth of the limit and more": ([1], STAYED, [-1.0, -2.0004], [-1.0, -2.0004], FLOAT, KEPT),
    "float32, less": ([1], STAYED, [-1.0, -2.0001], [-1.0, -2.0001], FLOAT, None),
    "16 bits, however little": ([1], STAYED, [-1.0, -2.0001], [-1.0, -2.0001], HALF, KEPT),
    "16 bits, not at all": ([1], STAYED, STAYED, STAYED, HALF, None),
    "16 bits, with other weights on the server too": ([1], [-1.0, -2.001], [-1.0, -2.01], [-1.0, -2.01], HALF, None),
    "16 bits, with the same weights (a learning rate of 0)": ([0], STAYED, [-1.0, -2.01], [-1.0, -2.01], HALF, None),
    "16 bits, as from one forward to the next": ([1], STAYED, [-1.0, -2.01], [-1.0, -2.004], HALF, None),
    "16 bits, by more than that": ([1], STAYED, [-1.0, -2.01], [-1.0, -2.006], HALF, KEPT),
}


@pytest.mark.parametrize("case", MOVEMENTS)
def test_how_far_the_trainer_may_move_while_the_server_stands_still(case):
    """Two sendings: all numbers agree at first; of the second, by hand: weights, the server's numbers, the trainer's
    twice."""
    weights, server, own, again, exact, cause = MOVEMENTS[case]
    asks = SimpleNamespace(
        sample=lambda *args: ([7, 8], RESPONSE), prompt_logprobs=lambda *args: [-3.0, -3.0], url="http://a"
    )
    check = Check(asks, "base", [5, 6], 2, None if not exact else 1e-3, adapter=False)

    def compare(weights, server, own, again):
        asked = Asked("base", [5, 6, 7], [5, 6, 7, 8], 2, Seen(server, RESPONSE), server == check.before.server)
        check.judge(asked, Own(Seen(own, RESPONSE), [-0.9, -1.9], again, exact, weights))

    compare([0], STAYED, STAYED, STAYED)
    with pytest.raises(RunStopped, match=cause) if cause else contextlib.nullcontext():
        compare(weights, server, own, again)


@pytest.mark.parametrize(("bf16", "unmoved", "forwards"), [(False, True, 2), (True, False, 2), (True, True, 3)])
def test_a_text_is_computed_again_only_where_that_counts(server, monkeypatch, bf16, unmoved, forwards):
    policy, computed = load_policy(policy_of(server, "full")), []
    real = vllm_check.logprobs
    monkeypatch.setattr(vllm_check, "logprobs", lambda *args: computed.append(args) or real(*args))
    asked = Asked("base", [5, 6, 7], [5, 6, 7, 8], 2, Seen([], []), unmoved)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        own = vllm_check.answer(policy, asked, 1.0)
    assert (len(computed), own.exact, bool(own.weights)) == (forwards, not bf16, bf16)
    assert own.again == own.said.text  # a CPU computes one forward as the other


def test_marks_follow_every_bit_of_what_is_sent(server, monkeypatch):
    monkeypatch.setattr(vllm_check, "PIECE", 7)  # no tensor is a multiple of it
    policy = load_policy(policy_of(server, "lora"))
    policy.add_adapter("value", policy.peft_config["default"])
    before = vllm_check.marks(policy)
    shake(policy, 1, only="value")
    assert vllm_check.marks(policy) == before
    for kind in (torch.float32, torch.bfloat16):
        weight = policy.to(kind).base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight
        before = vllm_check.marks(policy)
        with torch.no_grad():
            weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(9.0, dtype=kind))
        assert sum(a != b for a, b in zip(before, vllm_check.marks(policy), strict=True)) == 1


PLANTED = [
    ("lora", "not applied", BASE, 0),
    ("lora", "keeps the adapter", KEPT, 1),
    ("full", "keeps weights", KEPT, 1),
    ("full", "raw logprobs", TEMPERATURE, 0),
    ("lora", "top-k", CUT, 0),
    ("full", "other temperature", CUT, 0),
]


@pytest.mark.parametrize(("kind", "planted", "cause", "first"), PLANTED, ids=[row[1] for row in PLANTED])
def test_a_server_that_does_something_else_is_caught_at_once(server, kind, planted, cause, first):
    """first: the first sending at which its answers differ from what they should be."""
    engine = following(server, kind)
    server.fault = planted
    for sending in range(first + 1):
        if sending:
            shake(engine.policy, sending, 1e-3, only="lora_" if kind == "lora" else "")  # about one step of PPO
        if sending < first:
            draw(engine)
    with pytest.raises(RunStopped, match="its log-probabilities of one text differ from the trainer's by ") as error:
        draw(engine)
    assert one_line(error).endswith(cause)
    assert f"{server.url}: " in one_line(error)


@pytest.mark.parametrize(("kind", "planted"), [("lora", "keeps the adapter"), ("full", "keeps weights")])
def test_in_16_bits_too_a_server_that_keeps_its_weights_is_caught_at_the_first_sending_after_a_step(
    server, kind, planted
):
    engine = following(server, kind)
    server.fault = planted
    for _ in range(2):  # the second one sends the same weights
        with torch.autocast("cpu", dtype=torch.bfloat16):
            draw(engine)
    shake(engine.policy, 1, 1e-4, only="lora_" if kind == "lora" else "")
    pattern = r"by 0\.0\d+ nats per token \(at most 0\.1\)"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RunStopped, match=pattern) as error:
        draw(engine)
    assert one_line(error).endswith(KEPT)


def test_an_old_copy_of_a_tied_head_is_named(server):
    server.base.lm_head.weight = torch.nn.Parameter(server.base.model.embed_tokens.weight.clone())
    engine = VLLMEngine(server.url)
    policy = load_policy(policy_of(server))
    policy.config.tie_word_embeddings = True
    policy.tie_weights()
    engine.follow(policy, ())
    draw(engine)
    server.fault = "old head"
    shake(policy, 1, 0.01)
    with pytest.raises(RunStopped) as error:
        draw(engine)
    assert one_line(error).endswith(HEAD)


@pytest.mark.slow
def test_what_the_server_was_started_with_is_no_matter_if_it_takes_the_weights(server):
    shake(server.base, 4, 0.2)
    engine = following(server)
    assert draw(engine).ids
    shake(engine.policy, 5, 0.2)
    assert draw(engine).ids


def test_the_limit_is_that_of_the_precision_or_the_one_given(server, monkeypatch):
    for limit, settings in ((1e-3, {}), (0.05, {"tolerance_nats": 0.05})):
        engine = following(server, **settings)
        monkeypatch.setattr(vllm_check, "logprobs", lambda *args, own=vllm_check.logprobs: [
            [x + 0.06 for x in row] for row in own(*args)
        ])  # fmt: skip
        with pytest.raises(RunStopped, match=rf"by 0\.06 nats per token \(at most {limit:g}\)"):
            draw(engine)
        monkeypatch.undo()
    policy = following(server).policy
    assert vllm_check.precision(policy) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vllm_check.precision(policy) == torch.bfloat16
    assert vllm_check.precision(policy.to(torch.bfloat16)) == torch.bfloat16


# -- the server and its settings -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_no_server():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"{url}: no vLLM server in good health.*vllm serve MODEL") as error:
        VLLMEngine(url)
    one_line(error)


def test_another_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(InputError, match="no vLLM server in good health"):
        VLLMEngine(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def test_a_password_in_the_address_is_refused():
    with pytest.raises(InputError, match="set an environment variable") as error:
        VLLMEngine("http://me:pw@127.0.0.1:8000")
    assert "pw" not in one_line(error)


@pytest.mark.parametrize(
    ("kind", "planted", "message"),
    [
        ("full", "no development endpoints", "404: Not Found; .*VLLM_SERVER_DEV_MODE=1"),
        ("lora", "no adapters", "404: Not Found; .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.*--max-lora-rank 8"),
    ],
)
def test_a_server_that_was_started_otherwise(server, kind, planted, message):
    engine = following(server, kind)
    server.fault = planted
    with pytest.raises(InputError, match=f"{server.url}: {message}") as error:
        draw(engine)
    one_line(error)


def test_an_engine_without_a_policy(server):
    with pytest.raises(ValueError, match="no policy to follow"):
        draw(VLLMEngine(server.url))


def test_a_policy_trained_in_full_is_no_adapter(server):
    with pytest.raises(InputError, match="but the policy is trained in full; take transport folder"):
        following(server, transport="lora")


def test_an_adapter_with_trained_tokens_is_sent_merged(server):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices={"embed_tokens": [1, 2]}
    )
    engine = VLLMEngine(server.url)
    engine.follow(load_policy(policy_of(server), lora=config), ())
    shake(engine.policy, 3, only="trainable_tokens_delta")
    draw(engine)
    assert "/collective_rpc" in server.paths()


FAULTS = {
    "no logprobs": "sent no log-probabilities",
    "a logprob too few": "log-probabilities for",
    "logprob is NaN": r"log-probability of token \d+ is nan",
    "other tokens": "those of other tokens",
    "other prompt": "answered to other tokens",
    "empty": "response of 0 tokens",
    "too long": "response of 13 tokens, from 1 to 12",
    "cut short": "ended after 1 tokens of 12 without a stop token",
    "goes on": "goes on after a stop token",
    "no token ids": "sent no 'token_ids'",
}


@pytest.mark.parametrize("planted", FAULTS)
def test_a_malformed_answer_ends_the_run(server, planted):
    engine = following(server)
    engine.send_weights(IDS[0], 12, 0.7)
    server.fault = planted
    with pytest.raises(RunStopped, match=f"{server.url}: .*{FAULTS[planted]}") as error:
        engine.sample(IDS, 12, 0.7, range(5))
    assert "restart it and run the same command again" in one_line(error)


def test_a_server_that_hangs(server):
    engine = following(server, timeout_seconds=0.5)
    engine.send_weights(IDS[0], 4, 0.7)
    server.fault = "hangs"
    with pytest.raises(RunStopped, match=r"silent for timeout=0\.5 seconds") as error:
        engine.sample(IDS[:1], 4, 0.7, [1])
    one_line(error)


# -- its death -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_server_that_dies_and_comes_back_gets_the_weights_again(server, kind, caplog):
    engine = following(server, kind)
    shake(engine.policy, 8, 0.1, only="lora_" if kind == "lora" else "")
    expected = draw(engine)
    port, server.dies_after = server.port, 4  # of 2 comparisons and 5 prompts
    back = threading.Thread(target=lambda: (server.dead.wait(), time.sleep(0.1), server.start()))
    back.start()
    assert draw(engine) == expected  # with the same seeds, from the same weights
    back.join()
    assert server.port == port
    assert "waiting up to 300 seconds" in caplog.text
    assert "is sent the weights again" in caplog.text


def test_a_server_that_was_restarted_in_between(server):
    engine = following(server, "lora")
    expected = draw(engine)
    server.reset()
    assert draw(engine) == expected


def test_a_server_that_is_up_again_without_the_adapter_counts_as_gone(server):
    engine = following(server, "lora")
    engine.send_weights(IDS[0], 12, 0.7)
    server.reset()  # it answers, but to the base's name alone
    with pytest.raises(ServerGone):
        engine.sample(IDS, 12, 0.7, range(len(IDS)))


@pytest.mark.slow
def test_a_server_that_dies_again_and_again_ends_the_run(server):
    engine = following(server)
    server.dies_after = 0
    deaths = []

    def supervise():
        while len(deaths) <= RETURNS:
            server.dead.wait()
            deaths.append(time.monotonic())
            if len(deaths) <= RETURNS:
                server.dies_after = 0
                time.sleep(0.1)
                server.start()

    thread = threading.Thread(target=supervise, daemon=True)
    thread.start()
    with pytest.raises(RunStopped, match="4 times in one rollout; look at the server's log") as error:
        draw(engine)
    one_line(error)
    thread.join()
    server.start()


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_and_its_checkpoint_is_good(server, tmp_path):
    engine = VLLMEngine(server.url, wait_seconds=0.1)
    trainer = make_trainer(str(policy_of(server)), str(tmp_path), engine, updates=3, save_steps=1)
    update = trainer.update

    def then_dies(rollout):
        metrics = update(rollout)
        if trainer.update_index == 1:
            server.dies_after = 3
        return metrics

    trainer.update = then_dies
    with pytest.raises(RunStopped, match=r"did not come back within 0\.1 seconds: start it and run the same") as error:
        trainer.train()
    one_line(error)
    assert trainer.update_index == 1
    server.start()
    again = make_trainer(str(policy_of(server)), str(tmp_path), VLLMEngine(server.url), updates=3, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.update_index == 3


# -- nccl: trl's client --------------------------------------------------------------------------------------


class Misbehaving(BaseHTTPRequestHandler):
    """Its list of models is what `models` does."""

    def do_GET(self):
        self.paths.append(self.path)
        self.send_response(302 if self.redirects else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
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
def test_trls_client_follows_no_redirects_and_its_answers_are_bounded(monkeypatch, models, reason):
    monkeypatch.setattr("rlhf.sampling.vllm_nccl.LARGEST_ANSWER", 100_000)
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)
    attributes = {"models": models, "redirects": models is redirects, "paths": []}
    handler = type("Handler", (Misbehaving,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    before = time.monotonic()
    with pytest.raises(InputError, match=f"{url}: .*{reason}") as error:
        vllm_nccl.connect(url, 0, 0.4, torch.device("cuda"))
    assert time.monotonic() - before < 3
    one_line(error)
    assert "/elsewhere" not in handler.paths
    server.shutdown()
    server.server_close()


def test_vllm_is_not_installed(server, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: False)
    with pytest.raises(InputError, match=r"pip install 'trl\[vllm\]', or take transport lora or folder"):
        vllm_nccl.connect(server.url, 0, 5.0, torch.device("cuda"))


def test_without_a_gpu_nothing_is_sent_over_nccl(server):
    with pytest.raises(InputError, match="nccl sends weights from a GPU only, and the policy is on cpu") as error:
        following(server, transport="nccl")
    one_line(error)
