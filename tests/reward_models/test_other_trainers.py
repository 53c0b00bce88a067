"""A served reward model behind other trainers: the exact requests of OpenRLHF, verl and trl's AsyncGRPO, and prompts
read back from what chat templates have rendered, with trl's templates as the oracle."""

from __future__ import annotations

import asyncio
import pickle
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reference.served import call, served
from reference.tiny_chain import chain

from reward_models import RewardClient, RewardModel, verl
from reward_models.rendered import RenderedReader
from reward_models.server import Refused, ServerConfig, create_app, read_queries, token_counter
from rlhf import chat
from rlhf.errors import InputError

TALKS = [
    [("user", "What is the capital of France?")],
    [("system", "Be brief."), ("user", "Count to ten\n\nplease")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "Say  more")],
    [("system", "You speak."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]
TALKS = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
TEMPLATES = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # found without importing trl


def rendered(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    return tiny_tokenizer


# -- prompts read back -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["chatml", "qwen2_5", "qwen3", "llama3", "llama3_2", "gemma3", "phi3", "deepseekv3", "glm4moe"]
)
def test_prompts_come_back_from_what_their_template_renders(tokenizer, name):
    if name != "chatml":
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    read = RenderedReader(tokenizer)
    for messages in TALKS:
        prompt = rendered(tokenizer, messages)
        found = read(prompt, f"{prompt}Paris, and more")
        assert rendered(tokenizer, found[:-1]) == prompt
        assert found[-1] == {"role": "assistant", "content": "Paris, and more"}
        if name == "gemma3" and messages[0]["role"] == "system":  # whose template joins it to the first question
            assert found[0]["content"] == f"{messages[0]['content']}\n\n{messages[1]['content']}"
        else:
            assert found[:-1] == messages


def test_plain_text_is_one_user_turn_and_the_end_of_turn_is_no_text(tokenizer):
    read = RenderedReader(tokenizer)
    end = tokenizer.convert_ids_to_tokens(chat.end_of_turn_id(tokenizer))
    prompt = "Count to <b>ten</b>: [1, 2]"
    for response in ("", "one two", "one\n\ntwo", f"it says {end} there"):
        for ending in ("", end, f"{end}\n"):
            talk = read(prompt, prompt + response + ending)
            assert talk == [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.mark.parametrize(
    ("prompt", "query", "why"),
    [
        ("Hello", "Hullo there", "query does not begin with its prompt"),
        ("<|begin_of_text|>Hi", "<|begin_of_text|>Hi you", "has control tokens"),
        ("[INST] Hi [/INST]", "[INST] Hi [/INST] you", "has control tokens"),
        ("<start_of_turn>user\nHi<end_of_turn>\n", "<start_of_turn>user\nHi<end_of_turn>\nyou", "has control tokens"),
        ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>user\nHi<|im_end|>\nyou", "has control tokens"),  # no opening
        ("Hi <|im_end|> there", "Hi <|im_end|> there you", "send plain text, or render with the template"),
    ],
)
def test_another_familys_rendering_is_refused(tokenizer, prompt, query, why):
    with pytest.raises(InputError, match=why) as error:
        RenderedReader(tokenizer)(prompt, query)
    assert "\n" not in str(error.value)


# -- OpenRLHF ----------------------------------------------------------------------------------------------


@pytest.fixture
def reward_model(tmp_path, tiny_model, tiny_tokenizer):
    return RewardModel.load(chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[1], device="cpu")


@pytest.fixture
def url(reward_model):
    config = ServerConfig()
    app = create_app(
        lambda talks: reward_model.score(talks).tolist(), config, count_tokens=token_counter(reward_model),
        read_text=RenderedReader(reward_model.tokenizer), name="rm",
    )  # fmt: skip
    with served(app, config) as address:
        yield address


def test_openrlhfs_request_and_answer(url, reward_model):
    """What its SingleTurnAgentExecutor posts to `--reward.remote_url`: one row, decoded with special tokens, the label
    whatever the data hold; it reads `rewards`, `scores` and `extra_logs`."""
    messages, response = TALKS[1], "one two three"
    prompt = rendered(reward_model.tokenizer, messages)
    end = reward_model.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id(reward_model.tokenizer))
    asked = {"query": [f"{prompt}{response}{end}"], "prompts": [prompt], "labels": [None]}
    expected = reward_model.score([[*messages, {"role": "assistant", "content": response}]]).tolist()
    status, answer, _ = call(url, "/get_reward", asked)
    assert (status, answer) == (200, {"rewards": expected, "scores": expected, "extra_logs": {}})
    # The prompts as they are (no --data.apply_chat_template), several rows, no labels
    plain = {"query": ["Hi there", "Hello?Yes"], "prompts": ["Hi", "Hello?"]}
    local = reward_model(["Hi", "Hello?"], [" there", "Yes"])
    assert call(url, "/get_reward", plain)[1]["rewards"] == local
    assert len(set(local)) == 2


@pytest.mark.parametrize(
    ("asked", "status", "why"),
    [
        ({"prompts": ["a"], "completions": ["b"]}, 400, 'write {"query": [prompt + response, ...], "prompts": [...]}'),
        ({"query": "ab", "prompts": ["a"]}, 400, "query: a list is needed, got 'ab'"),
        ({"query": ["ab", "cd"], "prompts": ["a"]}, 400, "1 prompts but 2 query"),
        ({"query": [["ab"]], "prompts": ["a"]}, 400, "query[0]: a text is needed, got a list of 1"),
        ({"query": ["a"] * 9, "prompts": ["a"] * 9}, 413, "query: 9; this server takes 8 in one request"),
        ({"query": ["xy"], "prompts": ["a"]}, 400, "query[0]: query does not begin with its prompt"),
    ],
)
def test_what_is_refused_of_it(tokenizer, asked, status, why):
    import json

    with pytest.raises(Refused) as refused:
        read_queries(json.dumps(asked).encode(), 8, RenderedReader(tokenizer))
    assert refused.value.status == status
    assert str(refused.value).startswith(why)


def test_without_a_reader_there_is_no_such_path():
    config = ServerConfig()
    app = create_app(lambda talks: [0.0] * len(talks), config, count_tokens=len)
    with served(app, config) as address:
        assert call(address, "/get_reward", {"query": ["ab"], "prompts": ["a"]})[0] == 404


# -- verl --------------------------------------------------------------------------------------------------


def test_verls_custom_reward_function(url, reward_model):
    """The keywords of its reward managers, merged with reward_kwargs as its loader does; messages as a list, and as the
    array that a parquet file gives."""
    messages = TALKS[2]
    (expected,) = reward_model([messages], ["fine"])
    with_url = partial(lambda given, **kwargs: verl.compute_score(**{**kwargs, **given}), {"url": url})
    for prompt in (messages, np.array(messages, dtype=object)):
        extra = {"prompt": prompt, "index": 3, "num_turns": None, "rollout_reward_scores": {}}
        asked = {"data_source": "my/data", "solution_str": "fine", "ground_truth": "", "extra_info": extra}
        score = with_url(**asked)
        assert type(score) is float
        assert score == expected
        routed = {"reward_router_address": "10.0.0.7:8000", "reward_model_tokenizer": None}
        assert with_url(**asked, **routed) == expected
    assert with_url(**asked | {"extra_info": {"prompt": "Hi"}}) == reward_model(["Hi"], ["fine"])[0]
    for extra in (None, {}, {"question": "Hi"}, {"prompt": []}):
        with pytest.raises(InputError, match="extra_info: no prompt"):
            with_url(**asked | {"extra_info": extra})


# -- trl's AsyncGRPO ---------------------------------------------------------------------------------------


def test_the_client_can_be_pickled_for_it(url, reward_model):
    client = pickle.loads(pickle.dumps(RewardClient(url)))
    asked = {"completions": [[{"role": "assistant", "content": "one"}]], "prompts": [TALKS[1]], "completion_ids": [[7]]}
    assert client(**asked, answer=["10"]) == reward_model([TALKS[1]], ["one"])


@pytest.mark.slow
def test_trls_async_rollout_worker_scores_with_the_client(url, reward_model):
    """Its own scoring of a group, in a process to which reward functions are pickled."""
    from accelerate import PartialState
    from trl.experimental.async_grpo import async_rollout_worker as worker

    PartialState()  # its logger asks for one
    client = pickle.loads(pickle.dumps(RewardClient(url)))
    prompts, texts = [TALKS[1]] * 3, ["one", "one two", "ten nine"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    sequence = SimpleNamespace(input_ids=[1], completion_mask=[1], old_log_probs=[0.0])
    group = worker.RolloutGroup(
        prompts=prompts, reward_kwargs={"answer": ["10"] * 3}, completions=completions, completions_ids=[[1], [2], [3]],
        completions_sequences=[[sequence]] * 3, tool_call_counts=[0] * 3, tool_failure_counts=[0] * 3, model_version=0,
        group_id=0, env_rewards=[None] * 3, rollout_rewards=[None] * 3,
    )  # fmt: skip
    loop = SimpleNamespace(
        reward_funcs=[client], reward_func_names=["rm"], _env_reward_types=[], _provides_rollout_reward=False
    )
    samples = asyncio.run(worker._AsyncRolloutLoop._score_group(loop, group))
    local = reward_model(prompts, texts)
    assert [sample.metrics["rewards/rm"] for sample in samples] == local
    centred = (np.array(local) - np.mean(local)) / (np.std(local) + 1e-8)
    assert [sample.advantage for sample in samples] == pytest.approx(centred.tolist(), rel=1e-6)
