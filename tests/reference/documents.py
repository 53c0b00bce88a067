"""The documents that tests execute: their blocks and commands, and what stands in for what a reader would bring."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "recipes" / "guides").glob("*.md"))
DOCS = [README, ROOT / "CONTRIBUTING.md", *GUIDES]
NEEDS = ("gpu", "hub", "minutes")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    file: Path
    line: int
    language: str
    needs: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """A list of words per command; continued lines are one, comments are none."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks_of(file: Path) -> list[Block]:
    found, start, language, needs = [], 0, "", None
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip().startswith("```"):
            continue
        if start:
            found.append(Block(file, start, language, needs, "\n".join(lines[start : number - 1])))
            start = 0
        else:
            start, language = number, line.strip().removeprefix("```").strip()
            mark = re.fullmatch(r"<!-- needs: (\w+) -->", lines[number - 2].strip()) if number > 1 else None
            needs = mark[1] if mark else None
    assert not start, f"{file.name}:{start}: this block is never closed"
    return found


BLOCKS = [block for file in DOCS for block in blocks_of(file)]


def recipe_of(words: list[str]) -> list[str] | None:
    """The recipe's name and its flags in a command, `rlhf NAME ...` or `... recipes/NAME.py ...`; None in others."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words and words[0] == "rlhf":
        return words[1:]
    for place, word in enumerate(words):
        if script := re.fullmatch(r"(?:\S*/)?recipes/(\w+)\.py", word):
            return [script[1], *words[place + 1 :]]
    return None


# ---------------------------------------------------------------- stand-ins

STAND_INS = {
    "--config toy.yaml": "--config smoke.yaml",
    "runs/toy": "runs/smoke",
    "--save_rollouts 10": "--save_rollouts 2",
    "--update 10": "--update 2",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny",
    "sentence-transformers/all-MiniLM-L6-v2": "tiny",
}
"""What runs in the place of what a document names: the smoke config is the toy chain in miniature."""
SMALLER = {
    "sft": {"epochs": 1, "batch_size": 8},
    "reward_model": {"epochs": 1, "prompts_per_batch": 8},
    "process_reward": {"epochs": 1, "solutions_per_batch": 8},
    "moderation": {"epochs": 1, "texts_per_batch": 8, "microbatch_size": 8},
    "ppo": {"updates": 2, "rollout_size": 4, "minibatch_size": 2, "inner_epochs": 1, "max_new_tokens": 6},
    "evaluate_policy": {"max_new_tokens": 6, "least_probability": 0},
    "judge_card": {"least_probability": 0},
    "baseline": {
        "max_new_tokens": 6, "dpo.batch_size": 4, "dpo.microbatch_size": 4, "grpo.updates": 1, "grpo.rollout_size": 4,
        "grpo.generations": 2, "grpo.batch_size": 4, "grpo.microbatch_size": 4,
    },
    "run_evals": {"max_new_tokens": 6, "max_items": 4},
    "red_team": {"max_new_tokens": 6, "max_cases": 2},
}  # fmt: skip
"""Added to commands that train, and to settings in Python, where no config has made them small already."""
BESIDE = {"least_probability": "--template"}
"""A flag that only stands beside another."""
ROWS = [
    {
        "prompt": f"Count to {n}.",
        "chosen": f"{n} is what I count to.",
        "rejected": "The lazy fox jumps over.",
        "ideal": str(n),
    }
    for n in range(24)
]
"""Any file of rows that a document names and does not write: rankings, and so demonstrations and prompts too."""
SCALING = [{"compute": 10.0 ** (15 + n), "loss": 2.0 + 3.0 * 10.0 ** (-0.2 * n) + 0.01 * (-1) ** n} for n in range(6)]
"""Runs of several sizes, in a file of this name."""
STEP_ROWS = [
    {"prompt": f"Count to {n}.", "steps": ["one two", f"{n} is it"], "labels": [1, 1 - 2 * (n % 2)]} for n in range(24)
]
"""The same for a file whose name speaks of steps."""
LABELLED_ROWS = [
    {"prompt": f"Count to {n}, fool." if n % 3 else f"Count to {n}.", "S": min(1, n % 3)} for n in range(24)
]
"""The same for a file whose name speaks of labels."""
RUBRIC = "instructions: Is it good?\nchoices:\n  A: {description: Yes., score: 1}\n  B: {description: No., score: 0}\n"


def replaced(text: str) -> str:
    for named, ours in STAND_INS.items():
        text = text.replace(named, ours)
    return text


def smaller_flags(name: str, flags: list[str]) -> list[str]:
    """The last flag wins."""
    if "--config" in flags:
        return []
    smaller = {key: value for key, value in SMALLER.get(name, {}).items() if BESIDE.get(key) in (None, *flags)}
    return [word for key, value in smaller.items() for word in (f"--{key}", str(value))]


def provide_files(text: str, folder: Path) -> None:
    """A few rows in every file of rows that the text names and that isn't there, and a rubric."""
    for name in set(re.findall(r"[\w./-]+\.jsonl\b", text)):
        path = folder / name
        if not path.exists() and not name.startswith("runs/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = SCALING if path.name == "scaling.jsonl" else STEP_ROWS if "steps" in path.name else ROWS
            rows = LABELLED_ROWS if "labelled" in path.name else rows
            if "labelled" in path.name or "held_out" in path.name:  # the held-out texts are others
                rows = [{**row, "prompt": f"{path.stem}: {row['prompt']}"} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if "rubric.yaml" in text and not (folder / "rubric.yaml").exists():
        (folder / "rubric.yaml").write_text(RUBRIC)


def configs() -> dict[str, str]:
    """Configs that documents name and leave to the reader, by name."""
    whole = [b.text for b in BLOCKS if b.file.stem == "model_7b" and b.language == "yaml" and "output_dir:" in b.text]
    assert len(whole) == 1
    return {"my.yaml": (ROOT / "recipes/configs/smoke.yaml").read_text(encoding="utf-8"), "7b.yaml": whole[0]}
