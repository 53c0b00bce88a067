"""Write the rows of the stages' comparison: the toy world's demonstrations, and its rankings of four different
responses without ties. Makes the toy chain up to its rankings where `run` has none. Started by the benchmark.
"""

from __future__ import annotations

from pathlib import Path

from jobs import Job, Result, serve
from stages_data import pairs_of, read
from toy_mark import make_chain

from rlhf.errors import InputError
from rlhf.rows.records import write_jsonl
from rlhf.run.precision import bf16_hardware

PAIRS = 6  # of four responses


def work(job: Job) -> Result:
    """Return the files of each stage, {"sft": {"train", "held_out"}, "reward_model": ...}, the toy's models, and what
    makes bfloat16 fast here."""
    run, folder = Path(job["run"]), Path(job["folder"])
    if not (run / "rankings/manifest.json").is_file():
        make_chain(run, job["seed"], "rankings")
    untied = {
        part: [
            row for row in read(str(run / f"rankings/{part}.jsonl")) if len(pairs_of(row)) == PAIRS and distinct(row)
        ]
        for part in ("train", "held_out")
    }
    demonstrations = read(str(run / "data/demonstrations.jsonl"))
    wanted, held_out = job["rows"], job["held_out"]
    rows = {
        "sft": {"train": demonstrations[held_out:], "held_out": demonstrations[:held_out]},
        "reward_model": untied | {"held_out": untied["held_out"][:held_out]},
    }
    files: Result = {"base": str(run / "base"), "sft_model": str(run / "sft"), "bf16_hardware": bf16_hardware()}
    for stage, parts in rows.items():
        if len(parts["train"]) < wanted[stage]:
            raise InputError(f"{stage}: {wanted[stage]} rows wanted, {run} has {len(parts['train'])}; lower --updates")
        files[stage] = {}
        for part, all_rows in parts.items():
            path = folder / f"{stage}_{part}.jsonl"
            write_jsonl(path, all_rows[: wanted[stage]] if part == "train" else all_rows)
            files[stage][part] = str(path)
    return files


def distinct(row: Job) -> bool:
    return len(set(row["responses"])) == len(row["responses"])


if __name__ == "__main__":
    serve(work)
