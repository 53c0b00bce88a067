"""A model's folder to the hub, by an allow-list.

    rlhf push_to_hub --model runs/my/ppo --repo me/my-policy
    rlhf push_to_hub --model runs/my/ppo --repo me/my-policy --push true

The first shows what would be pushed, the second pushes it.

Weights, configuration, tokenizer, README.md (the model's card, `rlhf system_card`), and with --evals the results for
data sets of the hub. Samples, checkpoints, rollouts, stores, logs, manifests and paths of this machine never leave. The
hub's token comes from HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped, reason
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf_recipes.stage import SECTIONS

console.quiet()


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Pushing a model's folder to the hub."""

    model: str
    """The model's folder, or an adapter's."""
    repo: str
    """The repository: owner/name."""
    base_model: str | None = None
    """The hub id of an adapter's base, where its configuration names a folder of this machine."""
    evals: str | None = None
    """A folder of `rlhf run_evals`: its results for data sets of the hub go along."""
    push: bool = False
    """Push; without it the files are only shown."""
    private: bool = True
    """Make a new repository private."""
    message: str = "Upload a model of rlhf-recipes"
    """The commit's message."""
    output_dir: str = "runs/push_to_hub"
    """Where push_to_hub.json and its page go: the files, their sizes and hashes."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise InputError(f"repo={self.repo} must be owner/name")


def push_to_hub(config: PushConfig) -> dict[str, Any]:
    """Show the files that may leave, and push them where the config says so."""
    from rlhf import cards
    from rlhf.publish import left_behind, outgoing
    from rlhf.run import page
    from rlhf.run.checkpoint import write_json_atomic

    model = Path(config.model)
    if model.is_dir() and cards.holds_model(model) and not (model / "README.md").is_file():
        page.write(model / "README.md", cards.model_card(model))
    files = outgoing(model, config.base_model, config.evals)
    behind = left_behind(model, files)
    for one in files:
        changed = "  (paths of this machine taken out)" if one.content is not None else ""
        console.stage_line("push" if config.push else "would push", f"{one.path}  {one.size:,} bytes{changed}")
    if any(one.path == "words.npz" for one in files):
        console.stage_line("warning", "words.npz lists words and pairs of words of the training texts, names too")
    console.stage_line("stays here", ", ".join(behind) or "nothing")
    if config.push:
        _push(config, files)
        console.stage_line("pushed", f"{len(files)} files to {config.repo}")
    else:
        console.stage_line("", "nothing has left this machine; --push true pushes")
    rows = [{"path": one.path, "bytes": one.size, "sha256": one.sha256} for one in files]
    total = sum(one.size for one in files)
    content = {
        "metrics": {
            name: {"value": value, "low": value, "high": value, "n": len(files)}
            for name, value in (("files", len(files)), ("bytes", total))
        },
        "repo": config.repo, "pushed": config.push, "files": rows, "left_behind": behind,
    }  # fmt: skip
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = page.table((["file", "bytes", "sha256"], [[r["path"], f"{r['bytes']:,}", r["sha256"]] for r in rows]))
    said = page.note(f"{'Pushed' if config.push else 'Not pushed'}. Stays here: {', '.join(behind) or 'nothing'}.")
    page.write(folder / "push_to_hub.html", page.page(f"{config.model} to {config.repo}", said + table))
    write_json_atomic(folder / "push_to_hub.json", content)
    return content


def _push(config: PushConfig, files: list[Any]) -> None:
    """Make the repository where it is not there, and one commit. Raises RunStopped where the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    operations = [
        CommitOperationAdd(one.path, str(one.file) if one.content is None else one.content) for one in files
    ]  # fmt: skip
    try:
        hub = HfApi()
        hub.create_repo(config.repo, private=config.private, exist_ok=True)
        hub.create_commit(config.repo, operations, commit_message=config.message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunStopped(f"{config.repo}: {type(error).__name__}: {reason(error)}; nothing was committed") from None


def main(argv: list[str]) -> None:
    config = configs.load(PushConfig, argv, section="push_to_hub", known_sections=SECTIONS, description=__doc__ or "")
    by_main(lambda: push_to_hub(config))


if __name__ == "__main__":
    configs.run(main)
