"""Candidates of servers: seeds that can be used again, an order that says nothing, what is left out."""

from __future__ import annotations

import re

import pytest

from rlhf.client import Completion
from rlhf.collection.sample import Sampling, check_sampling, sample_items
from rlhf.errors import InputError
from rlhf.rows.records import Prompt

POLICIES = ["http://one:8000", "http://two:8000"]


@pytest.fixture
def asked(monkeypatch):
    """Servers that answer with what they were asked: by seed, as OpenAI's choices count on from it."""
    calls = []

    class Server:
        def __init__(self, url: str) -> None:
            self.url, self.model = url, f"model of {url}"

        def chat(self, messages, *, n, seed, temperature, max_tokens):
            calls.append((self.url, messages[-1]["content"], n, seed, temperature, max_tokens))
            texts = (" " if "silent" in messages[-1]["content"] else f"{self.url[7:10]} {seed + i}" for i in range(n))
            return [Completion(text, "stop") for text in texts]

    monkeypatch.setattr("rlhf.client.Client", Server)
    return calls


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": text}], {"family": text[:1], "prompt": text}) for text in texts]


def test_each_candidate_says_how_to_draw_it_again(asked):
    sampling = Sampling(candidates_per_prompt=4, temperature=0.7, max_new_tokens=9, seed=3)
    items = sample_items(prompts("a?", "b?", "c?", "d?"), POLICIES, sampling, "prompts.jsonl")
    assert len(asked) == 8
    for item in items:
        assert item.source == "prompts.jsonl"
        assert item.columns == {"family": item.prompt[0]["content"][0]}
        for candidate in item.candidates:
            assert candidate.text == f"{candidate.policy[7:10]} {candidate.seed}"
            assert candidate.sampler == {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 9,
                                         "model": f"model of {candidate.policy}"}  # fmt: skip
            assert 0 <= candidate.seed < 2**31
        assert sorted(candidate.policy for candidate in item.candidates) == [POLICIES[0]] * 2 + [POLICIES[1]] * 2
    assert len({candidate.seed for item in items for candidate in item.candidates}) == 16
    assert len({tuple(candidate.policy for candidate in item.candidates) for item in items}) > 1
    again = sample_items(prompts("c?", "a?"), POLICIES, sampling, "prompts.jsonl")
    assert [item.candidates for item in again] == [items[2].candidates, items[0].candidates]
    moved = sample_items(prompts("a?"), ["http://here:1", "http://there:2"], sampling, "prompts.jsonl")
    assert [c.seed for c in moved[0].candidates] == [c.seed for c in items[0].candidates]  # wherever a policy stands
    other = sample_items(prompts("a?"), POLICIES, Sampling(candidates_per_prompt=4, seed=4), "prompts.jsonl")
    assert {c.text for c in other[0].candidates}.isdisjoint(c.text for c in items[0].candidates)


def test_empty_responses_are_left_out_and_counted(asked, caplog):
    sampling = Sampling(candidates_per_prompt=2)
    items = sample_items(prompts("silent", "b?"), POLICIES[:1], sampling, "prompts.jsonl")
    assert [item.prompt[0]["content"] for item in items] == ["b?"]
    assert "left out 2 responses" in caplog.text
    assert "1 of 2 prompts" in caplog.text
    with pytest.raises(InputError, match="no prompt has two different responses"):
        sample_items(prompts("silent"), POLICIES, sampling, "prompts.jsonl")


@pytest.mark.parametrize(
    ("policies", "count", "says"),
    [
        ([], 4, "policies: got none"),
        (["a", "a"], 4, "policies: a is given twice"),
        (["a", "b"], 3, "policies=2 must divide candidates_per_prompt=3; try 1 or 3"),
        (["a"], 1, "candidates_per_prompt=1: the page ranks 2 to 9"),
        (["a"], 10, "candidates_per_prompt=10: the page ranks 2 to 9"),
    ],
)
def test_settings_that_give_no_items(policies, count, says):
    with pytest.raises(InputError, match=re.escape(says)):
        check_sampling(policies, Sampling(candidates_per_prompt=count))
