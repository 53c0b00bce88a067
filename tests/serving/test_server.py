"""A tiny policy behind the server, over real sockets: seeds, streams, stops, scores, other clients."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference.policy_server import serving, wait_for
from reference.tiny_chain import save_adapter, save_base, shake

from rlhf import chat
from rlhf.client import Client
from rlhf.errors import InputError
from rlhf.run.http import Refused
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import RowGenerator
from rlhf.serving.app import Service
from rlhf.serving.config import ServingConfig
from rlhf.serving.engine import LocalEngine
from rlhf.serving.policies import fingerprint_of, load_policies, policies_of_run
from rlhf.serving.upstream import Upstream
from rlhf.serving.wire import read_chat

ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def policies(tmp_path, tiny_model, tiny_tokenizer):
    shake(tiny_model, 0, 0.1)
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    adapter = save_adapter(tmp_path, base, tiny_tokenizer)
    return load_policies({"base": str(base), "sft": str(adapter)}, None, "cpu")


def service_of(policies, **limits) -> Service:
    config = ServingConfig(**{"max_answer_tokens": 64, **limits})
    return Service(LocalEngine(policies, config), config)


def sampled(policy, prompt: list[int], seed: int, most: int, temperature: float = 1.0) -> list[int]:
    engine = TransformersEngine(policy.model, sorted(policy.stop_ids), policy.pad_id)
    return engine.generate([prompt], most, temperature, RowGenerator.of([seed], 0, "cpu")).ids[0]


def test_a_seed_gives_the_same_answer_alone_and_among_others(policies):
    """And it is our sampler's."""
    policy = policies["sft"]
    prompt = chat.encode_prompt(policy.tokenizer, ASKED)
    with serving(service_of(policies, max_rows=6)) as url, ThreadPoolExecutor(17) as pool:
        client = Client(url, model="sft", timeout=60)
        settings = {"seed": 11, "max_tokens": 24, "temperature": 0.9}
        (alone,) = client.chat(ASKED, **settings)

        def other(number: int):
            asked = [{"role": "user", "content": "Count to ten " * (number % 5 + 1)}]
            name = ("sft", "base")[number % 2]
            return Client(url, model=name, timeout=60).chat(
                asked, seed=number, max_tokens=4 + 3 * number, n=number % 3 + 1
            )

        crowd = [pool.submit(other, number) for number in range(16)]
        among = [client.chat(ASKED, **settings)[0] for _ in range(3)]
        assert {answer.text for answer in among} == {alone.text}
        for one in crowd:
            one.result()
    ids = sampled(policy, prompt, 11, 24, 0.9)
    assert alone.text == chat.decode_response(policy.tokenizer, ids, policy.stop_ids)
    assert alone.finish_reason == ("stop" if ids[-1] in policy.stop_ids else "length")


def test_choice_i_is_drawn_with_seed_plus_i(policies):
    with serving(service_of(policies)) as url:
        client = Client(url, model="base")
        several = client.chat(ASKED, n=3, seed=5, max_tokens=8)
        single = [client.chat(ASKED, seed=seed, max_tokens=8)[0] for seed in (5, 6, 7)]
        assert several == single
        assert len({answer.text for answer in single}) == 3
        prompts = client.asked(
            "/v1/completions", {"model": "base", "prompt": ["one", "two"], "n": 2, "seed": 5, "max_tokens": 4}
        )
        texts = [choice["text"] for choice in prompts["choices"]]
        assert texts[3] == client.complete("two", seed=8, max_tokens=4)[0].text
        drawn = client.asked("/v1/chat/completions", {"model": "base", "messages": ASKED, "max_tokens": 8})
        assert client.chat(ASKED, seed=drawn["seed"], max_tokens=8)[0].text == drawn["choices"][0]["message"]["content"]


def test_a_stream_is_the_whole_answer_in_pieces(policies):
    with serving(service_of(policies)) as url:
        client = Client(url, model="sft")
        for seed in range(2):
            for stop in ((), ("e", "zz")):
                (whole,) = client.chat(ASKED, seed=seed, max_tokens=20, stop=stop)
                assert "".join(client.stream(ASKED, seed=seed, max_tokens=20, stop=stop)) == whole.text
        body = {"model": "sft", "messages": ASKED, "n": 2, "seed": 1, "max_tokens": 6, "stream": True, "logprobs": True}
        events = list(client.events("/v1/chat/completions", body | {"stream_options": {"include_usage": True}}))
        *chunks, last = events
        whole = client.chat(ASKED, n=2, seed=1, max_tokens=6, logprobs=True)
        for index in (0, 1):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(choice["delta"].get("content", "") for choice in own) == whole[index].text
            rows = [row for choice in own for row in (choice["logprobs"] or {"content": []})["content"]]
            assert [row["logprob"] for row in rows] == pytest.approx([t.logprob for t in whole[index].tokens], abs=1e-5)
            assert own[-1]["finish_reason"] == whole[index].finish_reason
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] <= 12
        plain = client.events("/v1/completions", {"model": "sft", "prompt": "one", "seed": 3, "stream": True})
        assert "".join(e["choices"][0]["text"] for e in plain) == client.complete("one", seed=3)[0].text


def test_a_stop_text_ends_an_answer(policies):
    with serving(service_of(policies)) as url:
        client = Client(url, model="base")
        (free,) = client.chat(ASKED, seed=3, max_tokens=40, logprobs=True)
        stop = free.text[len(free.text) // 2 :][:3]
        (cut,) = client.chat(ASKED, seed=3, max_tokens=40, stop=["never", stop], logprobs=True)
        assert cut.text == free.text.partition(stop)[0]
        assert cut.finish_reason == "stop"
        assert len(cut.tokens) < len(free.tokens)
        assert cut.tokens == free.tokens[: len(cut.tokens)]


@torch.no_grad()
def test_logprobs_are_a_plain_forwards(policies):
    """Whatever the temperature; the token that ends an answer is among them."""
    policy = policies["sft"]
    body = {"model": "sft", "messages": ASKED, "seed": 2, "max_tokens": 12, "temperature": 0.6}
    with serving(service_of(policies)) as url:
        answer = Client(url).asked("/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 5})
    rows = answer["choices"][0]["logprobs"]["content"]
    prompt = chat.encode_prompt(policy.tokenizer, ASKED)
    ids = sampled(policy, prompt, 2, 12, 0.6)
    expected = policy.model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)[len(prompt) - 1 :]
    assert len(rows) == len(ids) == answer["usage"]["completion_tokens"]
    for place, (i, row) in enumerate(zip(ids, rows, strict=True)):
        assert row["token"] == policy.token_text(i)
        assert row["logprob"] == pytest.approx(float(expected[place, i]), abs=1e-5)
        likely = expected[place].topk(5)
        assert [top["logprob"] for top in row["top_logprobs"]] == pytest.approx(likely.values.tolist(), abs=1e-5)
        assert [top["token"] for top in row["top_logprobs"]] == list(map(policy.token_text, likely.indices.tolist()))


@torch.no_grad()
@pytest.mark.parametrize("most", [0, 1])
def test_an_echo_scores_a_prompt_as_lm_eval_asks_for_it(policies, most):
    policy = policies["base"]
    context = policy.tokenizer.encode("The capital of France", add_special_tokens=False)
    ending = policy.tokenizer.encode(" is Paris.", add_special_tokens=False)
    likely = list(context)
    for _ in range(3):
        likely.append(int(policy.model(torch.tensor([likely])).logits[0, -1].argmax()))
    prompts = [context + ending, likely]
    body = {
        "model": "base", "prompt": prompts, "echo": True, "max_tokens": most, "logprobs": 1, "seed": 1234,
        "temperature": 0,
    }  # fmt: skip
    with serving(service_of(policies)) as url:
        answer = Client(url, model="base").asked("/v1/completions", body)
        (text,) = Client(url, model="base").complete("The capital", echo=True, max_tokens=0, logprobs=0)
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(ids) + most
        assert choice["text"].startswith(policy.tokenizer.decode(ids))
        plain = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[:-1]
        expected = plain.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        told = found["token_logprobs"][: len(ids)]
        assert told[0] is None
        assert told[1:] == pytest.approx(expected.tolist(), abs=1e-5)
        greedy = [
            value == max(top.values()) for value, top in zip(told[1:], found["top_logprobs"][1 : len(ids)], strict=True)
        ]
        assert greedy == (plain.argmax(-1) == torch.tensor(ids[1:])).tolist()
        assert found["text_offset"][:2] == [0, len(found["tokens"][0])]
    assert greedy[len(context) - 1 :] == [True] * 3
    assert text.text == "The capital"
    assert text.finish_reason == "length"
    assert [token.logprob is None for token in text.tokens] == [True] + [False] * (len(text.tokens) - 1)


def test_what_does_not_fit_is_told(policies):
    asked = [{"role": "user", "content": "word " * 500}]
    with serving(service_of(policies, max_cache_tokens=300)) as url:
        client = Client(url, model="base")
        for call, line in [
            (lambda: client.chat(ASKED, max_tokens=65), "max_tokens=65: this server writes at most 64 tokens"),
            (lambda: client.chat(asked, max_tokens=5), "base has room for 300 in all"),
            (lambda: client.chat([{"role": "user", "content": "x" * 10**6}]), "1000000 characters"),
            (lambda: client.complete([0] * 299, max_tokens=2), "prompt: 299 tokens, and 2 to be written"),
            (lambda: client.complete([400_000], max_tokens=2), "prompt: token 400000"),
            (lambda: client.complete("", max_tokens=2), "prompt: no token"),
            (lambda: Client(url, model="gpt").chat(ASKED), "no policy 'gpt' is here; choose one of base, sft"),
        ]:
            with pytest.raises(InputError, match=line):
                call()
        assert client.chat(ASKED, max_tokens=3)[0].text is not None


def test_a_client_that_leaves_frees_its_row(policies):
    service = service_of(policies, max_rows=2, max_answer_tokens=400)
    with serving(service) as url:
        pieces = [Client(url, model="base").stream(ASKED, max_tokens=400, seed=seed) for seed in range(2)]
        for stream in pieces:
            next(stream)
        assert service.engine.counts["writing"] == 2
        for stream in pieces:
            stream.close()
        wait_for(lambda: service.engine.counts == {"writing": 0, "waiting": 0})
        assert Client(url, model="base").chat(ASKED, max_tokens=2)


def test_a_failing_model_fails_its_own_requests_alone(policies, monkeypatch, caplog):
    service = service_of(policies)
    decoder = service.engine.scheduler.decoders["base"]

    def fail(rows):
        raise RuntimeError("of the client's words")

    with serving(service) as url:
        monkeypatch.setattr(decoder, "admit", fail)
        with pytest.raises(Exception, match="decoding failed: RuntimeError"):
            Client(url, model="base", retries=0).chat(ASKED, max_tokens=2)
        assert Client(url, model="sft").chat(ASKED, max_tokens=2)
        monkeypatch.undo()
        assert Client(url, model="base").chat(ASKED, max_tokens=2)
    assert "client's words" not in caplog.text
    assert "decoding failed: RuntimeError" in caplog.text


def test_another_server_behind_the_same_app(policies):
    with serving(service_of(policies)) as behind:
        config = ServingConfig()
        front = Service(Upstream(Client(behind, timeout=30), 8), config)
        with serving(front) as url:
            client, direct = Client(url, model="sft"), Client(behind, model="sft")
            settings = {"seed": 4, "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "stop": ["zz"]}
            assert client.models() == ["base", "sft"]
            scored = {"logprobs": True, "top_logprobs": 2, "n": 2}
            assert client.chat(ASKED, **settings, **scored) == direct.chat(ASKED, **settings, **scored)
            assert "".join(client.stream(ASKED, **settings)) == direct.chat(ASKED, **settings)[0].text
            plain = {"echo": True, "logprobs": 1, "max_tokens": 2, "seed": 1}
            assert client.complete([5, 6, 7], **plain) == direct.complete([5, 6, 7], **plain)
            with pytest.raises(InputError, match=r"400: upstream: .*at most 64 tokens"):
                client.chat(ASKED, max_tokens=1000)
            pieces = client.stream(ASKED, seed=1, max_tokens=64)
            next(pieces)
            pieces.close()
            wait_for(lambda: front.slots.taken == 0)


def test_a_server_behind_is_sent_what_it_would_fill_in_by_itself():
    """vLLM's top_k and repetition_penalty would be a hub model's."""
    client, bodies = Client("http://127.0.0.1:1", model="m"), []
    client.models = lambda: ["m"]
    client.asked = lambda path, body: bodies.append(body) or {"choices": [{"index": 0, "text": "hi"}]}
    client.full_softmax = {"top_k": 0, "repetition_penalty": 1.0}
    with serving(Service(Upstream(client, 1), ServingConfig())) as url:
        Client(url, model="m").complete([1, 2], max_tokens=3, temperature=0.5)
    (body,) = bodies
    assert (body["top_k"], body["repetition_penalty"], body["temperature"], body["max_tokens"]) == (0, 1.0, 0.5, 3)


def test_a_request_counts_until_the_server_behind_has_answered_it():
    client, free, asked = Client("http://127.0.0.1:1", model="m"), threading.Event(), []
    client.models = lambda: ["m"]
    client.full_softmax = {}
    client.asked = lambda path, body: asked.append(path) or (free.wait(10) and {"choices": []})
    upstream, request = Upstream(client, 1), read_chat(json.dumps({"messages": ASKED}).encode())

    async def hang_up_and_ask_again():
        first = asyncio.create_task(upstream.whole(request))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert upstream.counts == {"writing": 1, "waiting": 0}
        for again in (upstream.whole(request), anext(upstream.stream(request))):
            with pytest.raises(Refused, match="still at work on 1 requests"):
                await again
        free.set()
        while upstream.counts["writing"]:
            await asyncio.sleep(0.001)
        assert (await upstream.whole(request))["choices"] == []

    asyncio.run(hang_up_and_ask_again())
    assert len(asked) == 2
    upstream.close()


def test_policies_share_the_weights_of_their_base(policies):
    base = dict(policies["base"].model.named_parameters())
    adapted = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): weight
        for name, weight in policies["sft"].model.named_parameters()
        if "lora" not in name
    }
    assert {name: weight.data_ptr() for name, weight in base.items()} == {
        name: weight.data_ptr() for name, weight in adapted.items()
    }


def test_the_policies_of_a_run(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(InputError, match="no complete base, sft or ppo stage"):
        policies_of_run(str(tmp_path))
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    save_adapter(tmp_path, base, tiny_tokenizer)
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "config.json").write_text("{}")
    (tmp_path / "ppo" / "inputs.json").write_text("{}")  # still in training
    assert policies_of_run(str(tmp_path)) == {"base": str(tmp_path / "base"), "sft": str(tmp_path / "sft")}
    assert len(fingerprint_of(str(base))) == 64
    assert fingerprint_of(str(base)) != fingerprint_of(str(tmp_path / "sft"))


@pytest.mark.long  # the package is no dependency
def test_the_openai_client_works_unchanged(policies):
    openai = pytest.importorskip("openai")
    with serving(service_of(policies), token="s3cret") as url:
        ours = Client(url, "s3cret", model="sft")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["base", "sft"]
        assert client.models.retrieve("sft").id == "sft"
        settings = {"model": "sft", "messages": ASKED, "seed": 9, "max_tokens": 10, "temperature": 0.8}
        whole = client.chat.completions.create(**settings, n=2, stop=["zz"], logprobs=True, top_logprobs=2)
        expected = ours.chat(
            ASKED, seed=9, max_tokens=10, temperature=0.8, n=2, stop=["zz"], logprobs=True, top_logprobs=2
        )
        assert [choice.message.content for choice in whole.choices] == [answer.text for answer in expected]
        tokens = [[(t.token, t.logprob) for t in choice.logprobs.content] for choice in whole.choices]
        assert tokens == [[(t.text, t.logprob) for t in answer.tokens] for answer in expected]
        stream = client.chat.completions.create(**settings, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == ours.chat(ASKED, seed=9, max_tokens=10, temperature=0.8)[0].text
        plain = client.completions.create(model="base", prompt="one two", max_tokens=4, seed=1, logprobs=1, echo=True)
        assert plain.choices[0].text.startswith("one two")
        with pytest.raises(openai.BadRequestError, match="max_tokens=1000: this server writes at most 64"):
            client.chat.completions.create(**settings | {"max_tokens": 1000})
        with pytest.raises(openai.NotFoundError, match="no policy 'gpt' is here"):
            client.chat.completions.create(**settings | {"model": "gpt"})
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
