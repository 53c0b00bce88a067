"""Measure on this machine's GPU what was proven on CPUs alone, in at most nine minutes. Started by gpu.sh.

No network is needed: models have random weights in the shapes of Qwen3-0.6B and Qwen3-4B. Each part is a process of its
own with a time limit that leaves the later ones their minimum, so that a failure costs that part alone; one whose
packages are missing is skipped and says so.
Written after every part: <output_dir>/gpu.json, the tables in gpu.md, and each part's log.txt.

Only the standard library is imported here: a broken package is found by a part, and costs that part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent  # of a clone, or the folder of installed packages
SECONDS = 530.0  # for all parts: nine minutes are 540
ENDING = 2.0  # a stopped part's processes may take to end
FINE, SKIPPED, STOPPED, FAILED = "fine", "skipped", "stopped", "failed"


@dataclass(frozen=True)
class Part:
    """One thing to find out: a function of gpu_parts.py, the seconds that are kept for it whatever the parts before it
    do, those that it gets at most, and the packages it stands on."""

    name: str
    least: float
    seconds: float
    about: str
    packages: tuple[str, ...] = ()


PPO = ("torch", "transformers", "peft", "accelerate", "jaxtyping", "jsonargparse", "matplotlib", "rich", "yaml")
PARTS = (
    Part("machine", 30, 60, "the card, versions, its matrix products and its memory", PPO),
    Part("tests", 70, 100, "the tests marked gpu", (*PPO, "pytest", "beartype")),
    Part("preflight", 35, 75, "the checks before PPO's first step, in bfloat16, on the 0.6B shape", PPO),
    Part("ppo_small", 125, 190, "PPO on the 0.6B shape: full, LoRA, padded, one ahead, then beside trl 1.12", PPO),
    Part("ppo_large", 100, 170, "PPO on the 4B shape: LoRA, QLoRA, then trl 1.12", PPO),
    Part("stages", 65, 110, "SFT and reward model beside trl's, then in 4 bits, 0.6B", (*PPO, "trl", "datasets")),
    Part("vllm", 90, 120, "a vLLM server as the sampler, beside the built-in one", PPO),
)
NO_VLLM = (
    "no Python with vllm: make an environment of its own (python3 -m venv .venv-vllm && .venv-vllm/bin/pip install "
    "vllm), or name one: --vllm_python"
)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags. (Not by the recipes' own way: a machine with a GPU may lack its packages.)"""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", default="runs/gpu", help="results, tables and logs")
    parser.add_argument("--only", help=f"some parts: {','.join(part.name for part in PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: whether every part runs")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all parts; more raise each one's limit, too"
    )
    parser.add_argument("--vllm_python", help="Python with vllm; else .venv-vllm/bin/python, or this one if it has it")
    parser.add_argument("--trl_folder", default=str(ROOT / ".bench/trl-1.12.0"), help="trl 1.12.0, for PPO beside it")
    given = parser.parse_args(argv)
    unknown = sorted(set((given.only or "").split(",")) - {part.name for part in PARTS} - {""})
    if unknown:
        parser.error(f"--only: {unknown[0]} is none of {', '.join(part.name for part in PARTS)}")
    if given.vllm_python and not Path(given.vllm_python).is_file():
        parser.error(f"--vllm_python: {given.vllm_python} is no file")
    return given


def vllm_python(given: str | None) -> str | None:
    """Return the Python that starts vLLM: the named one, that of .venv-vllm, or this one; None where none has it."""
    if given:
        return str(Path(given).absolute())  # not resolved: in an environment it is a link
    own = ROOT / ".venv-vllm"
    if any(own.glob("lib/python*/site-packages/vllm")):
        return str(own / "bin/python")
    return sys.executable if importlib.util.find_spec("vllm") else None


def hindrance(part: Part, job: dict[str, Any]) -> str | None:
    """Return why a part cannot be run here."""
    missing = [name for name in part.packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return NO_VLLM if part.name == "vllm" and job["vllm_python"] is None else None


def limit(part: Part, later: Sequence[Part], left: float) -> float:
    """Return a part's seconds: as many as it can use, without what is kept for the later ones.

    Where time was too short for all from the start, the last ones go without."""
    return min(part.seconds, left, max(part.least, left - sum(other.least + ENDING for other in later)))


def run(part: Part, job: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, of at most so many seconds; return its status, why, and what it found."""
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "result.json"
    found.unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps(job | {"part": part.name, "folder": str(folder), "seconds": seconds}))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(HERE / "gpu_parts.py"), str(folder / "job.json")]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what the part has started ends with it, however that came
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = json.loads(found.read_text()) if found.is_file() else {}
    if code is None:
        return result | {"status": STOPPED, "why": f"not done in its {seconds:.0f} s; see {folder / 'log.txt'}"}
    if code:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        return result | {"status": FAILED, "why": f"{lines[-1][:300]} (see {folder / 'log.txt'})"}
    return {"status": FINE} | result


def report(results: dict[str, dict[str, Any]], seconds: float) -> str:
    """Return the Markdown page: a line per part, then each part's tables."""
    lines = [
        "# What this GPU says",
        "",
        f"{seconds:.0f} s in all.",
        "",
        "| part | what | status | seconds |",
        "|---|---|---|---|",
    ]
    about = {part.name: part.about for part in PARTS}
    for name, result in results.items():
        status = f"{result['status']}: {result['why']}" if result.get("why") else result["status"]
        lines.append(f"| {name} | {about[name]} | {status} | {result.get('seconds', 0):.0f} |")
    for name, result in results.items():
        for title, table in result.get("tables", {}).items():
            lines += ["", f"## {name}: {title}", "", table]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the parts one after another while time is left; return the exit code: 1 where one failed."""
    given = arguments(argv)
    folder, began = Path(given.output_dir).absolute(), time.monotonic()
    models = folder / "models"
    job = {"tiny": given.tiny, "models": str(models), "trl_folder": str(Path(given.trl_folder).absolute())}
    job |= {"vllm_python": vllm_python(given.vllm_python)}
    wanted, more = given.only.split(",") if given.only else None, max(1.0, given.seconds / SECONDS)
    chosen = [replace(part, seconds=more * part.seconds) for part in PARTS if not wanted or part.name in wanted]
    hindered = {part: why for part in chosen if (why := hindrance(part, job))}
    results: dict[str, dict[str, Any]] = {}
    try:
        for number, part in enumerate(chosen, 1):
            left, started = given.seconds - (time.monotonic() - began), time.monotonic()
            print(f"{part.name}: {part.about} ...", flush=True)
            if part in hindered:
                result = {"status": SKIPPED, "why": hindered[part]}
            elif left < part.least / 2:
                result = {"status": SKIPPED, "why": "no time was left"}
            else:
                later = [other for other in chosen[number:] if other not in hindered]
                result = run(part, job, folder / part.name, limit(part, later, left))
            results[part.name] = result | {"seconds": time.monotonic() - started}
            print(f"{part.name}: {result['status']}{': ' + result['why'] if result.get('why') else ''}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (folder / "gpu.md").write_text(report(results, time.monotonic() - began))
    finally:
        shutil.rmtree(models, ignore_errors=True)  # gigabytes
    print((folder / "gpu.md").read_text(), flush=True)
    return 1 if any(result["status"] in (FAILED, STOPPED) for result in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
