"""The reward trainer: its loss and data, that no batching changes a result, that resuming is exact."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from reward_models import losses
from reward_models.encoding import RankingCollator, encode_rankings
from reward_models.scoring import RewardModel
from reward_models.trainer import RewardConfig, RewardTrainer
from rlhf import chat
from rlhf.errors import InputError
from rlhf.rows.records import Ranking, read_rankings

GOOD, BAD = "The capital is Paris.", "dog dog dog"


@pytest.fixture
def model_folder(tmp_path, tiny_model, tiny_tokenizer):
    """Save a causal language model with a tokenizer that is ready for chat."""
    chat.prepare_tokenizer(tiny_tokenizer)
    folder = tmp_path / "sft"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def rankings(count: int, seed: int = 0) -> list[Ranking]:
    """Make rankings of 2 to 4 responses per prompt: the more often a response has `Paris`, the better; some are
    ties."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        times = rng.integers(0, 4, size=2 + number % 3)
        times[0], times[1] = 3, 0
        responses = tuple(
            "one " * int(rng.integers(1, 6)) + "Paris " * int(t) + f"end {i}" for i, t in enumerate(times)
        )
        prompt = [{"role": "user", "content": f"Question {seed} {number}?" + " please" * int(rng.integers(0, 9))}]
        records.append(Ranking(prompt, responses, tuple(float(-t) for t in times)))
    return records


def config(folder, **changes) -> RewardConfig:
    defaults: dict = {"prompts_per_batch": 4, "microbatch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    return RewardConfig(output_dir=str(folder), **(defaults | {"save_steps": 0, "normalizer_samples": 16} | changes))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_loss_is_that_of_a_slow_loop(tmp_path, model_folder):
    records = rankings(5)
    trainer = RewardTrainer(
        model_folder, args=config(tmp_path / "out"), train_dataset=records, eval_dataset=rankings(5, 1)
    )
    metrics = trainer.evaluate()
    tokenizer, losses, right, margins = trainer.processing_class, [], [], []
    for ranking in rankings(5, 1):
        scores = []
        for text in ranking.responses:
            ids, _ = chat.encode_conversation(tokenizer, [*ranking.prompt, {"role": "assistant", "content": text}])
            with torch.no_grad():  # alone, unpadded: the plain forward of transformers
                scores.append(trainer.model(torch.tensor([ids])).logits.item())
        pairs = [(scores[i], scores[j]) for i, j in ranking.pairs()]
        losses.append(np.mean([math.log(1 + math.exp(b - a)) for a, b in pairs]))
        right += [a > b for a, b in pairs]
        margins += [a - b for a, b in pairs]
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)
    assert metrics["eval_margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert (metrics["eval_pairs"], metrics["eval_prompts"]) == (len(right), 5)


def test_the_first_steps_logged_loss_is_that_of_the_whole_batch(tmp_path, model_folder):
    records = rankings(4)
    trainer = RewardTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=records)
    expected = trainer.evaluate(records)
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert logged["loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)  # the log is rounded
    assert logged["accuracy"] == pytest.approx(expected["eval_accuracy"])
    assert logged["margin"] == pytest.approx(expected["eval_margin"], abs=1e-5)


@pytest.mark.slow
def test_tiny_separable_data_is_learnt(tmp_path, model_folder):
    trainer = RewardTrainer(
        model_folder, args=config(tmp_path / "out", epochs=6, learning_rate=3e-3), train_dataset=rankings(40)
    )
    trainer.train()
    assert trainer.evaluate(rankings(40))["eval_accuracy"] == 1.0
    assert trainer.evaluate(rankings(20, seed=5))["eval_accuracy"] > 0.9


def test_normalized_training_scores_have_mean_0_and_spread_1(tmp_path, model_folder):
    records = rankings(8)
    trainer = RewardTrainer(
        model_folder, args=config(tmp_path / "out", normalizer_samples=10_000), train_dataset=records
    )
    trainer.train()
    trainer.save_model()
    model = RewardModel.load(tmp_path / "out")
    conversations = [[*r.prompt, {"role": "assistant", "content": text}] for r in records for text in r.responses]
    scores = model.score(conversations)
    assert trainer.normalizer.count == len(conversations)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_a_saved_model_scores_as_it_did_in_training(tmp_path, model_folder):
    held_out = rankings(6, seed=3)
    trainer = RewardTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=rankings(8))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    before = RewardModel(trainer.model, trainer.processing_class, trainer.normalizer)
    after = RewardModel.load(tmp_path / "saved")
    conversations = [[*r.prompt, {"role": "assistant", "content": text}] for r in held_out for text in r.responses]
    assert torch.equal(before.score(conversations), after.score(conversations))
    assert after.normalizer == trainer.normalizer != type(trainer.normalizer)()


@pytest.mark.slow
def test_resuming_is_exact(tmp_path, model_folder):
    records = rankings(16)
    whole = RewardTrainer(model_folder, args=config(tmp_path / "whole"), train_dataset=records)
    whole.train()
    assert whole.state.global_step == 4

    class Stop(Exception):
        pass

    def stop_at_2(trainer):
        log = trainer.log

        def stopping(*args, **kwargs):
            if trainer.state.global_step == 3:
                raise Stop
            log(*args, **kwargs)

        trainer.log = stopping

    args = config(tmp_path / "halves", save_steps=2)
    first = RewardTrainer(model_folder, args=args, train_dataset=records)
    stop_at_2(first)
    with pytest.raises(Stop):
        first.train()
    second = RewardTrainer(model_folder, args=args, train_dataset=records)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(second.model)[name], weight), name
    assert second.normalizer == whole.normalizer
    last = [next(log for log in t.state.log_history if log["step"] == 4) for t in (whole, second)]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[0]["accuracy"] == last[1]["accuracy"]


def test_resuming_where_there_is_no_checkpoint_starts_from_the_beginning(tmp_path, model_folder):
    trainer = RewardTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=rankings(4))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rank", "peft_config", "adapter"])
def test_a_lora_head_is_trained_and_survives(tmp_path, model_folder, tiny_tokenizer, how):
    model, extra = model_folder, {}
    if how == "rank":
        args = config(tmp_path / "out", lora_rank=4, lora_alpha=8.0, save_steps=1)
    else:
        args = config(tmp_path / "out", save_steps=1)
    if how == "peft_config":
        extra = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}  # no task type, no modules_to_save
    if how == "adapter":
        model = sft_adapter(tmp_path, model_folder, tiny_tokenizer)
    trainer = RewardTrainer(model, args=args, train_dataset=rankings(8), **extra)
    assert isinstance(trainer.model, PeftModel)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("score.modules_to_save" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    assert not any("base_layer" in name or "embed_tokens" in name or "original_module" in name for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = RewardModel.load(tmp_path / "saved")
    conversations = [[*r.prompt, {"role": "assistant", "content": t}] for r in rankings(4, 9) for t in r.responses]
    here = RewardModel(trainer.model, trainer.processing_class, trainer.normalizer)
    assert torch.equal(loaded.score(conversations), here.score(conversations))
    resumed = RewardTrainer(model, args=args, train_dataset=rankings(8), **extra)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for name, weight in weights(resumed.model).items():
        assert torch.equal(weight, after[name]), name


def sft_adapter(tmp_path, base, tokenizer):
    """Make a LoRA adapter of `base`, as supervised fine-tuning saves one."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_continued_from_its_own_weights(tmp_path, model_folder, tiny_tokenizer):
    adapter = sft_adapter(tmp_path, model_folder, tiny_tokenizer)
    trainer = RewardTrainer(adapter, args=config(tmp_path / "out"), train_dataset=rankings(4))
    from peft.utils import load_peft_weights

    saved = load_peft_weights(str(adapter), device="cpu")
    found = weights(trainer.model)
    for name, weight in saved.items():
        key = name.replace(".weight", ".default.weight")
        assert torch.equal(found[key], weight), name


def test_model_objects(tmp_path, tiny_model, tiny_tokenizer, model_folder):
    causal_before = weights(tiny_model)
    trainer = RewardTrainer(
        tiny_model, args=config(tmp_path / "a"), train_dataset=rankings(4), processing_class=tiny_tokenizer
    )
    trainer.train()
    assert all(torch.equal(weight, causal_before[name]) for name, weight in weights(tiny_model).items())
    scalar = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    head = scalar.score.weight.detach().clone()
    trainer = RewardTrainer(
        scalar, args=config(tmp_path / "b"), train_dataset=rankings(4), processing_class=tiny_tokenizer
    )
    assert trainer.model is scalar
    assert torch.equal(scalar.score.weight, head)  # trained further, not begun anew
    with pytest.raises(InputError, match="save the model and pass its folder"):
        RewardTrainer(tiny_model, args=config(tmp_path / "c", lora_rank=4), train_dataset=rankings(4),
                      processing_class=tiny_tokenizer)  # fmt: skip


@pytest.mark.slow
def test_the_head_is_drawn_with_the_papers_spread(tmp_path, model_folder):
    drawn = [
        RewardTrainer(model_folder, args=config(tmp_path, seed=seed), train_dataset=rankings(4)).model.score.weight
        for seed in range(30)
    ]
    every = torch.stack([weight.detach() for weight in drawn])
    assert every.std().item() == pytest.approx(1 / math.sqrt(32 + 1), rel=0.1)


def test_dropout_is_off_but_a_lora_adapters_own(tmp_path, model_folder):
    changed = json.loads((model_folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (model_folder / "config.json").write_text(json.dumps(changed))
    trainer = RewardTrainer(
        model_folder, args=config(tmp_path, lora_rank=2, lora_dropout=0.25), train_dataset=rankings(4)
    )
    found = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert set(found.values()) == {0.25}
    assert all("lora_dropout" in name for name in found)
    attention = [m.attention_dropout for m in trainer.model.modules() if hasattr(m, "attention_dropout")]
    assert set(attention) == {0.0}


def test_overlong_rankings_are_counted_and_named(tmp_path, tiny_tokenizer, caplog):
    chat.prepare_tokenizer(tiny_tokenizer)
    records = rankings(3)
    long = Ranking([{"role": "user", "content": "A long story"}], ("word " * 200, "short"), (0.0, 1.0))
    with caplog.at_level(logging.WARNING):
        data = encode_rankings(tiny_tokenizer, [records[0], long, *records[1:]], 200, "train_dataset")
    assert data["row"][:] == [0, 2, 3]
    (message,) = [r.getMessage() for r in caplog.records]
    for part in ("left out 1 of 4 rankings", "2 ('A long story')", "max_length=200 tokens"):
        assert part in message
    with pytest.raises(InputError, match="nothing is left: raise max_length to"):
        encode_rankings(tiny_tokenizer, [long], 200, "train_dataset")


def test_ties_are_left_out_and_counted(tmp_path, tiny_tokenizer, caplog):
    chat.prepare_tokenizer(tiny_tokenizer)
    prompt = [{"role": "user", "content": "Hello?"}]
    tie, same = Ranking(prompt, ("a", "b"), (1.0, 1.0)), Ranking(prompt, ("a", "a"), (1.0, 2.0))
    with caplog.at_level(logging.WARNING):
        data = encode_rankings(tiny_tokenizer, [tie, *rankings(1), same], 200, "train_dataset")
    assert data["row"][:] == [1]
    assert "left out 2 of 3 rankings, all ties or identical texts" in caplog.text
    with pytest.raises(InputError, match="ties or identical"):
        encode_rankings(tiny_tokenizer, [tie, same], 200, "train_dataset")


def test_ranks_that_float32_cannot_tell_apart_are_pairs(tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    prompt = [{"role": "user", "content": "Hello?"}]
    for ranks in ((1_700_000_000, 1_700_000_001), (1e39, 1e40), (1, 2), (-2.5, -2.5 + 1e-9)):
        data = encode_rankings(tiny_tokenizer, [Ranking(prompt, ("a", "b"), ranks)], 200, "train_dataset")
        batch = RankingCollator(0)(list(data))
        better, worse = losses.ranked_pairs(batch["ranks"], batch["prompts"], batch["texts"])
        assert (better.tolist(), worse.tolist()) == ([0], [1])


def test_chosen_equal_to_rejected_everywhere_is_refused(tmp_path, model_folder):
    rows = [{"prompt": f"p{i}", "chosen": "same", "rejected": "same"} for i in range(3)]
    with pytest.raises(InputError, match="ties or identical"):
        RewardTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=rows)


def test_a_prompt_in_both_splits_is_refused(tmp_path, model_folder):
    with pytest.raises(InputError, match="in both"):
        RewardTrainer(model_folder, args=config(tmp_path), train_dataset=rankings(4), eval_dataset=rankings(1))


def test_encoded_rankings_keep_every_response_with_its_place(tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    prompt = [{"role": "user", "content": "Hello?"}]
    ranking = Ranking(prompt, ("worst", "tied", "best", "tied"), (9.0, 2.0, 1.0, 3.0), {"margin": 0.5})
    (row,) = encode_rankings(tiny_tokenizer, [ranking], 200, "x")
    batch = RankingCollator(pad_id=0)([row, row])
    texts = [chat.decode_response(tiny_tokenizer, ids[len(chat.encode_prompt(tiny_tokenizer, prompt)) :])
             for ids in (row["chosen_ids"], row["rejected_ids"], *row["other_ids"])]  # fmt: skip
    places = {"best": {0.0}, "tied": {1.0, 2.0}, "worst": {3.0}}
    assert sorted(texts) == sorted(ranking.responses)
    assert all(place in places[text] for text, place in zip(texts, row["ranks"], strict=True))
    assert sorted(row["ranks"]) == [0, 1, 2, 3]
    assert ranking.ranks[ranking.responses.index(texts[0])] < ranking.ranks[ranking.responses.index(texts[1])]
    assert batch["prompts"].tolist() == [0] * 4 + [1] * 4
    assert batch["margins"].tolist() == [0.5] * 8
    from reward_models.losses import ranked_pairs

    assert len(ranked_pairs(batch["ranks"], batch["prompts"], batch["texts"])[0]) == 2 * len(ranking.pairs()) == 10


def test_label_smoothing_and_margin_reach_the_loss(tmp_path, model_folder):
    records = rankings(4)
    smoothed = RewardTrainer(model_folder, args=config(tmp_path, label_smoothing=0.2), train_dataset=records)
    plain = RewardTrainer(model_folder, args=config(tmp_path), train_dataset=records)
    a, b = smoothed.evaluate(records), plain.evaluate(records)
    # -(1-e) log s(d) - e log s(-d) = -log s(d) + e d, mean over pairs, then prompts
    expected = b["eval_loss"] + 0.2 * prompt_mean_margin(plain, records)
    assert a["eval_loss"] == pytest.approx(expected, abs=1e-5)
    with_margin = [Ranking(r.prompt, r.responses, r.ranks, {"margin": 1.0}) for r in records]
    assert plain.evaluate(with_margin)["eval_loss"] > b["eval_loss"] + 0.3
    with pytest.raises(InputError, match="margin"):
        RewardTrainer(model_folder, args=config(tmp_path, label_smoothing=0.2), train_dataset=with_margin)


def prompt_mean_margin(trainer, records):
    model, means = RewardModel(trainer.model, trainer.processing_class), []
    for ranking in records:
        scores = model.score([[*ranking.prompt, {"role": "assistant", "content": t}] for t in ranking.responses])
        means.append(np.mean([(scores[i] - scores[j]).item() for i, j in ranking.pairs()]))
    return np.mean(means)


def test_evaluation_takes_at_most_so_many_prompts(tmp_path, model_folder):
    trainer = RewardTrainer(model_folder, args=config(tmp_path, max_eval_prompts=3), train_dataset=rankings(4),
                            eval_dataset=rankings(9, 2))  # fmt: skip
    assert trainer.evaluate()["eval_prompts"] == 3


def test_evaluating_while_training_changes_no_weight(tmp_path, model_folder):
    plain = RewardTrainer(model_folder, args=config(tmp_path / "a"), train_dataset=rankings(8))
    plain.train()
    watched = RewardTrainer(
        model_folder, args=config(tmp_path / "b", eval_steps=1), train_dataset=rankings(8), eval_dataset=rankings(3, 2)
    )
    watched.train()
    assert sum("eval_accuracy" in log for log in watched.state.log_history) == 2
    assert (tmp_path / "b" / "metrics.jsonl").read_text().count("eval_accuracy") == 2
    for name, weight in weights(plain.model).items():
        assert torch.equal(weights(watched.model)[name], weight), name


def test_the_same_seed_draws_the_same_adapter(tmp_path, model_folder):
    def drawn(seed):
        torch.manual_seed(torch.seed() % 1000)  # whatever the global generator's state
        args = config(tmp_path, lora_rank=2, seed=seed)
        return weights(RewardTrainer(model_folder, args=args, train_dataset=rankings(4)).model)

    first, second, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_jsonl_in_trls_format(tmp_path, model_folder):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {i}?", "chosen": GOOD, "rejected": BAD} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = RewardTrainer(str(model_folder), args=config(tmp_path / "out"), train_dataset=str(file))
    trainer.train()
    assert trainer.evaluate(file)["eval_pairs"] == len(read_rankings(file)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch_size": 3}, "microbatch_size=3 must divide prompts_per_batch=4"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"normalizer_samples": 1}, "normalizer_samples=1: one score has no spread; take more, or 0"),
        ({"lora_rank": -1}, "lora_rank=-1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config("out", **changes)


def test_trls_own_config_is_refused_by_name(tmp_path, model_folder):
    import trl

    with pytest.raises(TypeError, match=r"reward_models\.RewardConfig"):
        RewardTrainer(model_folder, args=trl.RewardConfig(str(tmp_path), bf16=False), train_dataset=rankings(4))


def contradicted(count: int) -> list[Ranking]:
    """Make held-out rankings that contradict the training rankings: the fewer `Paris`, the better."""
    return [Ranking(r.prompt, r.responses, tuple(-rank for rank in r.ranks)) for r in rankings(count, seed=7)]


def test_keep_best_ends_with_the_weights_of_the_lowest_held_out_loss(tmp_path, model_folder):
    args = config(tmp_path / "out", learning_rate=3e-3, epochs=2, eval_steps=1, keep_best=True, lr_schedule="constant")
    trainer = RewardTrainer(model_folder, args=args, train_dataset=rankings(8), eval_dataset=contradicted(6))
    seen: dict[int, dict[str, torch.Tensor]] = {}
    evaluate = trainer.evaluate

    def noting(*given, **more):
        seen[trainer.state.global_step] = weights(trainer.model)
        return evaluate(*given, **more)

    trainer.evaluate = noting
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert sorted(losses) == [1, 2, 3, 4]
    step = min(losses, key=losses.get)
    assert step < 4, "the data should make longer training worse"
    assert (trainer.best.step, trainer.best.eval_loss) == (step, losses[step])
    assert all(torch.equal(weight, seen[step][name]) for name, weight in weights(trainer.model).items())
    assert evaluate()["eval_loss"] == pytest.approx(losses[step], abs=1e-6)
    expected = trainer.normalizer
    assert trainer.fit_normalizer() == expected  # it was measured on the weights that are saved


def test_the_last_step_takes_part_though_no_evaluation_falls_on_it(tmp_path, model_folder):
    args = config(tmp_path / "out", learning_rate=3e-3, epochs=3, eval_steps=7, keep_best=True)
    trainer = RewardTrainer(model_folder, args=args, train_dataset=rankings(8), eval_dataset=rankings(8, seed=7))
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [6]
    assert trainer.state.global_step == 6 == trainer.best.step


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
def test_an_interrupted_run_finds_the_same_best(tmp_path, model_folder, lora):
    def run(name, stop_after=None):
        args = config(tmp_path / name, learning_rate=3e-3, epochs=2, eval_steps=1, save_steps=2, keep_best=True,
                      lora_rank=lora)  # fmt: skip
        trainer = RewardTrainer(model_folder, args=args, train_dataset=rankings(8), eval_dataset=contradicted(6))
        log = trainer.log

        def stopping(*given, **more):
            if stop_after == trainer.state.global_step:
                raise KeyboardInterrupt
            log(*given, **more)

        trainer.log = stopping
        try:
            trainer.train(resume_from_checkpoint=True)
        except KeyboardInterrupt:
            return None
        return trainer

    whole = run("whole")
    assert run("halves", stop_after=3) is None
    assert (tmp_path / "halves" / "checkpoint-2").is_dir()
    resumed = run("halves")
    assert whole.best == resumed.best
    assert whole.best.step <= 2  # from before the interruption
    assert all(torch.equal(w, weights(resumed.model)[n]) for n, w in weights(whole.model).items())
    assert whole.normalizer == resumed.normalizer


def test_a_fresh_run_forgets_another_attempts_best(tmp_path, model_folder):
    args = config(tmp_path / "out", eval_steps=1, keep_best=True)
    for _ in range(2):
        trainer = RewardTrainer(model_folder, args=args, train_dataset=rankings(8), eval_dataset=rankings(6, 7))
        (tmp_path / "out").mkdir(exist_ok=True)
        trainer.train()
        assert {log["step"] for log in trainer.state.log_history if "eval_loss" in log} >= {trainer.best.step}
        from safetensors.torch import save_file

        junk = {"score.weight": torch.full((1, 32), 9.0)}
        save_file(junk, tmp_path / "out" / "best.safetensors", metadata={"step": "77", "eval_loss": "0.0"})


def test_keep_best_needs_something_to_choose_by(tmp_path, model_folder):
    with pytest.raises(InputError, match="set eval_steps"):
        config(tmp_path, keep_best=True)
    with pytest.raises(InputError, match="give an eval_dataset"):
        RewardTrainer(model_folder, args=config(tmp_path, keep_best=True, eval_steps=1), train_dataset=rankings(4))


def labeled(records: list[Ranking], *labelers: str, **columns) -> list[Ranking]:
    return [Ranking(r.prompt, r.responses, r.ranks, {"labeler": labelers[n % len(labelers)], **columns})
            for n, r in enumerate(records)]  # fmt: skip


def test_labeler_weights_reach_loss_and_gradient(tmp_path, model_folder):
    """ann counts 3, bob 1: the batch's gradient is the mean of the prompts' own, weighted 1.5 and 0.5."""
    records = labeled(rankings(4), "ann", "bob")
    args = config(tmp_path / "a", labeler_weights={"ann": 3.0, "bob": 1.0}, prompts_per_batch=4)
    trainer = RewardTrainer(model_folder, args=args, train_dataset=records)
    plain = RewardTrainer(model_folder, args=config(tmp_path / "b"), train_dataset=rankings(4))
    assert trainer.train_dataset["weight"][:] == [1.5, 0.5, 1.5, 0.5]
    each = [plain.evaluate([r])["eval_loss"] for r in rankings(4)]
    expected = (1.5 * each[0] + 0.5 * each[1] + 1.5 * each[2] + 0.5 * each[3]) / 4
    assert trainer.evaluate(records)["eval_loss"] == pytest.approx(expected, abs=1e-5)
    trainer.train()
    assert next(log for log in trainer.state.log_history if "loss" in log)["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_labeler_of_weight_0_is_not_learnt_from(tmp_path, model_folder):
    good, bad = rankings(8), contradicted(8)
    mixed = labeled(good, "ann") + labeled(bad, "troll")
    accuracies = {}
    for weight in (0.0, 1.0):
        args = config(tmp_path / f"w{weight}", epochs=8, learning_rate=3e-3,
                      labeler_weights={"ann": 1.0, "troll": weight})  # fmt: skip
        trainer = RewardTrainer(model_folder, args=args, train_dataset=mixed)
        trainer.train()
        accuracies[weight] = trainer.evaluate(labeled(rankings(12, 5), "ann"))["eval_accuracy"]
    assert accuracies[0.0] > 0.9 > accuracies[1.0]


def test_weights_are_of_the_ranking_and_1_on_average(tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    rows = [Ranking(r.prompt, r.responses, r.ranks, {"weight": w, "labeler": "ann"})
            for r, w in zip(rankings(3), (1, 2.0, None), strict=True)]  # fmt: skip
    assert encode_rankings(tiny_tokenizer, rows, 200, "x")["weight"][:] == pytest.approx([0.75, 1.5, 0.75])
    batch = RankingCollator(0)(list(encode_rankings(tiny_tokenizer, rows, 200, "x", {"ann": 4.0})))
    assert batch["weights"].tolist() == pytest.approx([0.75] * 2 + [1.5] * 3 + [0.75] * 4)
    assert "weights" not in RankingCollator(0)(list(encode_rankings(tiny_tokenizer, rankings(3), 200, "x")))


def test_wrong_weights_are_refused(tiny_tokenizer, tmp_path):
    chat.prepare_tokenizer(tiny_tokenizer)

    def encode(labeler_weights=None, **columns):
        rows = [Ranking(r.prompt, r.responses, r.ranks, columns) for r in rankings(2)]
        encode_rankings(tiny_tokenizer, rows, 200, "train_dataset", labeler_weights)

    with pytest.raises(InputError, match=r"train_dataset: ranking 1: weight: got -1; write a number from 0 up"):
        encode(weight=-1)
    for column in ("weight", "margin"):
        for huge in (10**400, float("inf"), float("nan")):
            with pytest.raises(InputError, match=f"train_dataset: ranking 1: {column}: got (1000|inf|nan)"):
                encode(**{column: huge})
    with pytest.raises(InputError, match="weight: got 'much'"):
        encode(weight="much")
    with pytest.raises(InputError, match="all 2 rankings weigh 0"):
        encode(weight=0)
    with pytest.raises(InputError, match="no column labeler"):
        encode({"ann": 1.0})
    with pytest.raises(InputError, match=r"labeler: 'bob' is not in labeler_weights \(ann\)"):
        encode({"ann": 1.0}, labeler="bob")
    with pytest.raises(InputError, match="labeler_weights: ann: -1"):
        config(tmp_path, labeler_weights={"ann": -1.0})
    with pytest.raises(InputError, match="center_rewards_coefficient=-1"):
        config(tmp_path, center_rewards_coefficient=-1)


@pytest.mark.slow
def test_centering_keeps_scores_around_0(tmp_path, model_folder):
    records, sums = rankings(24), {}
    for coefficient in (0.0, 0.5):
        args = config(tmp_path / str(coefficient), epochs=4, learning_rate=3e-3,
                      center_rewards_coefficient=coefficient)  # fmt: skip
        trainer = RewardTrainer(model_folder, args=args, train_dataset=records)
        trainer.train()
        model = RewardModel(trainer.model, trainer.processing_class)
        scores = [model.score([[*r.prompt, {"role": "assistant", "content": t}] for t in r.responses]) for r in records]
        pairs = [(s[i] + s[j]).item() for r, s in zip(records, scores, strict=True) for i, j in r.pairs()]
        sums[coefficient] = np.mean(np.square(pairs))
        assert trainer.evaluate(records)["eval_accuracy"] > 0.9
    assert sums[0.5] < 0.5 * sums[0.0]


@pytest.mark.parametrize("rows", ["all", "sample"])
def test_the_normalizer_may_be_measured_on_demonstrations(tmp_path, model_folder, rows):
    shown = [{"prompt": f"Which one is {n}?", "completion": "one " * n + "Paris"} for n in range(1, 9)]
    long = {"prompt": "long", "completion": "word " * 2000}
    trainer = RewardTrainer(
        model_folder,
        args=config(tmp_path / "out", normalizer_samples=100 if rows == "all" else 5),
        train_dataset=rankings(8),
        normalizer_dataset=[*shown, long],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = RewardModel.load(tmp_path / "saved")
    conversations = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
                     for r in shown]  # fmt: skip
    scores = model.score(conversations)
    if rows == "all":
        assert model.normalizer.count == 8
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    else:
        assert model.normalizer.count == 5
    here = RewardModel(trainer.model, trainer.processing_class, trainer.normalizer)
    assert torch.equal(here.score(conversations), scores)


def test_demonstrations_to_normalize_on_are_refused_before_training(tmp_path, model_folder, tiny_tokenizer):
    """By the template, as Gemma's refuses a system turn, or by their length; on_bad_row is theirs, too."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tiny_tokenizer.chat_template = refuses + tiny_tokenizer.chat_template
    tiny_tokenizer.save_pretrained(model_folder)
    good = [{"prompt": f"Which one is {n}?", "completion": "one " * n} for n in range(1, 5)]
    bad = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "completion": "Hi"}
    long = {"prompt": "long", "completion": "word " * 2000}

    def made(shown, **changes):
        args = config(tmp_path / "out", normalizer_samples=100, **changes)
        return RewardTrainer(model_folder, args=args, train_dataset=rankings(4), normalizer_dataset=shown)

    with pytest.raises(InputError, match=r"row 3: .*the chat template refuses the roles system"):
        made([*good[:3], bad])
    with pytest.raises(InputError, match="1 of 3 rows can be used, 2 are longer than 256 tokens; two are needed"):
        made([long, good[0], long], max_length=256)
    assert made([*good, bad, long], on_bad_row="drop").fit_normalizer().count == 4
    with pytest.raises(InputError, match="normalizer_dataset: 1 of 1 rows can't be used"):
        made([bad], on_bad_row="drop")


def test_demonstrations_to_normalize_on_are_read_as_they_are_scored(tmp_path, model_folder, tiny_tokenizer):
    """Without their thinking, which the template would write."""
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "message['content']", "(message.reasoning_content | default('')) + message['content']"
    )
    tiny_tokenizer.save_pretrained(model_folder)
    shown = [
        [
            {"role": "user", "content": f"Which one is {n}?"},
            {"role": "assistant", "content": "one " * n, "reasoning_content": "I see"},
        ]
        for n in range(1, 7)
    ]
    trainer = RewardTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=rankings(4),
                            normalizer_dataset=[{"messages": talk} for talk in shown])  # fmt: skip
    model = RewardModel(trainer.model, trainer.processing_class, trainer.fit_normalizer())
    thinking = RewardModel(trainer.model, trainer.processing_class, score_reasoning=True).score(shown)
    assert (thinking - model.raw_scores(shown)).abs().min() > 1e-4  # the template does write it
    scores = model.score(shown)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_normalizer_computes_what_responses_begin_with_once(tmp_path, model_folder):
    prompt, answers = "Tell me about " + "rain and " * 40 + "snow.", ["It rains.", "It snows.", "It is wet.", "No."]
    rows = [{"prompt": prompt, "responses": answers, "ranks": [1, 2, 3, 4]}]
    trainer = RewardTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=rows)
    read = []
    trunk = trainer.model.base_model.get_input_embeddings()
    hook = trunk.register_forward_hook(lambda module, given, output: read.append(given[0].numel()))
    normalizer = trainer.fit_normalizer()
    hook.remove()
    model = RewardModel(trainer.model, trainer.processing_class)
    asked = [{"role": "user", "content": prompt}]
    scores = model.raw_scores([[*asked, {"role": "assistant", "content": answer}] for answer in answers])
    assert normalizer.mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert normalizer.std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    assert read[-1] < 2 * len(trainer.train_dataset[0]["chosen_ids"])  # and not four times as many
