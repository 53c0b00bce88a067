"""Moderation models: the loss by a slow loop, unknown labels, windows, an encoder's mean, saving, what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from reference.tiny_chain import save_encoder
from transformers import AutoModelForSequenceClassification, TrainerCallback

from reward_models import ModerationConfig, ModerationModel, ModerationTrainer, RewardModel, losses
from reward_models.head_fit import RIDGES, fit_head
from reward_models.labelled_texts import LabelledText
from reward_models.moderation import OVERLAP, About, Category, read_states, windows_of
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.loading import load_tokenizer

LONG = pytest.mark.long
WORDS = ("cat", "dog", "bird", "tree", "house")


@pytest.fixture
def bert_folder(tmp_path):
    return save_encoder(tmp_path / "bert", WORDS)


@pytest.fixture
def llama_folder(tmp_path, tiny_model, tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    tiny_model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def texts(count: int, seed: int = 0, longest: int = 12) -> list[LabelledText]:
    """Make texts of words: `dog` is there or not; `bird` is unknown in every third text."""
    rng, records = np.random.default_rng(seed), []
    for number in range(count):
        words = rng.choice(WORDS, rng.integers(1, longest)).tolist()
        labels = {"dog": "dog" in words} | ({} if number % 3 == 0 else {"bird": "bird" in words})
        records.append(LabelledText([{"role": "user", "content": " ".join(words)}], labels))
    return records


def config(folder, **changes) -> ModerationConfig:
    defaults = {"texts_per_batch": 4, "microbatch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "epochs": 1}
    defaults |= {"save_steps": 0, "max_length": 24, "reads": "trunk", "trains": "all"}
    return ModerationConfig(output_dir=str(folder), **(defaults | changes))


def logits_by_hand(folder, tokenizer, text: str, size: int = 24) -> np.ndarray:
    """The head on the mean of the last states, of length 1, by transformers' own modules; of windows the highest."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, room = [], size - 2
    start = 0
    while True:
        window = [tokenizer.cls_token_id, *ids[start : start + room], tokenizer.sep_token_id]
        with torch.no_grad():
            states = plain.bert(torch.tensor([window])).last_hidden_state[0]
            mean = states.mean(0)
            found.append(plain.classifier(mean / mean.norm()).double().numpy())
        if start + room >= len(ids):
            return np.max(found, axis=0)
        start += room - min(OVERLAP, room // 4)


def test_the_loss_is_that_of_a_slow_loop_over_known_labels(tmp_path, bert_folder):
    """An unknown label that is taken for 0, a window that is left out, another pooling: all change it."""
    held_out = texts(9, 1, longest=50)
    args = config(tmp_path / "out", label_smoothing=0.1)
    trainer = ModerationTrainer(bert_folder, args=args, train_dataset=texts(8), eval_dataset=held_out)
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    tokenizer, total, right = trainer.processing_class, [], []
    for record in held_out:
        logits = logits_by_hand(tmp_path / "saved", tokenizer, record.text)
        for z, name in zip(logits, ("dog", "bird"), strict=True):
            if name in record.labels:
                signed = z if record.labels[name] else -z
                total.append(0.9 * math.log(1 + math.exp(-signed)) + 0.1 * math.log(1 + math.exp(signed)))
                right.append((z > 0) == record.labels[name])
    assert len(total) == 9 + 6
    assert max(len(row) for row in trainer.eval_dataset["windows"]) > 1
    assert metrics["eval_loss"] == pytest.approx(np.mean(total), abs=1e-5)
    assert metrics["eval_label_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)


def test_unknown_labels_have_no_gradient():
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = losses.category_loss(logits, torch.tensor([[1, -1], [0, 1]]), weights=torch.tensor([1.0, 2.0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) * (1 + 2 + 2) / 3)
    assert logits.grad[0, 1] == 0
    assert logits.grad.flatten().tolist() == pytest.approx([-0.5 / 3, 0.0, 1.0 / 3, -1.0 / 3], abs=1e-6)


@pytest.mark.parametrize("trunk", ["bert", "llama"])
def test_the_head_is_the_minimum_on_a_trunk_that_stays(tmp_path, request, trunk):
    """At the minimum, the gradient of the known labels' losses is the ridge's: scaled weight times ridge, and 0 of the
    bias. A label that is unknown has none."""
    folder, records = request.getfixturevalue(f"{trunk}_folder"), texts(30, longest=8)
    changes = {"trains": "head", "epochs": 1, "max_length": 96 if trunk == "llama" else 24}
    trainer = ModerationTrainer(folder, args=config(tmp_path / "out", **changes), train_dataset=records)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    head = trainer.model.classifier if trunk == "bert" else trainer.model.score
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if p is not head.weight
               and p is not getattr(head, "bias", None))  # fmt: skip
    trainer.save_model()
    model = ModerationModel.load(tmp_path / "out", device="cpu")
    windows = [
        ids
        for record in records
        for ids in windows_of(model.tokenizer, record.text, trainer._max_length, trunk == "bert")
    ]
    states = read_states(model.model, windows, 0, 999).double().numpy()
    length = np.linalg.norm(states, axis=1).mean()
    logits = model.logits([record.text for record in records])
    for n, name in enumerate(("dog", "bird")):
        known = np.array([name in record.labels for record in records])
        labels = np.array([record.labels.get(name, False) for record in records], dtype=float)
        wrong = np.where(known, labels - 1 / (1 + np.exp(-logits[:, n])), 0.0)
        assert abs(wrong.sum()) < 1e-3
        pull = wrong @ (states / length)
        scaled = head.weight[n].detach().double().numpy() * length
        ridge = float((pull @ scaled) / (scaled @ scaled))
        assert min(abs(ridge - one) / one for one in RIDGES) < 0.02
        assert pull == pytest.approx(ridge * scaled, abs=2e-3)


def test_of_a_positive_text_the_window_that_shows_it_counts():
    """Windows of a text with the category: one has it, the others look like any text without it."""
    rng = np.random.default_rng(0)
    states, texts_of = rng.normal(size=(400, 6)), np.repeat(np.arange(100), 4)
    labels = (np.arange(100) % 2).astype(float)[:, None]
    states[np.flatnonzero(labels[:, 0] > 0) * 4 + rng.integers(0, 4, 50), 0] += 4
    fitted = fit_head(states, texts_of, labels, np.ones(100))
    logits = (states @ fitted.weight.T + fitted.bias).reshape(100, 4)
    highest = logits.max(1)
    assert ((highest > 0) == (labels[:, 0] > 0)).mean() > 0.93
    assert np.abs(fitted.weight[0, 1:]).max() < 0.3 * fitted.weight[0, 0]


class FirstStep(TrainerCallback):
    """Keeps the gradient of the first optimizer step, as the optimizer gets it, and ends the run there."""

    class Reached(Exception):
        pass

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        raise self.Reached


def gradients(folder, model, records, **changes) -> dict[str, torch.Tensor]:
    size, first = len(records), FirstStep()
    settings = {"texts_per_batch": size, "microbatch_size": size, "max_grad_norm": 0, "preflight": False}
    args = config(folder, **(settings | changes))
    with pytest.raises(FirstStep.Reached):
        ModerationTrainer(model, args=args, train_dataset=records, callbacks=[first]).train()
    return first.gradients


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["bert", pytest.param("llama", marks=LONG)])
def test_micro_batches_and_order_change_no_gradient(tmp_path, request, trunk):
    folder, records = request.getfixturevalue(f"{trunk}_folder"), texts(6, longest=40)
    plain = gradients(tmp_path / "a", folder, records)
    assert not any("pooler" in name for name in plain)
    for name, other in {
        "micro": gradients(tmp_path / "b", folder, records, microbatch_size=1),
        "order": gradients(tmp_path / "c", folder, records[::-1], microbatch_size=3),
    }.items():
        assert other.keys() == plain.keys()
        for key, gradient in plain.items():
            scale = float(gradient.abs().max())
            assert float((other[key] - gradient).abs().max()) <= 1e-5 * scale + 1e-8, (name, key)


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=LONG), pytest.param("lora", marks=LONG)])
def test_a_saved_model_says_what_training_computes(tmp_path, request, kind):
    folder = request.getfixturevalue("llama_folder" if kind == "llama" else "bert_folder")
    changes = {"lora_rank": 4} if kind == "lora" else {}
    trainer = ModerationTrainer(folder, args=config(tmp_path / "out", **changes), train_dataset=texts(8))
    trainer.train()
    trainer.save_model()
    held_out = texts(7, 3, longest=60)
    batch = trainer.collator()([trainer.encoded(held_out, "eval_dataset")[n] for n in range(7)])
    with torch.no_grad():
        expected = trainer.scores(trainer.model.eval(), batch)
    model = ModerationModel.load(tmp_path / "out", device="cpu", tokens_per_microbatch=50)
    assert model.categories == ["dog", "bird"]
    found = model.logits([record.text for record in held_out])
    assert found == pytest.approx(expected.double().numpy(), abs=1e-5)
    if kind == "bert":
        by_hand = [logits_by_hand(tmp_path / "out", model.tokenizer, record.text) for record in held_out]
        assert found == pytest.approx(np.array(by_hand), abs=1e-5)
    with pytest.raises(InputError, match="holds a moderation model"):
        RewardModel.load(tmp_path / "out")


@pytest.mark.parametrize("trunk", ["bert", "llama"])
def test_a_model_objects_head_is_fitted_or_goes_on(tmp_path, request, trunk):
    """trains=head fits it, whatever it was; with trains=all a loaded model begins with the logits that it had."""
    folder, records = request.getfixturevalue(f"{trunk}_folder"), texts(30, longest=8)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    found = {}
    for name, model in (("folder", folder), ("object", plain)):
        args = config(tmp_path / name, trains="head", preflight=False)
        trainer = ModerationTrainer(model, args=args, train_dataset=records, processing_class=load_tokenizer(folder))
        trainer.train()
        trainer.save_model()
        found[name] = ModerationModel.load(tmp_path / name, device="cpu")
    said = [record.text for record in records]
    assert found["object"].logits(said) == pytest.approx(found["folder"].logits(said), abs=1e-5)
    model = found["folder"]
    assert (trunk == "llama") == any(category.offset for category in model.about.categories)
    args = config(tmp_path / "on", categories=["dog", "bird"])
    trainer = ModerationTrainer(model.model, args=args, train_dataset=records, processing_class=model.tokenizer)
    with torch.no_grad():
        begun = trainer.scores(trainer.model.eval(), trainer.collator()(list(trainer.train_dataset)))
    assert begun.double().numpy() == pytest.approx(model.logits(said), abs=1e-5)
    with pytest.raises(
        InputError, match="categories: the data's are bird, dog, the model's dog, bird; name the model's"
    ):
        ModerationTrainer(model.model, args=config(tmp_path / "on", categories=["bird", "dog"]), train_dataset=records,
                          processing_class=model.tokenizer)  # fmt: skip


@LONG
def test_words_are_learnt_and_judged(tmp_path, bert_folder):
    args = config(tmp_path / "out", epochs=30, learning_rate=1e-2, texts_per_batch=16, microbatch_size=16)
    trainer = ModerationTrainer(bert_folder, args=args, train_dataset=texts(48))
    trainer.train()
    trainer.save_model()
    model = ModerationModel.load(tmp_path / "out", device="cpu")
    seen, other = model(["cat dog tree", "cat tree house"])
    assert seen.flagged["dog"]
    assert not other.flagged["dog"]
    assert seen.scores["dog"] > 0.8 > 0.2 > other.scores["dog"]
    strict = model.with_categories([Category(name="dog", threshold=1.1), Category(name="bird")], 0.01)
    assert not strict(["cat dog tree"])[0].flagged["dog"]
    # the last word of a text of many windows counts as the first does
    assert model(["cat tree " * 40 + "dog"])[0].flagged["dog"]
    assert model([]) == []
    with pytest.raises(InputError, match=r"texts: got one text, .*; hand in a list of them"):
        model("dog")


def test_the_words_logits_are_averaged_with_the_trunks(tmp_path, bert_folder):
    trainer = ModerationTrainer(bert_folder, args=config(tmp_path, reads="trunk_and_words"), train_dataset=texts(12))
    trainer.save_model()
    model, held_out = ModerationModel.load(tmp_path, device="cpu"), [record.text for record in texts(5, 3)]
    trunk = ModerationModel(model.model, model.tokenizer, model.about)
    assert model.words.categories == ("dog", "bird")
    expected = (trunk.logits(held_out) + model.words.logits(held_out)) / 2
    assert model.logits(held_out) == pytest.approx(expected, abs=1e-9)
    assert np.abs(trunk.logits(held_out) - expected).max() > 0.1
    same = model.with_categories(model.about.categories, None)
    assert same.logits(held_out) == pytest.approx(expected, abs=1e-9)
    (tmp_path / "words.npz").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match=r"words\.npz: no bag of words could be read"):
        ModerationModel.load(tmp_path)


def test_a_labeler_who_weighs_nothing_teaches_nothing(tmp_path, bert_folder):
    """Neither the head nor the bag of words, though most texts are theirs, and wrong."""
    good = [LabelledText(record.prompt, record.labels, {"labeler": "good"}) for record in texts(20)]
    wrong = {record.text: {name: not label for name, label in record.labels.items()} for record in texts(60, 1)}
    bad = [LabelledText([{"role": "user", "content": text}], wrong[text], {"labeler": "bad"}) for text in wrong]
    models = []
    for name, records in (("alone", good), ("both", [*bad, *good])):
        given = {"trains": "head", "reads": "trunk_and_words", "preflight": False, "learning_rate": None}
        args = config(tmp_path / name, labeler_weights={"good": 1.0, "bad": 0.0}, categories=["dog", "bird"], **given)
        trainer = ModerationTrainer(bert_folder, args=args, train_dataset=records)
        trainer.train()
        trainer.save_model()
        models.append(ModerationModel.load(tmp_path / name, device="cpu"))
    said = [record.text for record in texts(9, 2)]
    assert models[1].words.logits(said) == pytest.approx(models[0].words.logits(said), abs=1e-9)
    assert models[1].logits(said) == pytest.approx(models[0].logits(said), abs=1e-5)


@pytest.mark.parametrize("trainer", [pytest.param("new", marks=LONG), "same"])
@pytest.mark.parametrize("trunk", [pytest.param("bert", marks=LONG), "llama"])
def test_resuming_is_exact(tmp_path, request, trunk, trainer):
    """The head is not fitted again: to the trained trunk of the same object it would be another."""
    folder, records = request.getfixturevalue(f"{trunk}_folder"), texts(16)
    size = {"max_length": 96 if trunk == "llama" else 24}
    whole = ModerationTrainer(folder, args=config(tmp_path / "whole", **size), train_dataset=records)
    whole.train()
    halves = config(tmp_path / "halves", save_steps=2, **size)
    first = ModerationTrainer(folder, args=halves, train_dataset=records)
    log = first.log

    class Stop(Exception):
        pass

    def stopping(*given, **more):
        if first.state.global_step == 3:
            raise Stop
        log(*given, **more)

    first.log = stopping
    with pytest.raises(Stop):
        first.train()
    first.log = log
    second = first if trainer == "same" else ModerationTrainer(folder, args=halves, train_dataset=records)
    second.fit_head = None
    second.train(resume_from_checkpoint=True)
    assert second.about == whole.about
    assert bool(whole.offsets.any()) == (trunk == "llama")
    for (name, one), other in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other), name


# ------------------------------------------------------------------------------------------------ windows


def test_windows_hold_every_token_and_overlap(bert_folder):
    tokenizer = load_tokenizer(bert_folder)
    words = [WORDS[n % 5] for n in range(100)]
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    for size in (16, 24, 64):
        windows = windows_of(tokenizer, " ".join(words), size, True)
        assert {(w[0], w[-1]) for w in windows} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
        assert max(map(len, windows)) == size
        room, step = size - 2, size - 2 - min(OVERLAP, (size - 2) // 4)
        assert [w[1:-1] for w in windows] == [ids[n * step : n * step + room] for n in range(len(windows))]
        assert (len(windows) - 1) * step + room >= 100 > (len(windows) - 2) * step + room
    assert windows_of(tokenizer, " ".join(words[:14]), 16, True) == [[2, *ids[:14], 3]]


def test_control_tokens_in_a_text_stay_text(bert_folder, llama_folder):
    tokenizer = load_tokenizer(bert_folder)
    (window,) = windows_of(tokenizer, "cat [SEP] dog", 24, True)
    assert window.count(tokenizer.sep_token_id) == 1
    tokenizer = load_tokenizer(llama_folder)
    (window,) = windows_of(tokenizer, "cat<|im_end|>dog", 64, False)
    assert window.count(chat.end_of_turn_id(tokenizer)) == 1
    assert window[-1] == chat.end_of_turn_id(tokenizer)


# ------------------------------------------------------------------------------------------------ what is refused


def test_mistakes(tmp_path, bert_folder):
    with pytest.raises(InputError, match="categories: no text has a label of cow"):
        ModerationTrainer(bert_folder, args=config(tmp_path / "a", categories=["cow"]), train_dataset=texts(4))
    same = [LabelledText(record.prompt, {"dog": True}) for record in texts(6)]
    trainer = ModerationTrainer(bert_folder, args=config(tmp_path / "b"), train_dataset=same)
    with pytest.raises(InputError, match="every known label of a category says the same"):
        trainer.train()
    with pytest.raises(InputError, match="holds no moderation model"):
        ModerationModel.load(bert_folder)
    with pytest.raises(InputError, match="name one or more columns, each once"):
        config(tmp_path, categories=["a", "a"])
    for name, value in (("lora_rank", 4), ("eval_steps", 2), ("label_smoothing", 0.1)):
        with pytest.raises(InputError, match=f"{name}={value}: with trains=head no step is taken; set trains to all"):
            config(tmp_path, trains="head", **{name: value})


def test_a_damaged_folder_is_named(tmp_path):
    about = About(categories=(Category(name="a", scale=2.0, threshold=0.3),), max_length=24)
    about.save(tmp_path)
    assert About.read(tmp_path) == about
    for change in ({"scale": None}, {"threshold": float("nan")}, {"extra": 1}):
        content = json.loads((tmp_path / "categories.json").read_text())
        content["categories"] = [content["categories"][0] | change]
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "categories.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"categories\.json"):
            About.read(tmp_path / "other")
