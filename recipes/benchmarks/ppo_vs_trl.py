"""Compare our PPO with trl's on this machine: speed and memory, time to quality, scaling; our other stages with
trl's, PPO's sampling with generate and vLLM.

    rlhf benchmark
    rlhf benchmark --only speed --cases "[tiny]" --updates 2
    # SFT and reward model beside today's trl
    rlhf benchmark --only stages
    # PPO's sampling beside generate and vLLM
    rlhf benchmark --only sampling --vllm_python .venv-vllm/bin/python
    # what each of our tricks for CPUs is worth
    rlhf benchmark --ablate
    # another checkout of this project beside this one
    rlhf benchmark --before ../earlier
    # each stage beside one busy process
    rlhf benchmark --busy
    # AgileRL's PPO in turn, too
    rlhf benchmark --agilerl_python .bench/agilerl/bin/python

trl 1.12.0, the last with a PPOTrainer, is installed into a folder of its own (--trl_folder), without touching the
environment. Each run is a process of its own; the runs of a case take turns, an update each, so that a machine's slow
minutes fall on all of them (all are in memory then: with little, choose --runs, or --take_turns false). Results go to
<output_dir>/results.json, tables to tables.md beside it. Both sides compute in bfloat16 only where the hardware is fast
at it; the tables say which. On a GPU the same script uses it (memory as CUDA counts it); not yet run on one.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ablation
import bench_tables
import busy
import earlier
import quality
import sampling
import scaling
import stages
from board import Board
from cases import AGILERL, CASES, OURS, TRL, Case, precision, runs_here
from jobs import Job, Worker, run_job
from limit import Sizes, count, update_of

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped
from rlhf.run import environment
from rlhf_recipes.stage import SECTIONS

TRL_VERSION = "1.12.0"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Say what to measure, and where results go."""

    output_dir: str = "runs/benchmark"
    """Results, tables, and every run's log."""
    only: Literal["speed", "quality", "scaling", "stages", "sampling"] | None = None
    """One part alone; null: all five."""
    ablate: bool = False
    """Instead of those: our runs with one trick for CPUs switched off at a time, in turn."""
    tricks: list[str] = field(default_factory=lambda: list(ablation.TRICKS))
    """Which of them, by their names in ablation.py."""
    before: str | None = None
    """Instead of the five parts: our runs as they are here and in another checkout of this project, in turn."""
    before_variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further runs there: name -> what it changes there, settings or (dotted) what one of its modules holds."""
    busy: bool = False
    """Instead of the five parts: each stage alone and beside one process that computes all the time."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """tiny (4 layers, 256 wide, 49k words), smollm2 (the model of --model)."""
    runs: list[str] = field(default_factory=lambda: [*OURS, *TRL, *AGILERL])
    """Of a case: ours, trl's and AgileRL's, by their names in cases.py."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A Llama-like model for the case smollm2: a folder or hub id."""
    updates: int = 3
    """Updates per run; the first warms up, medians are of the others."""
    take_turns: bool = True
    """Of the speed part: ours, theirs, ours, theirs, update by update; false: one run after another."""
    bf16: bool | None = None
    """Of the speed and sampling parts: whether the runs that can use bfloat16 do; null: where the hardware is fast at
    it. Elsewhere it is slow, and shows what it takes of memory."""
    threads: int | None = None
    """Threads of every run; null: torch's own choice."""
    trl_folder: str = f".bench/trl-{TRL_VERSION}"
    """Where trl is installed beside ours."""
    agilerl_python: str | None = None
    """Python of an environment in which agilerl[cpu-llm] and jaxtyping are installed; null: it is left out."""
    vllm_python: str | None = None
    """Of the sampling part: Python of an environment with vllm (`make vllm-env` makes one); null: it is left out."""
    stages: list[str] = field(default_factory=lambda: list(stages.STAGES))
    """Of the stages part: sft, reward_model."""
    toy_run: str = "{output_dir}/toy_{seed}"
    """A finished toy chain for the quality part (the stages part takes the rows of number 0); {seed} stands for its
    number. One that is missing is made."""
    seeds: int = 5
    """Runs of the quality part: on the seeds 0, 1 and so on."""
    tuning_seed: int | None = 9
    """Seed on which each side of the quality part tries its settings first; null: both take toy.yaml's."""
    quality_updates: int | None = None
    """Updates over which the quality part's learning rate falls to 0 and after which it gives up; null: the toy's."""

    def __post_init__(self) -> None:
        lists = (
            ("cases", self.cases, list(CASES)),
            ("runs", self.runs, [*OURS, *TRL, *AGILERL]),
            ("tricks", self.tricks, list(ablation.TRICKS)),
            ("stages", self.stages, list(stages.STAGES)),
        )
        for name, chosen, known in lists:
            wrong = [one for one in chosen if one not in known]
            if wrong or not chosen:
                raise InputError(f"{name}={chosen}: {wrong[0] if wrong else 'nothing'} is none of {', '.join(known)}")
        if self.tuning_seed is not None and not self.seeds <= self.tuning_seed:
            raise InputError(f"tuning_seed={self.tuning_seed} is one of the {self.seeds} that are raced; take another")
        for name in ("updates", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("threads", "quality_updates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1 or null")
        if self.agilerl_python is not None and not Path(self.agilerl_python).is_file():
            raise InputError(f"agilerl_python={self.agilerl_python}: no such file; install agilerl as speed.md says")
        if self.agilerl_python is None and set(self.runs) <= set(AGILERL):
            raise InputError(f"runs={self.runs}: AgileRL's needs agilerl_python")
        if self.before is not None:
            earlier.check(self.before, self.before_variants)


def install_trl(folder: Path) -> Path:
    """Install trl 1.12.0 without its dependencies (ours serve it) in a folder of its own, and return the folder.

    Raises InputError where pip fails."""
    if (folder / "trl" / "experimental" / "ppo" / "ppo_trainer.py").is_file():
        return folder.absolute()
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"trl=={TRL_VERSION}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise InputError(f"trl {TRL_VERSION} could not be installed into {folder}: {reason}")
    return folder.absolute()


def benchmark(config: BenchmarkConfig) -> Board:
    """Run the parts that were asked for. Raises InputError where vLLM's Python is not there."""
    if config.vllm_python is not None and not Path(config.vllm_python).is_file():
        raise InputError(f"vllm_python={config.vllm_python}: no such file; make vllm-env makes .venv-vllm/bin/python")
    board = Board(Path(config.output_dir).absolute())
    board.keep(
        "config", configs.to_dict(config) | {"python": platform.python_version(), "machine": environment.machine()}
    )
    parts = {"speed": speed, "quality": quality_part, "scaling": scaling_part, "stages": stages_part}
    parts |= {"sampling": sampling_part}
    instead = {ablate_part: config.ablate, before_part: config.before is not None, busy_part: config.busy}
    chosen = [part for part, asked in instead.items() if asked]
    for part in chosen or [part for name, part in parts.items() if config.only in (None, name)]:
        part(config, board)
    return board


def speed(config: BenchmarkConfig, board: Board) -> None:
    """Measure seconds per update and peak memory of every run of every case; show the ratios and the limit."""
    theirs = any(name in TRL for name in config.runs)
    site = board.attempt("install trl", partial(install_trl, Path(config.trl_folder))) if theirs else None
    results: dict[str, Any] = {}
    for name in config.cases:
        case, folder = CASES[name], board.folder / name
        made = board.made(name, case, config.model)
        if made is None:
            continue
        job = made | {"updates": config.updates}
        results[name] = {"sizes": made["sizes"], "runs": {}}
        left_out = {*(TRL if site is None else ()), *(AGILERL if config.agilerl_python is None else ())}
        chosen = [run for run in config.runs if run not in left_out]
        runs = runs_here(chosen, made["bf16_hardware"] if config.bf16 is None else config.bf16)
        for group in [list(runs)] if config.take_turns else [[run] for run in runs]:
            workers = {run: start(run, job | {"settings": runs[run]}, folder / run, config, site) for run in group}
            for run, result in board.in_turns(name, workers, config.updates).items():
                results[name]["runs"][run] = result | {"precision": precision(runs[run])}
            board.keep("speed", results)
        show_speed(name, case, results[name], runs, config, board)
        started = {run: numbers for run, numbers in results[name]["runs"].items() if "start" in numbers}
        board.show(f"{name}: seconds until the first update is done", stages.start_table({name: started}))
        board.keep("speed", results)


def start(run: str, job: Job, folder: Path, config: BenchmarkConfig, site: Path | None) -> Worker:
    """Start one run of one case in its own process, which waits after each update."""
    if run in OURS:
        return Worker("ours_worker.py", job, folder, threads=config.threads, in_turns=True)
    if run in AGILERL:
        python = config.agilerl_python
        return Worker("agilerl_worker.py", job, folder, threads=config.threads, python=python, in_turns=True)
    mixed = "bf16" if job["settings"]["autocast"] else "no"
    return Worker(
        "trl_worker.py", job, folder, threads=config.threads, site=site, in_turns=True, ACCELERATE_MIXED_PRECISION=mixed
    )


def show_speed(
    name: str,
    case: Case,
    result: dict[str, Any],
    settings: dict[str, dict[str, Any]],
    config: BenchmarkConfig,
    board: Board,
) -> None:
    """Show a case's tables: speed, ratios, and ours against the limit of this machine."""
    summaries = {run: bench_tables.summarize(numbers) for run, numbers in result["runs"].items()}
    result["summary"] = summaries
    if not summaries:
        return
    lengths = case.prompt_lengths
    about = f"{case.rollout_size} prompts of {lengths[0]}-{lengths[-1]} tokens, {case.new_tokens} new tokens, "
    about += f"{case.inner_epochs} inner epochs, {case.minibatches} minibatches"
    board.show(f"{name}: {about}", bench_tables.speed_table(summaries))
    board.show(f"{name}: ours against the others", bench_tables.ratio_table(summaries))
    tokens = (sum(lengths) + case.rollout_size * case.new_tokens) // case.minibatches
    job = {"sizes": result["sizes"], "tokens": tokens}
    folder = board.folder / name / "machine"
    threads = config.threads
    machine = board.attempt(f"{name}: the machine", partial(run_job, "machine.py", job, folder, threads=threads))
    ours = [run for run in summaries if run in OURS]
    if machine is None or not ours:
        return
    result["machine"] = machine
    result["limit"] = {run: limits(settings[run], case, Sizes.of(result["sizes"]), machine) for run in ours}
    text = f"{machine['device']}: {machine['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16, "
    text += f"{machine['float32'] / 1e9:.0f} in float32, {machine['bandwidth'] / 1e9:.1f} GB/s\n\n"
    board.show(f"{name}: ours against the limit", text + bench_tables.limit_table(summaries, result["limit"]))


def limits(settings: dict[str, Any], case: Case, sizes: Sizes, machine: dict[str, Any]) -> dict[str, float]:
    """Return the least seconds of each phase of one of our runs, with these settings."""
    peak = machine["bfloat16" if settings.get("bf16") else "float32"]
    works = count(update_of(settings, case, sizes))
    return {phase: work.seconds(peak, machine["bandwidth"]) for phase, work in works.items()}


def quality_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure the seconds until the toy world's gold score passes the mark, ours and trl's, seed by seed."""
    site = board.attempt("install trl", partial(install_trl, Path(config.trl_folder)))
    race = quality.Race(
        board=board, toy_run=config.toy_run, updates=config.quality_updates, threads=config.threads, site=site
    )
    quality.measure(race, range(config.seeds), config.tuning_seed)


def scaling_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure seconds and memory of our update against rollout size, response length and model size."""
    work = partial(scaling.measure, board.folder / "scaling", config.updates, config.threads)
    result = board.attempt("scaling", work)
    if result is not None:
        board.keep("scaling", result)
        board.show("What an update of ours costs, by size", scaling.table(result))


def stages_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure our SFT and reward-model training beside trl's own trainers, by turns of some steps."""
    run = Path(config.toy_run.format(output_dir=board.folder, seed=0))
    stages.measure(board, config.cases, config.stages, run, 0, config.model, config.updates, config.threads)


def sampling_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure PPO's sampling beside transformers' generate and, where an environment with it is named, vLLM."""
    python = str(Path(config.vllm_python).absolute()) if config.vllm_python else None
    sampling.measure(board, config.cases, config.model, config.updates, config.threads, python, config.bf16)


def ablate_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure what each of our tricks for CPUs takes off an update's time and off the peak."""
    ablation.ablate(board, config.cases, config.runs, config.tricks, _shared(config))


def before_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure seconds per update and peak memory, here and in the other checkout."""
    folder = Path(str(config.before))
    earlier.compare(board, folder, config.before_variants, config.cases, config.runs, _shared(config))


def busy_part(config: BenchmarkConfig, board: Board) -> None:
    """Measure the seconds of each stage, alone and beside one busy process."""
    busy.measure(board, busy.STAGES, config.updates, config.threads)


def _shared(config: BenchmarkConfig) -> Job:
    return {"model": config.model, "updates": config.updates, "threads": config.threads}


def main(argv: list[str]) -> None:
    board = benchmark(
        configs.load(BenchmarkConfig, argv, section="benchmark", known_sections=SECTIONS, description=__doc__ or "")
    )
    if board.failures:
        raise RunStopped(f"{len(board.failures)} runs failed, first {board.failures[0]}")


if __name__ == "__main__":
    configs.run(main)
