"""Policies over OpenAI's HTTP, with a chat page.

    rlhf serve_policy --run runs/my    # its base, sft and ppo, by these names
    rlhf serve_policy --model runs/my/ppo --store feedback.db
    rlhf serve_policy --policies '{old: runs/my/sft, new: runs/my/ppo}'
    rlhf serve_policy --upstream http://127.0.0.1:8001  # vLLM behind it

The page is at the server's address, for programs the base URL is this address with /v1. Clients send the token
(--token_file, or the environment's RLHF_SERVER_TOKEN) where the server has one; without one it is reachable from its
own machine only. With --store, feedback is kept where people agree; --compare_share asks which of two policies answers
better. There is no TLS: across a network that others use, put a proxy in front.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.http import bind, server_token
from rlhf.run.settings import require_needed
from rlhf.serving.config import ServingConfig
from rlhf.urls import http_address
from rlhf_recipes.stage import SECTIONS

console.quiet()


@dataclass(frozen=True, kw_only=True)
class ServePolicyRecipe(ServingConfig):
    """Serving policies over HTTP."""

    run: str | None = None
    """A run's folder: its base, sft and ppo stages are served by these names, as far as they are complete."""
    model: str | None = None
    """One policy: a folder (full weights, or an adapter) or a hub id, served under its folder's name."""
    policies: dict[str, str] = field(default_factory=dict)
    """Policies by name: {name: folder}."""
    upstream: str | None = None
    """Address of another server of OpenAI's HTTP, whose models are served instead; its token is taken from the
    environment's RLHF_UPSTREAM_TOKEN."""
    upstream_seconds: float = 600.0
    """Seconds that an answer of the other server may take."""
    moderator: str | None = None
    """A moderation model's folder, or a function (file.py:name) from a list of texts to verdicts, for /v1/moderations;
    default: none."""
    bf16: bool | None = None
    """Compute in bfloat16; null: where the hardware is fast at it."""
    output_dir: str | None = None
    """Folder for serve_policy.json, written when the server ends; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("run", "model", "policies", "upstream") if getattr(self, name)]
        if len(given) != 1:
            seen = f"{' and '.join(given)} are given" if given else "none is given"
            raise InputError(f"run, model, policies or upstream: {seen}; name one of them")
        for name in self.policies:
            if not name.strip() or len(name) > 80 or not name.isprintable():
                raise InputError(f"policies: {name[:90]!r}: use names of 1 to 80 visible characters")
        if self.upstream is not None:
            http_address(self.upstream, "upstream")
        if not 0 < self.upstream_seconds < math.inf:
            raise InputError(f"upstream_seconds={self.upstream_seconds} must be above 0, and finite")
        require_needed(self, "upstream", "upstream_seconds")


def serve(config: ServePolicyRecipe) -> None:
    """Load, listen, answer until SIGTERM or Ctrl-C; what was taken on by then is still answered."""
    token = server_token(config)
    scrub = configs.import_function(config.scrub) if config.scrub else None
    listening = bind(config.host, config.port)  # before a model is read: a port in use is told at once
    moderator = moderator_of(config)
    engine = engine_of(config)
    from rlhf.run.connections import run
    from rlhf.serving.app import Service, create_app

    keeper: Any = None
    if config.store is not None:
        from rlhf.serving.keeping import Keeper

        keeper = Keeper(config, engine.models, **({"rule": scrub} if scrub else {}))
    service = Service(engine, config, keeper, moderator)
    app = create_app(service, token)
    shown = f"[{config.host}]" if ":" in config.host else config.host
    console.stage_line(
        "server",
        f"{', '.join(engine.models)} on http://{shown}:{listening.getsockname()[1]}, "
        f"{'with a token' if token else 'no token'}; Ctrl-C or SIGTERM ends it",
    )
    if config.log:
        console.stage_line("log", f"every conversation is kept in {config.store} for {config.retention_days:g} days")
    run(app, config, listening)
    console.stage_line("server", f"ended; {service.answered} requests were answered")
    if config.output_dir is not None:
        metrics = {"requests": {"value": service.answered, "low": None, "high": None, "n": service.answered}}
        write_json_atomic(Path(config.output_dir) / "serve_policy.json", {"metrics": metrics})


def moderator_of(config: ServePolicyRecipe) -> Any:
    """Load what answers /v1/moderations; None where nothing does."""
    if config.moderator is None:
        return None
    from reward_models.filtering import load_moderator

    return load_moderator(config.moderator, config.bf16)


def engine_of(config: ServePolicyRecipe) -> Any:
    """Make what answers: models in this process, or another server."""
    if config.upstream is not None:
        from rlhf.client import Client
        from rlhf.serving.upstream import TOKEN_VARIABLE, Upstream

        client = Client(config.upstream, os.environ.get(TOKEN_VARIABLE, ""), timeout=config.upstream_seconds)
        return Upstream(client, config.max_queue)
    import torch

    from rlhf.run.precision import compute_dtype
    from rlhf.serving.engine import LocalEngine
    from rlhf.serving.policies import load_policies, policies_of_run

    folders = dict(config.policies)
    if config.run is not None:
        folders = policies_of_run(config.run)
    elif config.model is not None:
        path = Path(config.model)
        folders = {path.resolve().name if path.exists() else config.model: config.model}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalEngine(load_policies(folders, compute_dtype(config.bf16), device), config)


def main(argv: list[str]) -> None:
    serve(
        configs.load(
            ServePolicyRecipe, argv, section="serve_policy", known_sections=SECTIONS, description=__doc__ or ""
        )
    )


if __name__ == "__main__":
    configs.run(main)
