"""The benchmark's comparison of sampling: PPO's engine, transformers' generate, vLLM (a stand-in; the real one:
tests/sampling/test_vllm_real.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reference import recipe
from transformers import AutoModelForCausalLM

from rlhf.errors import InputError

sampling, worker, cases, jobs, parts, benchmark = map(
    recipe.load_benchmark, ("sampling", "sampling_worker", "cases", "jobs", "gpu_parts", "ppo_vs_trl")
)
for lazily in ("ours_worker", "vllm_server"):  # which a worker imports when it needs them
    recipe.load_benchmark(lazily)
CASE = parts.case_of("small", tiny=True)  # 4 prompts of 6 to 12 tokens, 6 new ones


@pytest.fixture
def job(tmp_path):
    """A model that would stop at any token, were it asked to."""
    asked = {"case": CASE.as_job(), "model": None, "folder": str(tmp_path)}
    made = recipe.load_benchmark("synthetic").work(asked)
    model = AutoModelForCausalLM.from_pretrained(made["model"])
    model.generation_config.eos_token_id = list(range(400))
    model.generation_config.save_pretrained(made["model"])
    settings = cases.settings_here("ours_adapter", None)
    return asked | made | {"bf16_hardware": None, "updates": 3, "settings": settings}


def test_by_hand():
    def result(*rollouts, **start):
        tokens, seconds = zip(*rollouts, strict=True)
        return {"updates": [{"step": s} for s in seconds], "response_tokens": list(tokens), "start": start}

    start = {"imports": 1.0, "ready": 2.5, "first_rollout": 0.5}
    found = {
        "ours": result((24, 9.0), (24, 2.0), (24, 3.0), (24, 2.4), **start),  # 12, 8 and 10 a second
        "generate": result((24, 9.0), (24, 4.8), **start),
    }
    text = sampling.table(found)
    assert "| PPO's own engine | 10.0 | 8.0-12.0 | 2.00 |" in text
    assert "| transformers' generate | 5.0 | 5.0-5.0 | 1.00 |" in text
    assert "| PPO's own engine | 1.0 | 2.5 | 0.5 | 4.0 |" in sampling.start_table(found)
    assert "| PPO's own engine | 10.0 | 8.0-12.0 | - |" in sampling.table({"ours": found["ours"]})
    assert sampling.table({}) == sampling.start_table({}) == ""


@pytest.mark.parametrize("engine", ["ours", "generate"])
def test_every_rollout_is_whole(job, engine, monkeypatch):
    """No stop id of the model's ends a response; it waits for its turn after each rollout."""
    waits = []
    monkeypatch.setattr(worker, "wait_for_turn", lambda: waits.append(None))
    found = worker.work(job | {"engine": engine})
    assert found["response_tokens"] == [4 * 6] * 3
    assert len(found["updates"]) == len(waits) == 3
    assert min(found["start"].values()) > 0
    assert list(found["start"]) == ["imports", "ready", "first_rollout"]
    assert found["peak_bytes"] > 0


def test_what_vllm_is_asked(job, tmp_path, monkeypatch):
    """The adapter under its name, every prompt with a seed of its own, as many tokens as the others write."""
    server, seen = recipe.load_benchmark("vllm_server"), []

    class Serving:
        def __init__(self, python, made, folder, case, flags):
            assert (python, case) == ("P", CASE)
            assert flags[-3:] == ["--lora-modules", f"adapter={tmp_path}/adapter", "--enforce-eager"]
            assert (Path(folder) / "adapter/adapter_config.json").is_file()

        def __enter__(self):
            return "caller"

        def __exit__(self, *error):
            seen.append("ended")

    def sample(caller, model, prompt, new_tokens, seed):
        seen.append((model, len(prompt), new_tokens, seed))
        return new_tokens

    monkeypatch.setattr(server, "check", lambda python, cuda: None)
    monkeypatch.setattr(server, "server", Serving)
    monkeypatch.setattr(server, "sample", sample)
    found = worker.work(job | {"engine": "vllm", "vllm_python": "P", "vllm_flags": ["--enforce-eager"], "updates": 2})
    assert found["response_tokens"] == [24, 24]
    assert seen.pop() == "ended"
    assert sorted(asked[3] for asked in seen) == list(range(8))
    assert sorted(asked[:3] for asked in seen) == sorted([("adapter", n, 6) for n in CASE.prompt_lengths] * 2)


def test_engines_take_turns(tmp_path, monkeypatch):
    """vLLM only where its Python is named; every engine gets the same job."""
    asked = {}

    class Board:
        folder = tmp_path

        def made(self, name, case, model):
            return {"bf16_hardware": None, "model": model}

        def in_turns(self, title, workers, updates):
            asked.update({engine: json.loads((one.folder / "job.json").read_text()) for engine, one in workers.items()})
            return {}

        def keep(self, part, result):
            pass

        def show(self, title, text):
            assert text == ""

    sampling.measure(Board(), ["tiny"], "M", 3, 1, None)
    assert list(asked) == ["ours", "generate"]
    assert (asked["ours"]["settings"]["bf16"], asked["generate"]["bf16_hardware"]) == (False, None)
    sampling.measure(Board(), ["tiny"], "M", 3, 1, "P", bf16=True)
    assert (asked["ours"]["settings"]["bf16"], asked["generate"]["bf16_hardware"]) == (True, True)
    assert list(asked) == ["ours", "generate", "vllm"]
    own = ("engine", "folder")
    first, *others = ({name: value for name, value in job.items() if name not in own} for job in asked.values())
    assert all(other == first for other in others)
    assert (first["vllm_python"], first["updates"]) == ("P", 3)


def test_a_python_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"vllm_python=.*: no such file; make vllm-env makes"):
        benchmark.benchmark(benchmark.BenchmarkConfig(output_dir=str(tmp_path), vllm_python=str(tmp_path / "python")))


@pytest.mark.slow
def test_from_the_flag_to_the_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(cases.CASES, "tiny", CASE)
    config = benchmark.BenchmarkConfig(output_dir=str(tmp_path), only="sampling", cases=["tiny"], updates=2, threads=1)
    board = benchmark.benchmark(config)
    assert board.failures == []
    results = json.loads((tmp_path / "results.json").read_text())["sampling"]["tiny"]
    assert list(results) == ["ours", "generate"]
    text = (tmp_path / "tables.md").read_text()
    assert "tiny: sampling, 4 prompts of 6-12 tokens, 6 new tokens" in text
    assert "tiny: seconds until the first rollout" in text
