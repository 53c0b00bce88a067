"""A trained reward model as an HTTP server.

    rlhf serve_reward_model --reward_model runs/my/reward_model --port 8000
    curl -s http://127.0.0.1:8000/score -H 'Content-Type: application/json' \\
        -d '{"prompts": ["What is 2 + 2?"], "completions": ["4"]}'

For PPO on another machine, for several runs at once, for any program, for other trainers: OpenRLHF's requests are
answered at /get_reward, verl's and trl's go through the client. In Python,
`reward_models.client.RewardClient("http://127.0.0.1:8000")` is a reward function like any other. Clients send the
token (--token_file, or the environment's RLHF_SERVER_TOKEN) where the server has one; without one it is reachable from
its own machine only. There is no TLS: across a network that others use, put a proxy in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward_models.scoring_queue import ServerConfig
from reward_models.server import create_app, token_counter
from rlhf import config as configs
from rlhf.run import console
from rlhf.run.http import bind, server_token
from rlhf.run.precision import compute_dtype
from rlhf_recipes.stage import SECTIONS

console.quiet()


@dataclass(frozen=True, kw_only=True)
class ServeRecipe(ServerConfig):
    """Serving a trained reward model over HTTP."""

    reward_model: str
    """The trained reward model, or an ensemble's folder."""
    bf16: bool | None = None
    """Score in bfloat16; null: where the hardware is fast at it."""


def serve(config: ServeRecipe) -> None:
    """Load, listen, answer until SIGTERM or Ctrl-C; what was taken on by then is still answered."""
    token = server_token(config)
    listening = bind(config.host, config.port)  # before the model is read: a port in use is told at once
    from reward_models.ensemble import load_scorer
    from reward_models.rendered import RenderedReader

    dtype = compute_dtype(config.bf16)
    model = load_scorer(config.reward_model, dtype=dtype, tokens_per_microbatch=config.max_batch_tokens)
    members = getattr(model, "members", [model])
    counters = [token_counter(member, config.max_batch_tokens) for member in members]
    app = create_app(
        lambda conversations: model.score(conversations).tolist(),
        config,
        count_tokens=lambda messages: max(count(messages) for count in counters),
        read_text=RenderedReader(members[0].tokenizer),
        name=Path(config.reward_model).name,
        token=token,
    )
    from rlhf.run.connections import run

    shown = f"[{config.host}]" if ":" in config.host else config.host
    console.stage_line(
        "server",
        f"{config.reward_model} on http://{shown}:{listening.getsockname()[1]}, "
        f"{'with a token' if token else 'no token'}; Ctrl-C or SIGTERM ends it",
    )
    run(app, config, listening)
    console.stage_line("server", "ended")


def main(argv: list[str]) -> None:
    serve(
        configs.load(
            ServeRecipe, argv, section="serve_reward_model", known_sections=SECTIONS, description=__doc__ or ""
        )
    )


if __name__ == "__main__":
    configs.run(main)
