"""The benchmark: counted work against hand arithmetic and torch's own counter, fits of known laws, tables, clocks,
small runs of ours, each trick for CPUs really switched off. trl's side installs trl and is a long test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf import config as configs
from rlhf.chat import encode_conversation
from rlhf.errors import InputError, RunStopped
from rlhf.run.precision import bf16_hardware

ROOT = Path(__file__).resolve().parents[2]
load = recipe.load_benchmark
cases, jobs, limit, scaling, quality, tables = map(
    load, ("cases", "jobs", "limit", "scaling", "quality", "bench_tables")
)
ablation, board_module, busy, earlier, without = map(load, ("ablation", "board", "busy", "earlier", "without"))

# -- the limit ---------------------------------------------------------------------------------------------

SMALL = limit.Sizes(
    num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    vocab_size=50,
)  # fmt: skip
# By hand. Query and output 8 x 8, key and value 8 x 4, three MLP matrices 8 x 12: 64 + 64 + 32 + 32 + 288 = 480.
TRUNK, HEAD = 960, 400
# A rank-3 adapter: 3 (8 + 8) twice, 3 (8 + 4) twice, 3 (8 + 12) three times: 96 + 72 + 180 = 348 a layer.
ADAPTER = 696


def update(**changes) -> limit.Update:
    given = {"sizes": SMALL, "prompts": [3, 5], "responses": [2, 4], "inner_epochs": 3, "minibatches": 2}
    return limit.Update(**(given | changes))


def test_weights_by_hand():
    assert (SMALL.trunk_weights, SMALL.head_weights, SMALL.adapter_weights(3)) == (TRUNK, HEAD, ADAPTER)


def test_bytes_are_those_of_what_is_stored():
    """In four bits the layers, not the head; a bfloat16 run that trains all weights keeps them in float32, and its
    cache in bfloat16."""
    case = cases.CASES["tiny"]
    steps, rows = case.new_tokens, [(p, case.new_tokens) for p in case.prompt_lengths]
    cache = 2 * 2 * 4 * sum(p * (r - 1) + r * (r - 1) // 2 for p, r in rows)  # numbers: key and value, layers, width
    for settings, weights, cached in (
        ({}, 4 * (TRUNK + HEAD), 4),
        ({"bf16": True}, 4 * (TRUNK + HEAD), 2),
        ({"bf16": True, "lora_rank": 3}, 2 * (TRUNK + HEAD), 2),
        ({"bf16": True, "lora_rank": 3, "load_in_4bit": True}, TRUNK / 2 + 2 * HEAD, 2),
    ):
        assert limit.generate(limit.update_of(settings, case, SMALL)).bytes == steps * weights + cached * cache
    quantized = limit.update_of({"bf16": True, "lora_rank": 3, "load_in_4bit": True}, case, SMALL)
    assert limit.score(quantized).bytes == TRUNK / 2
    assert limit.logprobs(quantized).bytes == 3 * TRUNK / 2 + 2 * 2 * HEAD


def test_generation_by_hand():
    # Prompts: 8 tokens through the trunk; 1+2+3 + 1+2+3+4+5 = 21 pairs. Decoding: row 1 one step with 4 keys, row 2
    # three steps with 6, 7, 8 keys: 25 pairs, 4 tokens. A pair costs 4 x 2 layers x 8 channels. The head: 6 tokens.
    work = limit.generate(update(trunk_bytes=2, head_bytes=2, cache_bytes=2))
    assert work.flops == 2 * TRUNK * (8 + 4) + 64 * (21 + 25) + 2 * HEAD * 6
    # Four steps (the longest response) read all weights; each pair reads key and value, 2 x 2 layers x 4 channels.
    assert work.bytes == 2 * 4 * (TRUNK + HEAD) + 2 * 16 * 25


def test_phases_by_hand():
    # Rows of 5 and 9 tokens: 14 tokens, 15 + 45 = 60 pairs; 6 response tokens.
    forward, attention = 2 * TRUNK * 14, 64 * 60
    assert limit.score(update()).flops == forward + attention
    assert limit.logprobs(update()).flops == 3 * (forward + attention) + 2 * 2 * HEAD * 6
    assert limit.logprobs(update(value_model="shared_trunk")).flops == 2 * (forward + attention) + 4 * HEAD * 6
    work = limit.update_phase(update())
    assert work.flops == 3 * (2 * 3 * (forward + attention) + 6 * HEAD * 6)
    # 6 steps: weights in forward, and backward; Adam on two full models.
    assert work.bytes == 6 * (4 * (4 * TRUNK + 2 * HEAD) + 32 * 2 * (TRUNK + HEAD))
    lora = limit.update_phase(update(lora_rank=3, value_model="adapter", trunk_bytes=2, head_bytes=2))
    first = 2 * (64 + 32 + 32 + 3 * 3 * 8)  # what the first layer's query, key and value don't hand down
    trunk = 14 * (2 * (TRUNK + ADAPTER) + 2 * TRUNK + 4 * ADAPTER - first) + 3 * attention
    assert lora.flops == 3 * (2 * trunk + 4 * HEAD * 6)
    assert lora.bytes == 6 * (2 * (4 * TRUNK + 2 * HEAD) + 32 * 2 * ADAPTER)


def test_step_is_the_sum_and_time_adds_up():
    counted = limit.count(update())
    assert counted["step"].flops == sum(work.flops for name, work in counted.items() if name != "step")
    assert limit.Work(600.0, 50.0).seconds(200.0, 10.0) == pytest.approx(3.0 + 5.0)


@pytest.mark.parametrize("rank", [0, 3])
def test_counts_are_torchs(rank):
    """Forward and backward of one row, every position through the head: torch counts what the model really multiplies.

    Eager attention computes the whole square, which is added by hand."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.models.adapters import lora_config

    n = 7
    sizes = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, attn_implementation="eager"))
    if rank:
        model = get_peft_model(model, lora_config(rank, 8.0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(n)[None]).logits.sum().backward()
    square = limit.attention_flops(SMALL, n * n) - limit.attention_flops(SMALL, limit.causal_pairs([n]))
    trunk = limit.trunk_forward(SMALL, [n], rank) + limit.trunk_backward(SMALL, [n], rank) + 3 * square
    head = (2 if rank else 3) * limit.head_forward(SMALL, n)
    assert counter.get_total_flops() == trunk + head


# -- fits and tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponents_of_known_laws(power):
    sizes = [16, 32, 64, 128]
    assert scaling.exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_exponent_refuses_what_has_none():
    for sizes, costs in (([4, 4], [1.0, 2.0]), ([1, 2], [0.0, 1.0])):
        with pytest.raises(ValueError, match="two sizes and positive costs"):
            scaling.exponent(sizes, costs)


@pytest.mark.parametrize(("power", "verdict"), [(1.0, "nothing"), (1.3, "seconds")])
def test_scaling_says_what_is_worse_than_linear(power, verdict):
    sizes = [32, 64, 128, 256]
    curve = {"sizes": sizes, "seconds": [size**power for size in sizes], "bytes": [2**20 * size for size in sizes]}
    text = scaling.table({"rollout size (responses)": curve, "response length (tokens)": curve | {"sizes": sizes}})
    assert f"Worse than linear in rollout size: {verdict} (" in text
    assert f"| {power:.2f} | 32, 64, 128, 256 | 1.00 |" in text


def test_every_curve_has_four_points():
    assert len(scaling.CURVES) == 3
    for points in scaling.CURVES.values():
        assert len({size for size, _ in points}) >= 4


def timed(step: float, peak_gib: float, precision: str = "float32") -> dict:
    phases = {"generate": step / 4, "score": step / 8, "logprobs": step / 8, "update": step / 2}
    warm = dict.fromkeys((*phases, "step"), 100.0)
    return {
        "updates": [warm, phases | {"step": step}, phases | {"step": step}],
        "response_tokens": [96.0] * 3,
        "peak_bytes": int(peak_gib * 2**30),
        "precision": precision,
    }


def test_medians_leave_the_first_update_out():
    summary = tables.summarize(timed(8.0, 1.5))
    assert summary["step"] == 8.0
    assert summary["update"] == 4.0
    assert summary["tokens_per_second"] == 12.0
    assert summary["range"] == (8.0, 8.0)
    assert summary["peak_gib"] == 1.5
    assert tables.summarize(timed(8.0, 1.5) | {"peak_cuda_bytes": 2**30})["peak_gib"] == 1.0


def test_tables_of_speed_ratio_and_limit():
    runs = {
        "ours_adapter": tables.summarize(timed(8.0, 1.0, "bfloat16")), "trl_lora": tables.summarize(timed(24.0, 4.0))
    }  # fmt: skip
    assert "| ours_adapter | bfloat16 | 8.00 | 2.00 | 1.00 | 1.00 | 4.00 | 12.0 | 1.00 |" in tables.speed_table(runs)
    assert "| ours_adapter | 3.00 | 0.25 |" in tables.ratio_table(runs)
    assert tables.ratio_table({"ours_adapter": runs["ours_adapter"]}) == ""
    least = {"generate": 1.0, "score": 0.5, "logprobs": 0.5, "update": 2.0, "step": 4.0}
    text = tables.limit_table(runs, {"ours_adapter": least})
    assert "| ours_adapter | update | 4.00 | 2.00 | 2.00 | 50% |" in text
    assert "| ours_adapter | step | 8.00 | 4.00 | 2.00 | 100% |" in text


def test_comparison_is_with_the_base_alone():
    slow = timed(8.0, 1.0)
    slow["updates"][2] = slow["updates"][2] | {"step": 12.0}
    runs = {"before": tables.summarize(slow), "today": tables.summarize(timed(5.0, 1.25))}
    text = tables.comparison_table(runs, "before")
    assert "| run | s/update | range | / before | peak GiB | / before |" in text
    assert "| before | 10.00 | 8.00-12.00 | 1.000 | 1.00 | 1.000 |" in text
    assert "| today | 5.00 | 5.00-5.00 | 0.500 | 1.25 | 1.250 |" in text


def test_shares_of_a_trick_and_what_stays():
    """With everything 8 s and 2 GiB; without the trick 10 s and 1.6 GiB: it takes off a fifth, and adds a quarter."""
    summaries = {ablation.WITH: tables.summarize(timed(8.0, 2.0)), "norms": tables.summarize(timed(10.0, 1.6))}
    (share,) = ablation.shares_of("tiny", summaries).values()
    assert (share.seconds, share.peak) == (pytest.approx(0.2), pytest.approx(-0.25))

    def stays(*pairs):
        return ablation.stays([ablation.Share(run="r", seconds=s, peak=p) for s, p in pairs])

    assert stays((0.05, 0.0))
    assert stays((0.0, 0.0), (0.0, 0.1))  # in one of the cases
    assert not stays((0.04, 0.09))
    assert not stays((0.2, -0.25))
    assert not stays((0.2, 0.0), (-0.1, 0.0))
    assert stays((0.2, 0.0), (-0.02, -0.02))  # no more than timings of one run differ by
    text = ablation.verdicts({"norms": [share], "draw": []})
    assert "| +20% / -25% | no |" in text
    assert "| - | no |" in text


def test_busy_table():
    text = busy.table(
        {"sft": {"alone": [2.0, 2.0, 9.0], "busy": [4.0, 4.0]}, "ppo_tiny": {"alone": [1], "busy": [2.1]}}
    )
    assert "| sft | 2.00 | 4.00 | 2.00 | yes |" in text
    assert "| ppo_tiny | 1.00 | 2.10 | 2.10 | no |" in text


def raced(seconds, trained, updates):
    return {"seconds": seconds, "trained_seconds": trained, "history": [{}] * updates}


def test_time_to_quality_table():
    mark = {"sft": 4.0, "best_of_16": 7.0, "mark": 5.5}
    passed = {"seed": 0, **mark, "ours": raced(10.0, 10.0, 4), "trl": raced(40.0, 40.0, 9)}
    never = {"seed": 1, **mark, "ours": raced(10.0, 10.0, 4), "trl": raced(None, 60.0, 28)}
    text = quality.table([passed, never])
    assert "| 0 | 4.00 | 7.00 | 5.50 | 10.0 (4) | 40.0 (9) | 4.00 |" in text
    assert "| 1 | 4.00 | 7.00 | 5.50 | 10.0 (4) | not in 60 (28) | > 6.00 |" in text
    assert "| median (range) |  |  |  |  |  | 5.00 (4.00-6.00) |" in text
    lost = quality.table([passed, never | {"ours": raced(None, 60.0, 28)}])
    assert "| median (range) |  |  |  |  |  | - |" in lost


def test_each_side_tries_as_many_settings_and_a_trial_ends_where_it_has_lost():
    sides = list(quality.TRIALS.values())
    assert len({len(own) for own in sides}) == 1
    assert all(len({str(one) for one in own}) == len(own) for own in sides)
    took, given = [30.0, None, 20.0, 50.0, None, 25.0], []

    def run(settings, at_most, name):
        seconds = took[len(given)]
        given.append((settings, at_most, name))
        return raced(seconds, 1.0, 1)

    trials = quality.tried(run, "ours")
    assert [one["settings"] for one in trials] == quality.TRIALS["ours"]
    assert [at_most for _, at_most, _ in given] == [None, 30.0, 30.0, 20.0, 20.0, 20.0]
    assert len({name for *_, name in given}) == len(given), "each has a folder of its own"
    assert quality.best(trials) == quality.TRIALS["ours"][2]
    assert quality.best([one | {"seconds": None} for one in trials]) == quality.TRIALS["ours"][0]
    assert "| ours | value_model separate, learning_rate 0.0006 | not in 1 (1) |" in quality.trials_table(
        {"ours": trials}
    )


# -- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "[small]"], "cases=['small']: small is none of tiny, smollm2"),
        (["--runs", "[]"], "runs=[]: nothing is none of"),
        (["--updates", "0"], "updates=0 must be at least 1"),
        (["--threads", "-1"], "threads=-1 must be at least 1 or null"),
        (["--only", "memory"], "--only: expected one of speed, quality, scaling, stages, sampling"),
        (["--stages", "[ppo]"], "stages=['ppo']: ppo is none of sft, reward_model"),
        (["--quality_updates", "0"], "quality_updates=0 must be at least 1 or null"),
        (["--tuning_seed", "4"], "tuning_seed=4 is one of the 5 that are raced; take another"),
        (["--tricks", "[magic]"], "tricks=['magic']: magic is none of gated, norms"),
        (["--agilerl_python", "nowhere"], "agilerl_python=nowhere: no such file; install agilerl"),
        (["--runs", "[agilerl_lora]"], "runs=['agilerl_lora']: AgileRL's needs agilerl_python"),
        (["--before", "nowhere"], "nowhere/recipes/benchmarks/ours_worker.py is missing; name a checkout"),
        (["--before", str(ROOT), "--before_variants", "{today: {}}"], "before_variants: today is taken"),
    ],
)
def test_mistakes_in_the_settings(flags, message):
    with pytest.raises(InputError) as error:
        configs.load(load("ppo_vs_trl").BenchmarkConfig, flags)
    assert message in str(error.value)


def test_bfloat16_only_where_the_hardware_is_fast_at_it():
    """Else both sides compute in float32, and the run of trl's that holds its weights in bfloat16 is another one's."""
    names = [*cases.OURS, *cases.TRL]
    fast = cases.runs_here(names, "avx512_bf16")
    assert list(fast) == names
    half = {"ours_adapter", "ours_shared_trunk", "trl_lora", "trl_lora_bf16"}
    assert {name for name in names if cases.precision(fast[name]) == "bfloat16"} == half
    slow = cases.runs_here(names, None)
    assert list(slow) == [name for name in names if name != "trl_lora_bf16"]
    assert {cases.precision(settings) for settings in slow.values()} == {"float32"}
    assert all(settings.get("frozen_dtype", "float32") == "float32" for settings in slow.values())
    assert (cases.runs_here(names, True), cases.runs_here(names, False)) == (fast, slow)  # asked for by --bf16


def test_a_benchmark_whose_runs_failed_was_stopped_and_not_mistyped(monkeypatch, tmp_path):
    benchmark, board = load("ppo_vs_trl"), board_module.Board(tmp_path, failures=["ours: no memory", "trl: none"])
    monkeypatch.setattr(benchmark, "benchmark", lambda config: board)
    with pytest.raises(RunStopped, match=r"^2 runs failed, first ours: no memory$"):
        benchmark.main([])


def test_parts_that_take_the_place_of_the_four(monkeypatch, tmp_path):
    benchmark, ran = load("ppo_vs_trl"), []
    for part in ("speed", "quality_part", "scaling_part", "stages_part", "ablate_part", "before_part", "busy_part"):
        monkeypatch.setattr(benchmark, part, lambda config, board, part=part: ran.append(part))
    for flags in ([], ["--only", "speed"], ["--ablate"], ["--busy", "--before", str(ROOT)]):
        config = configs.load(benchmark.BenchmarkConfig, [*flags, "--output_dir", str(tmp_path)])
        benchmark.benchmark(config)
        ran.append(".")
    expected = "speed quality_part scaling_part stages_part . speed . ablate_part . before_part busy_part ."
    assert ran == expected.split()


def test_cases_are_checked():
    with pytest.raises(InputError, match="minibatches=3 must divide rollout_size=16"):
        tiny_case(rollout_size=16, minibatches=3)
    with pytest.raises(InputError, match="must rise from at least 6"):
        tiny_case(prompt_tokens=(5, 9))
    case = tiny_case(rollout_size=4, prompt_tokens=(8, 47))
    assert case.prompt_lengths == [8, 21, 34, 47]
    assert cases.Case.of_job(json.loads(json.dumps(case.as_job()))) == case


def test_both_sides_have_the_same_settings():
    """Ours under trl's names, and nothing that only one side is given."""
    ours = cases.SPEED_SETTINGS | {"max_new_tokens": 48, "inner_epochs": 4}
    theirs = cases.trl_names(ours)
    assert len(theirs) == len(ours)
    assert theirs["cliprange"] == ours["clip_ratio"]
    assert theirs["response_length"] == 48
    assert theirs["num_ppo_epochs"] == 4


# -- runs --------------------------------------------------------------------------------------------------


def tiny_case(**changes) -> cases.Case:
    given = {
        "shape": cases.llama_shape(32, 2, 4, 200), "rollout_size": 4, "prompt_tokens": (6, 12), "new_tokens": 5,
        "inner_epochs": 2, "minibatches": 2,
    }  # fmt: skip
    return cases.Case(**(given | changes))


@pytest.fixture
def job(tmp_path) -> dict:
    synthetic = load("synthetic")
    given = {"case": tiny_case().as_job(), "model": None, "updates": 1, "folder": str(tmp_path)}
    return given | synthetic.work(given)


def test_synthetic_text_has_the_tokens_it_was_made_with(job):
    from transformers import AutoTokenizer

    synthetic = load("synthetic")
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    assert len(tokenizer) == 200 == job["sizes"]["vocab_size"]
    response = [17, 4, 17, 196, 9]
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": tokenizer.decode(response)}]
    prompt = synthetic.TEMPLATE_TOKENS + 1
    assert encode_conversation(tokenizer, messages)[0][prompt : prompt + 5] == response
    assert [len(row["prompt"].split()) for row in synthetic.make_prompts(tokenizer, [6, 9])] == [1, 4]


class Allocator:
    """In glibc's place: counts what is asked of it."""

    def __init__(self, used: Counter):
        self.malloc_trim = lambda keep: used.update(["freed_memory"])


def graph(tensor: torch.Tensor) -> set[str]:
    """The names of the steps that backward would take."""
    names, open_ = set(), [tensor.grad_fn]
    while open_:
        step = open_.pop()
        if step is not None and step not in names:
            names.add(step)
            open_ += [other for other, _ in step.next_functions]
    return {step.name() for step in names}


def used_tricks(job: dict, monkeypatch) -> tuple[set[str], dict[str, float]]:
    """The tricks that a run of ours has used, each seen from outside; and what it logged."""
    from rlhf import cpu
    from rlhf.cpu import attention, drawing, gated, memory, norms
    from rlhf.ppo.trainer import PPOTrainer

    used: Counter = Counter()

    def watch(owner, name, trick):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: used.update([trick]) or function(*a, **k))

    watch(attention, "_products", "attention")
    watch(drawing, "draw", "draw")
    monkeypatch.setattr(cpu, "draw", drawing.draw)
    monkeypatch.setattr(memory, "_libc", lambda: Allocator(used))
    train = PPOTrainer.train

    def look(trainer):
        batch = torch.tensor([[5, 6, 7]])
        for module in trainer.actor_critic.modules():
            forward = vars(type(module)).get("forward")
            used.update(trick for trick, own in (("gated", gated), ("norms", norms)) if forward is own._forward)
        if "LoraProductBackward" in graph(trainer.actor_critic.policy(input_ids=batch).logits):
            used.update(["fused_lora"])
        return train(trainer)

    monkeypatch.setattr(PPOTrainer, "train", look)
    load("ours_worker").work(job)
    monkeypatch.undo()
    return set(used), json.loads(Path(job["folder"], "metrics.jsonl").read_text().splitlines()[-1])


def test_what_can_be_switched_off_is_what_is_listed():
    assert set(without.SWITCHES) == set(ablation.TRICKS)


@pytest.mark.slow
@pytest.mark.parametrize("trick", ablation.TRICKS)
def test_a_trick_is_really_off_and_the_others_are_on(job, trick, monkeypatch):
    """And what is computed stays the same."""
    settings = {"bf16": False, "lora_rank": 4}
    folder = Path(job["folder"])
    with_all, whole = used_tricks(job | {"settings": settings, "folder": str(folder / "with")}, monkeypatch)
    assert with_all == set(ablation.TRICKS)
    job |= {"settings": settings, "folder": str(folder / "without"), "without": trick}
    others, less = used_tricks(job, monkeypatch)
    assert others == with_all - {trick}
    if trick != "draw":
        same = ("score", "kl_nats", "entropy_nats", "policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm")
        expected = {name: whole[name] for name in same}
        assert {name: less[name] for name in same} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_nothing_stays_switched_off():
    """And the modules that have imported a function see its replacement too."""
    from rlhf import cpu
    from rlhf.cpu import drawing

    before = drawing.draw
    with without.off("draw"):
        assert cpu.draw is drawing.draw is not before
    assert cpu.draw is drawing.draw is before
    with pytest.raises(AttributeError), without.replaced("rlhf.cpu.drawing", "no_such_function", None):
        pass


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"lora_rank": 4, "value_model": "shared_trunk"}])
def test_ours_runs_and_never_stops_early(job, settings):
    result = load("ours_worker").work(job | {"settings": {"bf16": False} | settings})
    assert result["response_tokens"] == [4 * 5]
    (seconds,) = result["updates"]
    phases = sum(seconds[name] for name in ("generate", "score", "logprobs", "update"))
    assert 0 < phases <= seconds["step"]
    assert list(result["start"]) == ["imports", "trainer", "first_step"]
    assert result["start"]["first_step"] == seconds["step"]
    assert min(result["start"].values()) > 0
    assert result["peak_bytes"] > 0.99 * result["imported_bytes"] > 0  # the kernel counts pages in batches


def test_tables_of_an_earlier_benchmark_go_with_its_results(tmp_path):
    """A second run in the same folder that is killed before its first table leaves none under its own settings."""
    board_module.Board(tmp_path).keep("config", {"updates": 1})
    (tmp_path / "tables.md").write_text("### Of one update")
    board = board_module.Board(tmp_path)
    board.keep("config", {"updates": 2})
    assert not (tmp_path / "tables.md").exists()
    board.show("Of two updates", "| x |")
    board.keep("speed", {})
    assert "Of two updates" in (tmp_path / "tables.md").read_text()


@pytest.mark.slow
def test_a_failed_run_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"machine.py ended with code 1: KeyError: 'sizes' \(see .*log.txt\)"):
        jobs.run_job("machine.py", {}, tmp_path)
    board = board_module.Board(tmp_path)

    def fails():
        raise InputError("no such thing")

    assert board.attempt("a run", fails) is None
    assert board.failures == ["a run: no such thing"]


TAKES_TURNS = """
import sys
sys.path[:0] = [{benchmarks!r}]
from jobs import serve, wait_for_turn

def work(job):
    for update in range(3):
        if job["name"] == "ill" and update == 1:
            raise ValueError("lost heart")
        with open({board!r}, "a") as board:
            board.write(job["name"] + str(update) + " ")
        wait_for_turn()
    return {{"name": job["name"]}}

serve(work)
"""


def test_runs_take_turns_update_by_update(tmp_path):
    board, script = tmp_path / "board", tmp_path / "worker.py"
    script.write_text(TAKES_TURNS.format(benchmarks=str(ROOT / "recipes/benchmarks"), board=str(board)))
    workers = [
        jobs.Worker(str(script), {"name": name}, tmp_path / name, in_turns=True) for name in ("one", "ill", "two")
    ]
    for worker in workers * 3:
        worker.update()
    assert board.read_text().split() == ["one0", "ill0", "two0", "one1", "two1", "one2", "two2"]
    assert workers[0].result() == {"name": "one"}
    with pytest.raises(InputError, match="ended with code 1: ValueError: lost heart"):
        workers[1].result()
    assert workers[2].result() == {"name": "two"}
    assert jobs.run_job(str(script), {"name": "alone"}, tmp_path / "alone") == {"name": "alone"}


EARLIER = """
import sys
from jobs import serve
import rlhf.pace

def work(job):
    return {"updates": [{"step": rlhf.pace.SECONDS, **job["settings"]}], "path": sys.path[0]}

if __name__ == "__main__":
    serve(work)
"""


def test_another_checkouts_worker_runs_with_its_own_modules(tmp_path):
    """Its benchmark folder, its package, and in one of its modules another number."""
    checkout = tmp_path / "earlier"
    for folder in ("rlhf", "recipes/benchmarks"):
        (checkout / folder).mkdir(parents=True)
    (checkout / "rlhf/__init__.py").touch()
    (checkout / "rlhf/pace.py").write_text("SECONDS = 3\n")
    (checkout / "rlhf/errors.py").write_text("class InputError(Exception): pass\n")
    own = checkout / "recipes/benchmarks"
    (own / "ours_worker.py").write_text(EARLIER)
    (own / "jobs.py").write_text((ROOT / "recipes/benchmarks/jobs.py").read_text())
    job = {"checkout": str(checkout), "settings": {"bf16": False}, "replaced": {}}

    def run(name, replaced):
        given = job | {"replaced": replaced}
        return jobs.run_job("earlier_worker.py", given, tmp_path / name, site=checkout)

    assert run("as it is", {}) == {"updates": [{"step": 3, "bf16": False}], "path": str(own)}
    assert run("changed", {"rlhf.pace.SECONDS": 4})["updates"][0]["step"] == 4
    with pytest.raises(InputError, match="has no attribute 'MINUTES'"):
        run("misspelt", {"rlhf.pace.MINUTES": 4})
    assert earlier.worker_of(checkout) == own / "ours_worker.py"


@pytest.mark.parametrize("stage", ["sft", "reward_model", "sampling"])
def test_a_stage_by_turns(job, stage, monkeypatch):
    worker, waits = load("stage_worker"), []
    monkeypatch.setattr(worker, "STEPS", 2)
    for module in (worker, load("turns")):
        monkeypatch.setattr(module, "wait_for_turn", lambda: waits.append(None))
    result = worker.work(job | {"stage": stage, "updates": 3})
    assert len(result["updates"]) == len(waits) == 3
    assert all(update["step"] > 0 for update in result["updates"])


@pytest.mark.slow
def test_the_busy_process_is_busy_and_ends():
    with busy.busy_process() as process:
        before = cpu_seconds(process.pid)
        time.sleep(0.5)
        assert cpu_seconds(process.pid) > before
        assert process.poll() is None
    assert process.poll() is not None
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'recipes/benchmarks')!r}]\n"
    code += "import busy, os\nwith busy.busy_process() as process:\n    print(process.pid, flush=True)\n    os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    for _ in range(100):  # it ends with the process that started it, however that ended
        if not Path(f"/proc/{int(done.stdout)}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the busy process outlives the one that started it")


def cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


class Time:
    """A clock that moves when it is told to."""

    now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_phases_of_a_method_seen_from_outside(monkeypatch):
    """PhaseClock on a stand-in for trl's train()."""
    worker, wall = load("trl_worker"), Time()
    monkeypatch.setattr(worker, "_now", lambda: wall.now)
    reward, value = object(), object()
    module = SimpleNamespace(batch_generation=lambda *_: wall.pass_(2.0), get_reward=lambda *_: wall.pass_(4.0))
    clock = worker.PhaseClock()
    clock.reward_model = reward
    clock.watch(module)
    clock.on_train_begin(None, None, None)
    for _ in range(2):
        wall.pass_(0.5)  # the data loader
        module.batch_generation(None, None)
        wall.pass_(1.0)
        for _ in range(3):  # chunks of the rollout
            module.get_reward(value, None)
            module.get_reward(reward, None)
        wall.pass_(6.0)
        clock.on_step_end(None, None, None)
    expected = {"generate": 2.0, "score": 12.0, "logprobs": 13.0, "update": 6.0, "step": 33.5}
    assert clock.updates == [expected, expected]


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_agilerl_computes_in_the_runs_precision(bf16: bool, dtype: torch.dtype) -> None:
    """Its own default is bfloat16, which some CPUs only imitate."""
    worker, cases = load("agilerl_worker"), load("cases")
    settings = {"lora_rank": 4, "lora_alpha": 8, "bf16": bf16}
    given = worker.arguments(cases.CASES["tiny"], settings, SimpleNamespace(pad_token_id=0, pad_token="<pad>"))
    assert given["model_config"] == {"torch_dtype": dtype}


def test_scores_of_rows_of_unlike_lengths_for_agilerl() -> None:
    """Each as alone: right padding is not read."""
    worker = load("agilerl_worker")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    rows = [torch.tensor([ids]) for ids in ((5, 9, 13, 8), (7, 11))]
    together = worker.scores(model, rows, pad_id=0)
    alone = torch.cat([worker.scores(model, [row], pad_id=0) for row in rows])
    assert together.shape == (2,)
    assert torch.allclose(together, alone, atol=1e-6)
    assert abs(float(alone[0] - alone[1])) > 1e-4


def test_gold_is_measured_off_the_clock(tmp_path, tiny_tokenizer, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/eval_prompts.jsonl").write_text(json.dumps({"prompt": "w"}) + "\n")
    toy_clock, wall = load("toy_clock"), Time()
    monkeypatch.setattr(toy_clock.time, "perf_counter", lambda: wall.now)
    golds = iter([1.0, 3.0])

    class Slow(toy_clock.GoldClock):
        def gold(self, policy):
            assert policy == "policy"
            wall.pass_(50.0)
            return next(golds)

    job = {"run": str(tmp_path), "seed": 0, "mark": 2.0}
    clock = Slow(job, tiny_tokenizer)
    wall.pass_(7.0)
    clock.start()
    wall.pass_(1.0)
    clock.on_step_end(None, None, None, model=SimpleNamespace(policy="policy"))
    wall.pass_(2.0)
    with pytest.raises(toy_clock.MarkPassed):
        clock.on_step_end(None, None, None, model="policy")
    result = clock.result()
    assert result["seconds"] == result["trained_seconds"] == 3.0
    assert [(row["seconds"], row["gold_score"]) for row in result["history"]] == [(1.0, 1.0), (3.0, 3.0)]

    golds = iter([1.0, 1.5])
    late = Slow(job | {"at_most": 3.0}, tiny_tokenizer)
    late.start()
    wall.pass_(2.9)
    late.on_step_end(None, None, None, model="policy")
    wall.pass_(0.1)
    with pytest.raises(toy_clock.MarkPassed):
        late.on_step_end(None, None, None, model="policy")
    assert late.result()["seconds"] is None


def test_the_toy_configs_judge_is_the_gold_score():
    judge = load("toy_clock").judge()
    row = {"family": "arithmetic", "facts": json.dumps({"answer": 5, "steps": []})}
    assert judge(["?"], ["5."], **{name: [value] for name, value in row.items()})[0] > 0


@pytest.mark.long
@pytest.mark.parametrize("bf16", [None, True])
def test_ours_and_trls_side_by_side(tmp_path, monkeypatch, bf16):
    """Installs trl beside ours and runs both, on a tiny model."""
    benchmark = load("ppo_vs_trl")
    try:
        benchmark.install_trl(tmp_path / "trl")
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(cases.CASES, "tiny", tiny_case())
    config = benchmark.BenchmarkConfig(
        output_dir=str(tmp_path / "out"), only="speed", cases=["tiny"], updates=2, threads=1,
        trl_folder=str(tmp_path / "trl"), runs=["ours_adapter", "ours_full", *cases.TRL], bf16=bf16,
    )  # fmt: skip
    board = benchmark.benchmark(config)
    assert board.failures == []
    runs = json.loads((tmp_path / "out/results.json").read_text())["speed"]["tiny"]["runs"]
    # fewer where two of them are the same without bfloat16
    expected = cases.runs_here(config.runs, bf16 or bf16_hardware())
    assert {run: one["precision"] for run, one in runs.items()} == {
        run: cases.precision(settings) for run, settings in expected.items()
    }
    assert {run: result["response_tokens"] for run, result in runs.items()} == {run: [20, 20] for run in expected}
    for result in runs.values():
        for seconds in result["updates"]:
            assert all(value > 0 for value in seconds.values())
    text = (tmp_path / "out/tables.md").read_text()
    assert "ours against the limit" in text
    started = text.partition("seconds until the first update is done")[2]
    assert all(f"| tiny, {run} |" in started for run in expected)


@pytest.mark.long
def test_ablation_comparison_and_busy_machine(tmp_path, monkeypatch):
    """Each from its flag to its table, on a tiny model."""
    benchmark = load("ppo_vs_trl")
    monkeypatch.setitem(cases.CASES, "tiny", tiny_case())
    monkeypatch.setattr(busy, "TOY", tiny_case())
    monkeypatch.setattr(busy, "STAGES", ("reward_model", "ppo_tiny"))
    config = benchmark.BenchmarkConfig(
        output_dir=str(tmp_path), cases=["tiny"], runs=["ours_adapter", "ours_full"], updates=2, threads=1,
        ablate=True, tricks=["gated", "fused_lora"], before=str(ROOT), before_variants={"wide": {"lora_rank": 8}},
        busy=True,
    )  # fmt: skip
    board = benchmark.benchmark(config)
    assert board.failures == []
    results = json.loads((tmp_path / "results.json").read_text())
    assert {run: list(tricks) for run, tricks in results["ablation"].items()} == {
        "tiny: ours_adapter": ["with all", "gated", "fused_lora"], "tiny: ours_full": ["with all", "gated"]
    }  # fmt: skip
    assert list(results["before"]["tiny: ours_adapter"]) == ["today", "before", "wide"]
    assert {stage: len(times["busy"]) for stage, times in results["busy"].items()} == {"reward_model": 2, "ppo_tiny": 2}
    text = (tmp_path / "tables.md").read_text()
    for title in ("tiny, ours_full (float32), without", "What stays", "Beside one busy process"):
        assert f"### {title}" in text


@pytest.mark.long
def test_a_toy_chain_is_made_and_ours_runs_on_it(tmp_path, monkeypatch):
    """The quality part from nothing, with the smoke config in the toy's place."""
    toy_clock, toy_mark, ours = map(load, ("toy_clock", "toy_mark", "quality_ours"))
    for module in (toy_clock, toy_mark):
        monkeypatch.setattr(module, "TOY", ROOT / "recipes/configs/smoke.yaml")
    monkeypatch.chdir(ROOT)
    job = {"run": str(tmp_path / "run"), "seed": 0, "folder": str(tmp_path / "ours"), "updates": 2}
    with recipe._restored():
        monkeypatch.setattr(sys, "path", [*sys.path])
        mark = toy_mark.work(job)
        assert mark["mark"] == pytest.approx((mark["sft"] + mark["best_of_16"]) / 2)
        result = ours.work(job | {"mark": 10.1, "settings": quality.BOTH})  # gold ends at 10
        assert result["seconds"] is None
        assert [row["update"] for row in result["history"]] == [1, 2]
        passed = ours.work(job | {"mark": 0.0, "settings": {}, "folder": str(tmp_path / "again")})
    assert passed["seconds"] == passed["history"][0]["seconds"] > 0
    assert len(passed["history"]) == 1
