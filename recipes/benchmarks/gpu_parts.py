"""The parts of gpu.py, a function each. Started by it, on a job file.

A part keeps what it has found after every step (`keep`), so that what its time limit cuts off is not lost.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_numbers
from bench_tables import markdown, ratio_table, summarize
from board import Board
from cases import LORA, OURS, TRL, Case, precision
from jobs import ROOT, Job, Result, Worker, run_job
from limit import Sizes
from ppo_vs_trl import TRL_VERSION

from rlhf.errors import InputError

ADAPTER = OURS["ours_adapter"]
RUNS: dict[str, dict[str, Any]] = {
    "ours_full": {"bf16": True},
    "ours_full, adamw_8bit": {"bf16": True, "optimizer": "adamw_8bit"},
    "ours_adapter": ADAPTER,
    "ours_adapter, padded": ADAPTER | {"packing": "off"},
    "ours_adapter, packed": ADAPTER | {"packing": "on"},
    "ours_adapter, one ahead": ADAPTER | {"rollouts_ahead": 1},
    "ours_qlora": ADAPTER | {"load_in_4bit": True},
    "ours_adapter, beside trl": ADAPTER,
    "trl_lora_bf16": TRL["trl_lora_bf16"],
}
BESIDE = {"ours_adapter, beside trl": "trl_lora_bf16"}
"""Runs that are made once more, in turn with another; without it they say nothing new."""
SMALL = (
    ("ours_adapter", "ours_adapter, padded", "ours_adapter, packed"),
    ("ours_full", "ours_full, adamw_8bit"),
    ("ours_adapter, one ahead",),
    ("ours_adapter, beside trl", "trl_lora_bf16"),
)
LARGE = (("ours_adapter", "ours_qlora"), ("trl_lora_bf16",))
"""Groups of runs. Those of a group take turns, are on the card together and are kept together, so trl's comes last:
where it uses up the time, ours are kept, and the run that takes turns with it is made once more. At 4B trl is alone:
its value model, trained whole, takes 64 GB with gradients and moments, beside its policy and reward model; the runs
before it are the comparison there. So is a run that samples ahead: while it waited for its turn it would sample on, off
the clock."""
PACKAGES = {"load_in_4bit": "bitsandbytes", "optimizer": "bitsandbytes"}
"""What a setting stands on, besides a GPU."""


def qwen3(hidden: int, layers: int, heads: int, key_value: int, intermediate: int, vocabulary: int = 151936) -> dict:
    """Return the sizes of a Qwen3 with tied embeddings."""
    head_dim = 128 if hidden > 128 else 32  # the smallest that vLLM computes
    return {
        "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value, "head_dim": head_dim,
        "intermediate_size": intermediate,
    }  # fmt: skip


def case_of(size: str, tiny: bool) -> Case:
    """Return the update that is measured: small is Qwen3-0.6B's shape, large Qwen3-4B's."""
    if tiny:
        shape, lengths = qwen3(64, 2, 4, 2, 96, vocabulary=400), {"prompt_tokens": (6, 12), "new_tokens": 6}
        return Case(shape=shape, rollout_size=4, inner_epochs=1, minibatches=2, tokens_per_microbatch=64, **lengths)
    shape = qwen3(1024, 28, 16, 8, 3072) if size == "small" else qwen3(2560, 36, 32, 8, 9728)
    return Case(
        shape=shape, rollout_size=64, prompt_tokens=(64, 192), new_tokens=128, inner_epochs=2, minibatches=4,
        tokens_per_microbatch=8192 if size == "small" else 4096,
    )  # fmt: skip


def made(job: Job, size: str) -> Job:
    """Return a job on a size's case, without settings; the first part that asks makes model and tokenizer."""
    folder, case = Path(job["models"]) / size, case_of(size, job["tiny"])
    known = folder / "result.json"
    asked = {"case": case.as_job(), "model": None}
    return asked | (json.loads(known.read_text()) if known.is_file() else run_job("synthetic.py", asked, folder))


def keep(job: Job, result: Result) -> None:
    """Write what the part has found so far."""
    Path(job["folder"], "result.json").write_text(json.dumps(result, indent=1) + "\n")


def hindrance(run: str, job: Job) -> str | None:
    """Return why a run cannot be made here: no such setting in this version, a missing package, no trl 1.12."""
    from rlhf.ppo.config import PPOConfig

    if run in BESIDE:
        return hindrance(BESIDE[run], job)
    if run in TRL:
        trainer = Path(job["trl_folder"], "trl/experimental/ppo/ppo_trainer.py")
        reasons = [] if trainer.is_file() else [f"no trl {TRL_VERSION} in {job['trl_folder']}"]
        reasons += [] if importlib.util.find_spec("datasets") else ["not installed: datasets"]
    else:
        fields = {field.name for field in dataclasses.fields(PPOConfig)}
        reasons = [f"PPOConfig has no {name}" for name in RUNS[run] if name not in fields]
        try:
            PPOConfig(**{name: value for name, value in RUNS[run].items() if name in fields})
        except InputError as error:
            reasons.append(str(error))
        reasons += missing(RUNS[run], job)
        if job["cuda"] and RUNS[run].get("packing") == ("on" if flash() else "off"):
            reasons.append(f"ours_adapter does so itself {'with' if flash() else 'without'} flash attention")
    return "; ".join(reasons) or None


def flash() -> bool:
    """Return whether there is flash attention here: of flash-attn, or torch's own."""
    import torch

    from rlhf.models import torch_flash

    package = importlib.util.find_spec("flash_attn") is not None
    return package or torch_flash.works(torch.device("cuda"), torch.bfloat16)


def missing(settings: Mapping[str, Any], job: Job) -> list[str]:
    """Return what settings stand on and is not here: a GPU, packages."""
    found = [name for name in settings if name in PACKAGES]
    absent = [PACKAGES[name] for name in found if importlib.util.find_spec(PACKAGES[name]) is None]
    return [f"{name} needs a GPU" for name in found if not job["cuda"]] + [f"not installed: {name}" for name in absent]


# -- the parts ---------------------------------------------------------------------------------------------


def machine(job: Job) -> None:
    """Report versions and the card; measure its matrix products at the small shape, and its memory's bandwidth."""
    import torch

    from rlhf.run import environment

    numbers = peaks(job, made(job, "small"))
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0
    rows = [
        ["device", numbers["device"]],
        ["memory, GB", f"{memory:.0f}"],
        ["bfloat16, TFLOP/s", f"{numbers['bfloat16'] / 1e12:.1f}"],
        ["float32, TFLOP/s", f"{numbers['float32'] / 1e12:.1f}"],
        ["bandwidth, GB/s", f"{numbers['bandwidth'] / 1e9:.0f}"],
    ]
    tables = {"the card": markdown(["what", "measured"], rows), "versions": f"```\n{environment.report()}\n```"}
    keep(job, {"machine": numbers, "tables": tables})


def tests(job: Job) -> None:
    """Run the tests marked gpu, in the files that have some; a file that cannot be imported costs itself."""
    folder = ROOT / "tests"
    files = [p for p in sorted(folder.rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text(encoding="utf-8")]
    if not files:
        keep(job, {"tables": {"tests": f"none: {folder} holds no test marked gpu (the wheel has no tests)"}})
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfEs", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "--basetemp", str(Path(job["folder"], "pytest")), *map(str, files)]
    said = Path(job["folder"], "pytest.txt")
    with said.open("w") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    text = said.read_text(errors="replace").splitlines() or [""]
    lines = [line for line in text if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", text[-1])
    table = "\n".join([", ".join(counts) or "no count", *(f"- {line}" for line in lines)])
    keep(job, {"passed": done.returncode in (0, 5), "tables": {"tests": table}})
    if done.returncode not in (0, 5):  # 5: none was collected
        raise SystemExit(f"pytest ended with code {done.returncode}: {', '.join(counts)}")


def preflight(job: Job) -> None:
    """Show what the checks before PPO's first step measure in bfloat16, full weights and LoRA."""
    import ours_worker

    from rlhf.ppo.preflight import ppo_findings

    one, rows, failed = made(job, "small"), [], []
    for run in ("ours_full", "ours_adapter"):
        folder = str(Path(job["folder"], run))
        trainer = ours_worker.trainer_of(one | {"folder": folder, "updates": 1, "settings": RUNS[run]})
        for phase in ppo_findings(trainer):
            for finding in phase:
                if finding.check == "reload":  # this reward model was never saved
                    continue
                rows.append([run, finding.check, finding.measured.replace("|", "/"), "ok" if finding.ok else "FAILED"])
                failed += [] if finding.ok else [f"{run}: {finding}"]
        del trainer
        keep(job, {"tables": {"in bfloat16": markdown(["run", "check", "measured", "verdict"], rows)}})
    if failed:
        raise SystemExit(f"{len(failed)} checks failed, first {failed[0]}")


def ppo(job: Job, size: str, groups: Sequence[Sequence[str]], updates: int) -> None:
    """Measure groups of runs. Those of a group take turns, an update each; their first ones, which warm up, overlap."""
    one, board, case = made(job, size) | {"updates": updates}, Board(Path(job["folder"])), case_of(size, job["tiny"])
    card, sizes = peaks(job, one), Sizes.of(one["sizes"])
    numbers: dict[str, Any] = {}
    tables: dict[str, str] = {}
    left_out = {run: why for group in groups for run in group if (why := hindrance(run, job))}
    for group in groups:
        more = any(RUNS[run].get("rollouts_ahead") for run in group)  # an update: the last one samples nothing ahead
        asked = one | {"updates": updates + more}
        workers = {run: worker_of(run, asked, job, board.folder) for run in group if run not in left_out}
        for worker in workers.values():
            worker.start()
        failed, of_group = len(board.failures), {}
        for run, result in board.in_turns(size, workers, updates + more).items():
            whole = {name: result[name][:updates] for name in ("updates", "response_tokens")}
            of_group[run] = summary = summarize(result | whole | {"precision": precision(RUNS[run])})
            numbers[run] = gpu_numbers.of(run, RUNS[run], case, sizes, card, summary)
        left_out |= dict(line.removeprefix(f"{size}: ").split(": ", 1) for line in board.failures[failed:])
        tables["seconds, tokens, use of the card"] = gpu_numbers.table(numbers)
        beside = ratio_table(of_group) if set(of_group) & set(BESIDE) else ""
        tables |= {"beside trl, in turn": beside} if beside else {}
        tables |= {"left out": markdown(["run", "why"], list(left_out.items()))} if left_out else {}
        keep(job, {"runs": numbers, "left_out": left_out, "machine": card, "tables": tables})
    if board.failures:
        raise SystemExit(f"{len(board.failures)} runs failed, first {board.failures[0]}")


def worker_of(run: str, one: Job, job: Job, folder: Path) -> Worker:
    """Return one run's process, which waits after each update."""
    own, asked = folder / run.replace(", ", "_"), one | {"settings": RUNS[run]}
    if run not in TRL:
        return Worker("ours_worker.py", asked, own, in_turns=True)
    mixed = "bf16" if RUNS[run]["autocast"] else "no"
    site = Path(job["trl_folder"])
    return Worker("trl_worker.py", asked, own, site=site, in_turns=True, ACCELERATE_MIXED_PRECISION=mixed)


def peaks(job: Job, one: Job) -> dict[str, Any]:
    """Measure the card's matrix products at a model's shapes, and its memory's bandwidth."""
    import machine as measured
    import torch

    numbers = measured.work({"sizes": one["sizes"], "tokens": 64 if job["tiny"] else 8192})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the runs need it
    return numbers


def ppo_small(job: Job) -> None:
    ppo(job, "small", SMALL, updates=2 if job["tiny"] else 3)


def ppo_large(job: Job) -> None:
    ppo(job, "large", LARGE, updates=2)


def stages(job: Job) -> None:
    """Train our SFT and reward model and trl's in turn, on texts that mean nothing; then ours over a base in 4 bits."""
    import stages as compared
    from stage_worker import texts
    from transformers import AutoTokenizer

    from rlhf.rows.records import write_jsonl

    one, updates = made(job, "small"), 2
    tokenizer = AutoTokenizer.from_pretrained(one["tokenizer"])
    per_step, steps = (4, 1) if job["tiny"] else (16, 4)
    board, results, four_bits = Board(Path(job["folder"])), {}, {}
    for stage, responses in (("sft", 1), ("reward_model", 4)):
        rows = []
        for prompt, answers in texts(one | {"updates": updates}, tokenizer, per_step, responses, steps):
            asked = [{"role": "user", "content": prompt}]
            rows.append(
                {"prompt": asked, "completion": [{"role": "assistant", "content": answers[0]}]} if stage == "sft"
                else {"prompt": asked, "responses": answers, "ranks": [float(n) for n in range(responses)]}
            )  # fmt: skip
        write_jsonl(board.folder / f"{stage}.jsonl", rows)
        asked_of = {
            "stage": stage, "updates": updates, "steps": steps, "rows_per_step": per_step,
            "rows_per_forward": per_step, "learning_rate": 1e-6, "bf16": bool(one["bf16_hardware"]), **LORA,
            "train": str(board.folder / f"{stage}.jsonl"), "model": one["model"], "tokenizer": one["tokenizer"],
        }  # fmt: skip
        results[stage] = compared.side_by_side(board, stage, asked_of, board.folder / stage, None)
        four_bits[stage] = asked_of | {"load_in_4bit": True}
        tables = {"beside trl": compared.table(results), "start": compared.start_table(results)}
        keep(job, {"stages": results, "tables": tables})
    if why := "; ".join(missing(four_bits["sft"], job)):
        tables["left out"] = markdown(["run", "why"], [["ours, in 4 bits", why]])
    else:
        folders = {stage: board.folder / stage / "in_4_bits" for stage in four_bits}
        workers = {s: Worker("stages_ours.py", four_bits[s], folders[s], in_turns=True) for s in four_bits}
        for stage, result in board.in_turns("in 4 bits", workers, updates).items():
            results[stage]["ours, in 4 bits"] = result
        tables = {"beside trl": compared.table(results), "start": compared.start_table(results)}
    keep(job, {"stages": results, "tables": tables})
    if board.failures:
        raise SystemExit(f"{len(board.failures)} runs failed, first {board.failures[0]}")


def vllm(job: Job) -> None:
    import gpu_vllm

    gpu_vllm.measure(job, made(job, "small"), keep)


PARTS: dict[str, Callable[[Job], None]] = {
    "machine": machine, "tests": tests, "preflight": preflight, "ppo_small": ppo_small, "ppo_large": ppo_large,
    "stages": stages, "vllm": vllm,
}  # fmt: skip


if __name__ == "__main__":
    import torch

    asked = json.loads(Path(sys.argv[1]).read_text()) | {"cuda": torch.cuda.is_available()}
    os.chdir(asked["folder"])
    PARTS[asked["part"]](asked)
