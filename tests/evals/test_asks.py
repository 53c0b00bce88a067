"""Choices: a local model's probabilities against whole sequences, a server's tokens by hand, the strict parser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from reference.families import new_model

from rlhf import chat
from rlhf.errors import InputError, RunStopped
from rlhf.evals import asks
from rlhf.evals.asks import (
    Answered,
    LocalModel,
    NoAnswer,
    OverTheWire,
    Service,
    choice_tokens,
    named_letter,
    read_tokens,
)
from rlhf.evals.local import batches


@pytest.fixture
def local(tiny_model, tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    tiny_model.config.max_position_embeddings = 4096
    return LocalModel(tiny_model, tiny_tokenizer)


def sequence_probability(local: LocalModel, question: str, tokens: tuple[int, ...]) -> float:
    """The probability of these tokens behind the generation prompt, from one row without padding."""
    ids = chat.encode_prompt(local.tokenizer, [{"role": "user", "content": question}])
    with torch.no_grad():
        logits = local.model(torch.tensor([[*ids, *tokens]])).logits[0].double().log_softmax(-1)
    return math.exp(sum(float(logits[len(ids) - 1 + n, token]) for n, token in enumerate(tokens)))


@pytest.mark.parametrize("choices", [["A", "B", "C"], ["Paris", "Count to", "zebra!"], ["1", "10", "7"]])
@pytest.mark.parametrize("budget", [1, 16384])
def test_a_choices_probability_is_that_of_all_its_tokens(local, choices, budget):
    """Each way of writing a choice, summed; and one that begins another loses what the other gets."""
    local.tokens_per_microbatch = budget
    questions = ["How many?", "A much longer question, which fills a row of its own with more words than the others?"]
    before, ways = choice_tokens(local.tokenizer, choices)
    assert before == []
    for question, answer in zip(questions, local(questions, choices), strict=True):
        shares = [0.0] * len(choices)
        for way, index in ways.items():
            assert local.tokenizer.decode(list(way)).strip() == choices[index]
            longer = sum(sequence_probability(local, question, w) for w in ways
                         if w[: len(way)] == way and len(w) > len(way))  # fmt: skip
            shares[index] += sequence_probability(local, question, way) - longer
        assert isinstance(answer, Answered)
        assert answer.together == pytest.approx(sum(shares), rel=1e-4)
        assert answer.probabilities == pytest.approx([share / sum(shares) for share in shares], abs=1e-5)
        assert answer.best == max(range(3), key=shares.__getitem__)


def test_a_digit_that_begins_a_number_is_a_way_inside_another(local):
    ways = choice_tokens(local.tokenizer, ["1", "10"])[1]
    one = next(way for way, index in ways.items() if index == 0)
    ten = next(way for way, index in ways.items() if index == 1)
    assert ten[: len(one)] == one, "or the test above proves nothing of it"


def test_a_whole_conversation_and_what_it_costs(local):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A or B?"}]
    (whole,) = local([turns], ["A", "B"])
    (alone,) = local(["A or B?"], ["A", "B"])
    assert whole != alone
    assert local.spent.calls == 2
    assert local.spent.tokens == sum(len(chat.encode_prompt(local.tokenizer, t)) for t in (turns, turns[1:]))
    assert local([], ["A", "B"]) == []


def test_choices_that_cannot_be_told_apart(local):
    for choices in ([], ["A", ""], ["A", "A"]):
        with pytest.raises(InputError):
            local(["?"], choices)


def test_batches_by_hand():
    assert batches([2, 9, 3, 4, 1], 9) == [[1], [3, 2], [0, 4]]
    assert batches([], 10) == []
    assert batches([2, 9, 2, 4, 2], 99, pads=False) == [[1], [3], [0, 2, 4]]
    assert batches([2, 9, 2, 4, 2], 4, pads=False) == [[1], [3], [0, 2], [4]]


@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_the_other_questions_of_a_batch_change_no_answer(tiny_tokenizer, family):
    """RWKV reads the padding before a shorter row as text."""
    chat.prepare_tokenizer(tiny_tokenizer)
    local, questions = LocalModel(new_model(family, 0.0), tiny_tokenizer), ["A or B?", "A or B, or " * 3, "B or A?"]
    alone = [local([question], ["A", "B"])[0].probabilities for question in questions]
    assert [answer.probabilities for answer in local(questions, ["A", "B"])] == [
        pytest.approx(probabilities, abs=1e-5) for probabilities in alone
    ]


# ------------------------------------------------------------------------------------------------ over the wire


def token(text: str, **top: float) -> SimpleNamespace:
    """A token whose own and other probabilities are given by text; "_" stands for a space."""
    shares = {name.replace("_", " "): share for name, share in top.items()}
    return SimpleNamespace(text=text, logprob=math.log(shares[text]), top={t: math.log(p) for t, p in shares.items()})


def bare(text: str, probability: float, **top: float) -> SimpleNamespace:
    return SimpleNamespace(text=text, logprob=math.log(probability), top={t: math.log(p) for t, p in top.items()})


def test_letters_are_read_from_the_first_token_with_and_without_a_space():
    assert read_tokens([token("B", A=0.3, B=0.5, _A=0.1, Hm=0.1)], ["A", "B"]) == pytest.approx([0.4, 0.5])
    assert read_tokens([token("Sorry", Sorry=0.9, A=0.1)], ["A", "B"]) == pytest.approx([0.1, 0.0])
    assert read_tokens([], ["A", "B"]) == [0.0, 0.0]


def test_a_number_that_begins_another_is_followed():
    first = bare("1", 0.6, **{"1": 0.6, "2": 0.3})
    choices = ["1", "2", "10"]
    assert read_tokens([first, bare("0", 0.2, **{"0": 0.2})], choices) == pytest.approx([0.6 * 0.8, 0.3, 0.6 * 0.2])
    assert read_tokens([first], choices) == pytest.approx([0.6, 0.3, 0.0]), "the answer ends there"


def test_brackets_before_the_letter_are_followed():
    tokens = [bare("[[", 0.8), bare("A", 0.9, A=0.9, B=0.1), bare("]]", 1.0)]
    assert read_tokens(tokens, ["[[A]]", "[[B]]"]) == pytest.approx([0.72, 0.08])


@dataclass
class Server:
    """A client whose server answers by a table: question -> (text, tokens)."""

    table: dict
    knows_logprobs: bool = True
    asked: list = field(default_factory=list)

    def chat(self, messages, *, temperature, max_tokens, logprobs=False, top_logprobs=0):
        assert temperature == 0
        self.asked.append(logprobs)
        if logprobs and not self.knows_logprobs:
            raise InputError("http://x: 400: unknown field logprobs")
        text, tokens = self.table[messages[-1]["content"]]
        if isinstance(text, Exception):
            raise text
        return [SimpleNamespace(text=text, tokens=tokens if logprobs else ())]


def test_a_server_with_probabilities_and_a_reply_outside_the_format():
    server = Server({
        "one": ("A", [token("A", A=0.75, B=0.25)]),
        "two": ("The answer is B.", [token("The", The=0.99, A=0.01)]),
        "three": ("Hard to say", [token("Hard", Hard=1.0)]),
        "four": (RunStopped("gone"), ()),
    })  # fmt: skip
    one, two, three, four = OverTheWire(server, at_once=1)(["one", "two", "three", "four"], ["A", "B"])
    assert one.probabilities == pytest.approx((0.75, 0.25))
    assert one.together == pytest.approx(1.0)
    assert two == Answered((0.0, 1.0), 1.0, "The answer is B."), "the letters have a hundredth: the text is parsed"
    assert isinstance(three, NoAnswer)
    assert isinstance(four, RunStopped)


def test_a_server_that_is_gone_is_not_asked_to_the_end():
    server = Server({"one": ("A", [token("A", A=1.0)]), "gone": (RunStopped("gone"), ())})
    answers = OverTheWire(server, at_once=2)(["one", *["gone"] * 50, "one"], ["A", "B"])
    assert [str(answer) for answer in answers[1:]] == ["gone"] * 51
    assert len(server.asked) < 6
    one_bad = OverTheWire(server, at_once=1)(["gone", "one"], ["A", "B"])
    assert len(one_bad) == 2
    server.asked.clear()
    now_and_then = OverTheWire(server, at_once=2)(["one", "gone"] * 20, ["A", "B"])
    assert len(server.asked) == 40
    assert [isinstance(answer, RunStopped) for answer in now_and_then] == [False, True] * 20


def test_a_server_without_probabilities_is_asked_once_for_them():
    server = Server({"one": ("B", ()), "two": ("A or B", ())}, knows_logprobs=False)
    ask = OverTheWire(server, at_once=1)
    one, two = ask(["one", "two"], ["A", "B"])
    assert one.probabilities == (0.0, 1.0)
    assert isinstance(two, NoAnswer)
    assert server.asked == [True, False, False]
    assert (ask.spent.calls, ask.spent.tokens) == (2, None)


@pytest.mark.parametrize("sends", ["probabilities", "none", "a refusal"])
def test_over_http_with_the_client_of_this_library(sends):
    """The letters' probabilities, or the parsed reply of a server that has none to give or refuses to be asked."""
    pytest.importorskip("fastapi")
    from reference.served import served
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from rlhf.run.http import HttpConfig

    async def models(request):
        return JSONResponse({"data": [{"id": "mine"}]})

    async def chat_completions(request):
        asked = await request.json()
        if sends == "a refusal" and "logprobs" in asked:
            return JSONResponse({"error": {"message": "unknown field logprobs"}}, status_code=400)
        top = [{"token": letter, "logprob": math.log(share)} for letter, share in (("B", 0.6), (" A", 0.2))]
        content = [{"token": "B", "logprob": math.log(0.6), "top_logprobs": top}]
        logprobs = {"content": content} if sends == "probabilities" and asked.get("logprobs") else None
        message = {"role": "assistant", "content": "B."}
        return JSONResponse(
            {"choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}]}
        )

    answers = Route("/v1/chat/completions", chat_completions, methods=["POST"])
    app = Starlette(routes=[Route("/v1/models", models), answers])
    with served(app, HttpConfig()) as url:
        (answer,) = asks.load(url)(["Which?"], ["A", "B"])
    assert isinstance(answer, Answered), answer
    expected = ((0.25, 0.75), 0.8) if sends == "probabilities" else ((0.0, 1.0), 1.0)
    assert (answer.probabilities, answer.together) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert answer.text == "B."


def test_a_callable_and_what_none_can_be_made_of():
    ask = asks.load(lambda text: "A" if "yes" in text else "no idea")
    assert isinstance(ask, Service)
    one, two = ask(["yes", "no"], ["A", "B"])
    assert one.probabilities == (1.0, 0.0)
    assert isinstance(two, NoAnswer)
    with pytest.raises(InputError, match="is a int"):
        asks.load(7)


# ---------------------------------------------------------------------------------------------------- the parser


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("10", "10"), ("1", "1"), ("8.", "8"), ("Answer: 10", "10"), ("The answer is 10.", "10"), ("**8**", "8"),
        ("1.5", None), ("-1", None), ("Answer: 1.5", None), ("100", None), ("7/10", None), ("1 or 8", None),
        ("8, 10", None), ("about 8", None), ("", None),
    ],
)  # fmt: skip
def test_numbers_as_choices(reply, choice):
    if choice is None:
        with pytest.raises(NoAnswer):
            named_letter(reply, ["1", "7", "8", "10"])
    else:
        assert named_letter(reply, ["1", "7", "8", "10"]) == choice


@pytest.mark.parametrize("reply", ["A or B", "A, B", "A/B", "Answer: A and B", "A-ok", "both", "A & B"])
def test_a_reply_that_names_two_names_none(reply):
    with pytest.raises(NoAnswer, match="names none of A, B, C"):
        named_letter(reply, "ABC")


def test_words_and_brackets_as_choices():
    assert named_letter("[[B]]", ["[[A]]", "[[B]]"]) == "[[B]]"
    assert named_letter("Yes, it did.", ["Yes", "No"]) == "Yes"
    with pytest.raises(NoAnswer):
        named_letter("Yesterday.", ["Yes", "No"])
