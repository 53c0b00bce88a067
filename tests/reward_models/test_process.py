"""Process models as score functions: probabilities of an independent forward, solution scores, step scores."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from reference.joining import joining_tokenizer
from transformers import AutoModelForSequenceClassification

from reward_models import ProcessModel, RewardModel
from reward_models.process import About, solution_score, step_changes
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.scalar import new_scalar_model

PROMPTS = ["Count to three.", "What is 1 + 1?\nShow the steps.", "Hello?"]
COMPLETIONS = ["one\ntwo, two\nthree", "1 + 1 = 2\n\nThe answer is 2.", "Paris"]


def save(folder, model, tokenizer, head="scalar", kind="process", separator="\n"):
    """Save a process model with a drawn head and the given trunk."""
    chat.prepare_tokenizer(tokenizer)
    about = About(kind=kind, head=head, separator=separator, template_hash=chat.template_hash(tokenizer))
    scalar = new_scalar_model(model, seed=0, labels=about.labels)
    scalar.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about.save(folder)
    return folder


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    return save(tmp_path / "prm", tiny_model, tiny_tokenizer)


def ends_by_offsets(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of the ChatML text, and the token of each line's last character, by the tokenizer's own offsets."""
    head = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    encoded = tokenizer(head + completion + "<|im_end|>\n", return_offsets_mapping=True, add_special_tokens=False)
    ends, place = [], len(head)
    for line in completion.split("\n"):
        if line.strip():
            last = place + len(line.rstrip()) - 1
            ends.append(next(n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a <= last < b))
        place += len(line) + 1
    return encoded["input_ids"], ends


def by_hand(folder, tokenizer, prompt: str, completion: str) -> list[float]:
    """Probabilities by transformers' plain forward of the solution up to each step's end, one forward per step."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids, ends = ends_by_offsets(tokenizer, prompt, completion)
    found = []
    for end in ends:
        with torch.no_grad():
            hidden = plain.model(torch.tensor([ids[: end + 1]])).last_hidden_state[0, -1].double().numpy()
        logits = plain.score.weight.detach().double().numpy() @ hidden
        odds = np.exp(logits - logits.max())
        found.append(1 / (1 + math.exp(-logits[0])) if len(logits) == 1 else 1 - odds[0] / odds.sum())
    return found


@pytest.mark.parametrize("head", ["scalar", "three_class"])
def test_probabilities_are_those_of_a_plain_forward_up_to_each_step(tmp_path, tiny_model, tiny_tokenizer, head):
    folder = save(tmp_path / "prm", tiny_model, tiny_tokenizer, head)
    model = ProcessModel.load(folder, device="cpu")
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}]
             for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]  # fmt: skip
    found = model.step_probabilities(talks)
    for prompt, completion, own in zip(PROMPTS, COMPLETIONS, found, strict=True):
        assert own == pytest.approx(by_hand(folder, tiny_tokenizer, prompt, completion), abs=1e-5)
    assert [len(own) for own in found] == [3, 2, 1]
    # what follows a step changes nothing; neither do batches
    alone = [model.step_probabilities([talk])[0] for talk in talks]
    cut = model.step_probabilities([[talks[0][0], {"role": "assistant", "content": "one\ntwo, two"}]])[0]
    assert found[0][:2] == pytest.approx(cut, abs=1e-6)
    for one, other in zip(alone, found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_scores_are_min_product_or_last_of_the_steps(folder):
    for solution, formula in (("min", min), ("product", math.prod), ("last", lambda p: p[-1])):
        model = ProcessModel.load(folder, device="cpu", solution=solution)
        steps = [by_hand(folder, model.tokenizer, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert model(PROMPTS, COMPLETIONS) == pytest.approx([formula(own) for own in steps], abs=1e-5)
    assert model.score([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]).shape == (1,)
    with pytest.raises(InputError, match="solution='mean' must be min, product or last"):
        ProcessModel.load(folder, device="cpu", solution="mean")


def test_solution_scores_and_changes_by_hand():
    steps = [0.9, 0.5, 0.8]
    assert [solution_score(steps, s) for s in ("min", "product", "last")] == pytest.approx([0.5, 0.36, 0.8])
    assert step_changes(steps, "min") == pytest.approx([-0.1, -0.4, 0.0])
    assert step_changes(steps, "product") == pytest.approx([-0.1, -0.45, -0.09])
    assert step_changes(steps, "last") == pytest.approx([-0.1, -0.4, 0.3])
    for solution in ("min", "product", "last"):
        assert solution_score([], solution) == 0.0
        assert step_changes([], solution) == []
        rng = np.random.default_rng(0)
        for _ in range(50):
            drawn = rng.random(rng.integers(1, 7)).tolist()
            assert sum(step_changes(drawn, solution)) == pytest.approx(solution_score(drawn, solution) - 1)


def given(model, prompts, completions, ids, tokenizer) -> list[list[float]]:
    """The step scores that a model gives, and its solution scores unchanged by being asked."""
    caught: list[list[list[float]]] = []
    scores = model(prompts, completions, ids, tokenizer, caught.append)
    assert scores == model(prompts, completions, ids, tokenizer)
    (values,) = caught
    assert [len(row) for row in values] == [len(row) for row in ids]
    for row, score in zip(values, scores, strict=True):
        assert sum(row) == pytest.approx(score - 1, abs=1e-6)
    return values


def test_step_scores_stand_at_the_steps_last_tokens(folder):
    model = ProcessModel.load(folder, device="cpu")
    tokenizer, ids, ends = model.tokenizer, [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        whole, places = ends_by_offsets(tokenizer, prompt, completion)
        start = len(chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}]))
        ids.append(whole[start:-1])  # up to the end of turn, as a policy samples them
        ends.append([place - start for place in places])
    values = given(model, PROMPTS, COMPLETIONS, ids, tokenizer)
    for prompt, completion, row, places in zip(PROMPTS, COMPLETIONS, values, ends, strict=True):
        changes = step_changes(by_hand(folder, tokenizer, prompt, completion), "min")
        expected = np.zeros(len(row))
        expected[places] = changes
        np.testing.assert_allclose(row, expected, atol=1e-5)
    # a policy that samples other tokens for the same text is read by its own tokens: every character is one
    single = [[i for c in completion for i in tokenizer(c)["input_ids"]] for completion in COMPLETIONS]
    apart = given(model, PROMPTS, COMPLETIONS, single, tokenizer)
    last = [{2, 11, 17}, {8, 26}, {4}]  # "one", "two, two", "three"; "1 + 1 = 2", "The answer is 2."; "Paris"
    for completion, row, own in zip(COMPLETIONS, apart, last, strict=True):
        assert [completion[n] for n in sorted(own)] == [line[-1] for line in completion.split("\n") if line]
        assert {n for n, value in enumerate(row) if value} <= own


def test_sampled_ids_and_text_are_read_alike(folder):
    model = ProcessModel.load(folder, device="cpu")
    ids = [chat.encode_response(model.tokenizer, completion) for completion in COMPLETIONS]
    assert model(PROMPTS, COMPLETIONS, ids, model.tokenizer) == model(PROMPTS, COMPLETIONS)
    cut = [row[:-1] for row in ids]  # a response that did not stop
    assert model(PROMPTS, COMPLETIONS, cut, model.tokenizer) == model(PROMPTS, COMPLETIONS)


def test_a_policy_with_another_tokenizer(folder):
    model, other = ProcessModel.load(folder, device="cpu"), joining_tokenizer()
    ids = [chat.encode_response(other, completion) for completion in COMPLETIONS]
    values = given(model, PROMPTS, COMPLETIONS, ids, other)
    assert model(PROMPTS, COMPLETIONS, ids, other) == model(PROMPTS, COMPLETIONS)
    assert [sum(value != 0 for value in row) <= n for row, n in zip(values, (3, 2, 1), strict=True)] == [True] * 3


def test_a_response_without_a_step_scores_0(folder):
    model = ProcessModel.load(folder, device="cpu")
    assert model(["a", "a"], [" \n ", "b"])[0] == 0.0
    end = chat.end_of_turn_id(model.tokenizer)
    caught: list[list[list[float]]] = []
    model(["a"], [""], [[end]], model.tokenizer, caught.append)
    assert caught == [[[0.0]]]


def test_thinking_is_left_out(folder):
    model = ProcessModel.load(folder, device="cpu")
    answer = {"role": "assistant", "content": "one\ntwo"}
    thought = {**answer, "reasoning_content": "three\nfour"}
    asked = [{"role": "user", "content": "Count."}]
    assert model.step_probabilities([[*asked, thought]]) == model.step_probabilities([[*asked, answer]])


def test_an_outcome_model_reads_the_end_of_the_solution(tmp_path, tiny_model, tiny_tokenizer):
    folder = save(tmp_path / "orm", tiny_model, tiny_tokenizer, kind="outcome")
    model = ProcessModel.load(folder, device="cpu")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, model(PROMPTS, COMPLETIONS), strict=True):
        ids, _ = ends_by_offsets(model.tokenizer, prompt, completion)
        with torch.no_grad():
            logit = plain.score(plain.model(torch.tensor([ids[:-1]])).last_hidden_state[0, -1])  # <|im_end|>
        assert score == pytest.approx(torch.sigmoid(logit).item(), abs=1e-5)
    caught: list = []
    model(PROMPTS, COMPLETIONS, [[1]] * 3, model.tokenizer, caught.append)
    assert caught == []  # it has no steps to give


def test_folders_that_are_none_of_ours_are_refused(folder, tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(InputError, match=r"holds a process model; load it by reward_models\.ProcessModel\.load"):
        RewardModel.load(folder)
    reward = tmp_path / "reward_model"
    new_scalar_model(tiny_model, seed=0).save_pretrained(reward)
    tiny_tokenizer.save_pretrained(reward)
    with pytest.raises(InputError, match="holds no process model; train one"):
        ProcessModel.load(reward)
    about = json.loads((folder / "process.json").read_text())
    for change, says in [({"head": "many"}, "head: got 'many'; one of scalar, three_class"),
                         ({"separator": ""}, "separator and template_hash must be texts"),
                         ({"head": "three_class"}, "num_labels=1; expected a head of 3"),
                         ({"template_hash": "0" * 16}, "its chat template is not")]:  # fmt: skip
        (folder / "process.json").write_text(json.dumps(about | change))
        with pytest.raises(InputError, match=says):
            ProcessModel.load(folder)


def test_a_tokenizer_that_loses_the_separator_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    from tokenizers import normalizers

    chat.prepare_tokenizer(tiny_tokenizer)
    tiny_tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", " ")
    model = ProcessModel.load(save(tmp_path / "prm", tiny_model, tiny_tokenizer), device="cpu")
    with pytest.raises(InputError, match=r"separator '\\n': the tokenizer makes 1 steps of a solution's 3; choose"):
        model(PROMPTS[:1], COMPLETIONS[:1])
