"""What gpu.sh runs on a machine with a GPU: the driver on stand-ins for its parts, the counted numbers by hand, the
shapes against the real models', and the whole of it on a CPU with tiny shapes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from reference import recipe
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.models import torch_flash

gpu, numbers, cases, limit, tables = map(
    recipe.load_benchmark, ("gpu", "gpu_numbers", "cases", "limit", "bench_tables")
)
parts = recipe.load_benchmark("gpu_parts")

PARTS = """
import json, subprocess, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
found = Path(job["folder"], "result.json")
if job["part"] == "good":
    found.write_text(json.dumps({"tables": {"numbers": "| a | b |"}, "tiny": job["tiny"]}))
if job["part"].startswith("slow"):
    found.write_text(json.dumps({"half": 1}))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(job["folder"], "child").write_text(str(child.pid))
    time.sleep(600)
if job["part"] == "broken":
    raise ValueError("no such card")
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Run gpu.main on parts that need no torch; return its exit code and the folder."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/gpu_parts.py").write_text(PARTS)
    monkeypatch.setattr(gpu, "HERE", tmp_path / "scripts")
    chosen = (
        gpu.Part("good", 1, 30, "what works"), gpu.Part("slow", 1, 1.5, "what never ends"),
        gpu.Part("broken", 1, 30, "what fails"), gpu.Part("last", 1, 30, "the end"),
        gpu.Part("absent", 1e6, 2e6, "what stands on something", ("json", "no_such_package")),
    )  # fmt: skip
    monkeypatch.setattr(gpu, "PARTS", chosen)
    return lambda *flags: (gpu.main([*flags, "--output_dir", str(tmp_path / "out")]), tmp_path / "out")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_costs_itself_alone(driver, capsys):
    code, folder = driver("--tiny")
    assert code == 1
    results = json.loads((folder / "gpu.json").read_text())
    assert {name: result["status"] for name, result in results.items()} == {
        "good": "fine", "slow": "stopped", "broken": "failed", "last": "fine", "absent": "skipped"
    }  # fmt: skip
    assert results["good"]["tiny"] is True
    assert results["slow"]["half"] == 1  # what it had found by then
    assert results["slow"]["why"].startswith("not done in its 2 s; see ")
    assert results["broken"]["why"].startswith("ValueError: no such card (see ")
    assert results["absent"]["why"] == "not installed: no_such_package"
    child = int((folder / "slow/child").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.02)
    else:
        pytest.fail("what a stopped part had started lives on")
    page = (folder / "gpu.md").read_text()
    assert "| good | what works | fine |" in page
    assert "| absent | what stands on something | skipped: not installed: no_such_package | 0 |" in page
    assert "## good: numbers\n\n| a | b |" in page
    assert capsys.readouterr().out.endswith(f"{page}\n")


def test_time_that_is_up_and_single_parts(driver):
    code, folder = driver("--seconds", "0.2")
    assert code == 0
    results = json.loads((folder / "gpu.json").read_text())
    reasons = [result["why"] for result in results.values()]
    assert reasons == ["no time was left"] * 4 + ["not installed: no_such_package"]
    code, folder = driver("--only", "good,last")
    assert code == 0
    assert list(json.loads((folder / "gpu.json").read_text())) == ["good", "last"]
    with pytest.raises(SystemExit):
        driver("--only", "goof")


def test_parts_that_all_hang_leave_the_last_one_its_time(driver, monkeypatch):
    """The first gets all but what is kept for the others; one that cannot run keeps nothing."""
    hanging = [gpu.Part(f"slow{n}", 0.5, 60, "what never ends") for n in range(3)]
    absent = gpu.Part("absent", 1e6, 2e6, "what stands on something", ("no_such_package",))
    monkeypatch.setattr(gpu, "PARTS", (*hanging, absent, gpu.Part("good", 1.5, 60, "what works")))
    monkeypatch.setattr(gpu, "ENDING", 0.1)
    code, folder = driver("--seconds", "4.3")
    assert code == 1
    results = json.loads((folder / "gpu.json").read_text())
    assert [result["status"] for result in results.values()] == ["stopped"] * 3 + ["skipped", "fine"]
    assert results["slow0"]["seconds"] == pytest.approx(1.5, abs=0.4)
    assert results["slow2"]["seconds"] >= 0.5


def test_more_seconds_raise_every_limit(driver):
    _, folder = driver("--only", "slow", "--seconds", str(gpu.SECONDS * 2))
    assert "not done in its 3 s" in json.loads((folder / "gpu.json").read_text())["slow"]["why"]


def test_whose_vllm_is_started(tmp_path, monkeypatch, driver, capsys):
    """The named Python, else that of .venv-vllm, else this one; without any the part is skipped and says what to do."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    have = {"vllm": None}
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: have[name] if name in have else find(name))
    assert gpu.vllm_python(None) is None
    monkeypatch.setattr(gpu, "PARTS", (gpu.Part("vllm", 1, 30, "a vLLM server"),))
    code, folder = driver()
    assert code == 0
    result = json.loads((folder / "gpu.json").read_text())["vllm"]
    assert result["status"] == "skipped"
    assert "--vllm_python" in result["why"]
    assert ".venv-vllm/bin/pip install vllm" in result["why"]
    have["vllm"] = "found"
    assert gpu.vllm_python(None) == sys.executable
    (tmp_path / ".venv-vllm/lib/python3.11/site-packages/vllm").mkdir(parents=True)
    own = tmp_path / ".venv-vllm/bin/python"
    own.parent.mkdir()
    own.touch()
    assert gpu.vllm_python(None) == str(own)
    (tmp_path / "link").symlink_to(own)
    assert gpu.vllm_python(str(tmp_path / "link")) == str(tmp_path / "link")  # in an environment it is a link
    assert driver("--vllm_python", str(own))[0] == 0
    assert json.loads((folder / "vllm/job.json").read_text())["vllm_python"] == str(own)
    with pytest.raises(SystemExit):
        driver("--vllm_python", str(tmp_path / "missing"))
    assert "--vllm_python: " in capsys.readouterr().err


def test_limits_by_hand():
    first, second, third = (gpu.Part("", least, most, "") for least, most in ((20, 90), (30, 50), (10, 40)))
    assert gpu.limit(first, [second, third], 200) == 90  # all it can use
    assert gpu.limit(first, [second, third], 100) == 56  # 30 and 10 are kept, and 2 for the end of each
    assert gpu.limit(first, [third], 110) == 90
    assert gpu.limit(first, [second, third], 35) == 20  # too little for all: its own minimum
    assert gpu.limit(second, [third], 15) == 15
    assert gpu.limit(third, [], 100) == 40


def test_the_parts_and_their_limits():
    assert [part.name for part in gpu.PARTS] == list(parts.PARTS)
    assert gpu.SECONDS <= 540 - 5  # nine minutes, and what the driver itself takes
    assert all(0 < part.least <= part.seconds < gpu.SECONDS / 2 for part in gpu.PARTS)
    assert sum(part.least for part in gpu.PARTS) <= gpu.SECONDS - len(gpu.PARTS) * gpu.ENDING
    left = gpu.SECONDS
    for number, part in enumerate(gpu.PARTS, 1):  # where each uses up its limit, and what is kept for its end
        given = gpu.limit(part, gpu.PARTS[number:], left)
        assert given >= part.least, part.name
        left -= given + gpu.ENDING
    everything = {run for groups in (parts.SMALL, parts.LARGE) for group in groups for run in group}
    assert everything == set(parts.RUNS)


def test_what_trl_takes_costs_no_number_of_ours(tmp_path, monkeypatch):
    """A part that is stopped in trl's updates has kept all of ours."""

    class Turns:
        failures, folder = [], tmp_path

        def __init__(self, folder):
            pass

        def in_turns(self, size, workers, updates):
            groups.append((set(workers), updates))
            if any(run in parts.TRL for run in workers):
                raise KeyboardInterrupt
            return {run: {"updates": [{}] * updates, "response_tokens": [1] * updates} for run in workers}

    class Nothing:
        def start(self):
            pass

    kept, groups, counted = [], [], []

    def summarize(result):
        counted.append(len(result["updates"]))
        return {}

    for name, stand_in in {
        "Board": Turns, "worker_of": lambda *given: Nothing(), "peaks": lambda *given: {}, "summarize": summarize,
        "keep": lambda job, found: kept.append(set(found["runs"])), "hindrance": lambda *given: None,
        "made": lambda *given: {"sizes": {}},
    }.items():  # fmt: skip
        monkeypatch.setattr(parts, name, stand_in)
    monkeypatch.setattr(parts.Sizes, "of", lambda sizes: None)
    monkeypatch.setattr(parts.gpu_numbers, "of", lambda *given: {})
    monkeypatch.setattr(parts.gpu_numbers, "table", lambda found: "")
    with pytest.raises(KeyboardInterrupt):
        parts.ppo_small({"folder": str(tmp_path), "tiny": True})
    assert kept[-1] == {run for run in parts.RUNS if "ours" in run} - {"ours_qlora", "ours_adapter, beside trl"}
    assert groups[-1] == ({"ours_adapter, beside trl", "trl_lora_bf16"}, 2)  # in turn, an update each
    assert ({"ours_adapter, one ahead"}, 3) in groups  # by itself; its last update, beside nothing, is not counted
    assert set(counted) == {2}


def test_who_takes_turns_with_trl(tmp_path):
    """The same settings in one group, where the card holds both; without trl nothing is run a second time."""
    beside = [group for group in parts.SMALL if set(group) & set(parts.TRL)]
    assert beside == [("ours_adapter, beside trl", "trl_lora_bf16")]
    assert parts.RUNS["ours_adapter, beside trl"] == parts.RUNS["ours_adapter"]
    assert ("trl_lora_bf16",) in parts.LARGE
    why = parts.hindrance("ours_adapter, beside trl", {"trl_folder": str(tmp_path), "cuda": True})
    assert why == f"no trl 1.12.0 in {tmp_path}"


def test_a_part_names_every_package_that_ppo_imports():
    """Else a machine without it is told that the part failed."""
    project = tomllib.loads((recipe.ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", line)[0].replace("PyYAML", "yaml") for line in project["dependencies"]}
    assert set(gpu.PPO) == needed - {"trl", "datasets"}  # which the parts that use them name


@pytest.mark.parametrize(("size", "weights"), [("small", 596_049_920), ("large", 4_022_468_096)])
def test_the_shapes_are_those_of_qwen3(size, weights):
    """0.6B and 4B: the parameters that their model cards and files have, embeddings counted once."""
    shape = parts.case_of(size, tiny=False).shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, tie_word_embeddings=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == weights


def test_a_run_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    job = {"trl_folder": str(tmp_path / "trl"), "cuda": True}
    assert parts.hindrance("ours_adapter", job) is None
    assert parts.hindrance("trl_lora_bf16", job) == f"no trl 1.12.0 in {tmp_path / 'trl'}"
    (tmp_path / "trl/trl/experimental/ppo").mkdir(parents=True)
    (tmp_path / "trl/trl/experimental/ppo/ppo_trainer.py").touch()
    assert parts.hindrance("trl_lora_bf16", job) is None
    for here, itself in ((True, "packed"), (False, "padded")):
        monkeypatch.setattr(torch_flash, "works", lambda *given, here=here: here)
        said = {run: parts.hindrance(f"ours_adapter, {run}", job) for run in ("packed", "padded")}
        why = f"ours_adapter does so itself {'with' if here else 'without'} flash attention"
        assert said == {run: why if run == itself else None for run in said}
    monkeypatch.setitem(parts.RUNS, "new", {"bf16": True, "of_tomorrow": 1})
    assert parts.hindrance("new", job) == "PPOConfig has no of_tomorrow"
    monkeypatch.setitem(parts.RUNS, "wrong", {"lora_rank": -1})
    assert "lora_rank=-1" in parts.hindrance("wrong", job)
    monkeypatch.setitem(parts.RUNS, "half", {"bf16": True})
    monkeypatch.setitem(parts.PACKAGES, "bf16", "no_such_package")
    assert parts.hindrance("half", job) == "not installed: no_such_package"
    assert parts.hindrance("half", job | {"cuda": False}) == "bf16 needs a GPU; not installed: no_such_package"


def test_use_of_the_card_by_hand():
    """A run that took twice its counted time at the peak uses half of it; trl's value model is trained whole."""
    case = parts.case_of("small", tiny=True)
    sizes = limit.Sizes(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=400,
    )  # fmt: skip
    machine = {"bfloat16": 1e9, "float32": 1e8, "bandwidth": 1e9}
    works = limit.count(limit.update_of({"bf16": True}, case, sizes))
    seconds = {"generate": 2 * works["generate"].flops / 1e9, "update": 4 * works["update"].flops / 1e9}
    one = {"score": 1.0, "logprobs": 1.0, **seconds, "step": 9.0}
    result = {"updates": [one, one], "response_tokens": [24, 24], "peak_bytes": 2**30, "precision": "bfloat16"}
    result["rows"] = "packed, torch's flash attention"
    found = numbers.of("ours_full", {"bf16": True}, case, sizes, machine, tables.summarize(result))
    assert found["sampling_mfu"] == pytest.approx(0.5)
    assert found["training_mfu"] == pytest.approx(0.25)
    assert found["sampled_tokens_per_second"] == pytest.approx(4 * 6 / seconds["generate"])
    trained = sum(case.prompt_lengths) + 4 * 6
    assert found["trained_tokens_per_second"] == pytest.approx(trained / seconds["update"])
    assert found["rows"] == "packed, torch's flash attention"
    assert "| ours_full | bfloat16 | packed, torch's flash attention | 9.00 |" in numbers.table({"ours_full": found})
    assert "| 50.0% | 25.0% |" in numbers.table({"ours_full": found})
    ahead = numbers.of("ours_full", {"bf16": True, "rollouts_ahead": 1}, case, sizes, machine, tables.summarize(result))
    assert (ahead["sampling_mfu"], ahead["training_mfu"]) == (None, found["training_mfu"])
    assert "| - | " in numbers.table({"ahead": ahead})
    # A full policy and a full value model are what both full runs train; of trl's LoRA run only the second is whole.
    full, lora = {"bf16": True}, {"autocast": True, "bf16": True, "lora_rank": 3, "lora_alpha": 8.0}
    alone = {kind: limit.count(limit.update_of(full | {"value_model": kind}, case, sizes))["update"].flops
             for kind in ("separate", "shared_trunk")}  # fmt: skip
    adapter = limit.count(limit.update_of(lora | {"value_model": "shared_trunk"}, case, sizes))["update"].flops
    assert numbers.training_flops("trl_defaults", full, case, sizes) == alone["separate"]
    assert numbers.training_flops("trl_lora", lora, case, sizes) == pytest.approx(
        adapter + alone["separate"] - alone["shared_trunk"]
    )


@pytest.mark.long
def test_all_of_it_on_a_cpu(tmp_path):
    """gpu.sh --tiny from end to end. Here are no tests marked gpu that run, no vLLM, no trl 1.12: all said."""
    script = recipe.ROOT / "recipes/benchmarks/gpu.sh"
    settings = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    flags = ["--tiny", "--output_dir", str(tmp_path), "--trl_folder", str(tmp_path / "no_trl")]
    done = subprocess.run(["bash", script, *flags], capture_output=True, text=True, env=settings, check=False)
    results = json.loads((tmp_path / "gpu.json").read_text())
    status = {name: result["status"] for name, result in results.items()}
    assert set(status.values()) <= {"fine", "skipped"}, done.stdout
    assert done.returncode == 0
    assert {name for name, one in status.items() if one == "fine"} >= {
        "machine", "tests", "preflight", "ppo_small", "ppo_large", "stages"
    }  # fmt: skip
    assert "ours_adapter" in results["ppo_large"]["runs"]
    assert results["ppo_large"]["left_out"]["trl_lora_bf16"].startswith("no trl 1.12.0 in")
    assert "ours_adapter, one ahead" in results["ppo_small"]["runs"]
    for name, run in results["ppo_small"]["runs"].items():
        assert run["sampled_tokens_per_second"] is None if "ahead" in name else run["sampled_tokens_per_second"] > 0
        assert run["peak_gib"] > 0
    assert "load_in_4bit needs a GPU" in results["stages"]["tables"]["left out"]
    assert not (tmp_path / "models").exists()
