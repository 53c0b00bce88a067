"""A trained reward model as an HTTP server.

    rlhf serve_reward_model --reward_model runs/my/reward_model --port 8000
    curl -s http://127.0.0.1:8000/score -H 'Content-Type: application/json' \\
        -d '{"prompts": ["What is 2 + 2?"], "completions": ["4"]}'

For PPO on another machine, for several runs at once, for any program. In Python,
`reward_models.client.RewardClient("http://127.0.0.1:8000")` is a reward function like any other. Clients send the
token (--token_file, or the environment's RLHF_SERVER_TOKEN) where the server has one; without one it is reachable from
its own machine only. There is no TLS: across a network that others use, put a proxy in front.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from reward_models.client import TOKEN_VARIABLE
from reward_models.server import ServerConfig, create_app, token_counter
from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.precision import compute_dtype

console.quiet()


@dataclass(frozen=True, kw_only=True)
class ServeRecipe(ServerConfig):
    """Serving a trained reward model over HTTP."""

    reward_model: str
    """The trained reward model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of this machine."""
    port: int = 8000
    """Port to listen on; 0: any free one, told when it is up."""
    token_file: str | None = None
    """File whose content clients must send as bearer token; default: the environment's RLHF_SERVER_TOKEN."""
    allow_no_token: bool = False
    """Let everybody in who reaches a host other than this machine itself."""
    bf16: bool | None = None
    """Score in bfloat16; null: where the hardware is fast at it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise InputError(f"port={self.port} must be 0 to 65535")


def serve(config: ServeRecipe) -> None:
    """Load, listen, answer until SIGTERM or Ctrl-C; what was taken on by then is still answered."""
    token = _token(config)
    if token is None and not config.allow_no_token and not _is_loopback(config.host):
        raise InputError(
            f"host={config.host} is open to other machines, and there is no token; name a --token_file or set "
            f"{TOKEN_VARIABLE} (or, if all may come in: --allow_no_token true)"
        )
    listening = _bind(config.host, config.port)  # before the model is read: a port in use is told at once
    import uvicorn

    from reward_models import RewardModel

    dtype = compute_dtype(config.bf16)
    model = RewardModel.load(config.reward_model, dtype=dtype, tokens_per_microbatch=config.max_batch_tokens)
    app = create_app(
        lambda conversations: model.score(conversations).tolist(),
        config,
        count_tokens=token_counter(model),
        name=Path(config.reward_model).name,
        token=token,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    shown = f"[{config.host}]" if ":" in config.host else config.host
    console.stage_line(
        "server",
        f"{config.reward_model} on http://{shown}:{listening.getsockname()[1]}, "
        f"{'with a token' if token else 'no token'}; Ctrl-C or SIGTERM ends it",
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn repeats the signal once all is answered
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    console.stage_line("server", "ended")


def _token(config: ServeRecipe) -> str | None:
    if config.token_file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        where = config.token_file
        if not Path(where).is_file():
            raise InputError(f"token_file={where}: no such file; write the token into it")
        token = Path(where).read_text(encoding="utf-8", errors="replace").strip()
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise InputError(f"{where}: a token is one word of ASCII characters, for example from: openssl rand -hex 32")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InputError(f"host={host} port={port}: {error}; choose another --port or --host") from None
    return listening


def main(argv: list[str]) -> None:
    serve(configs.load(ServeRecipe, argv, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
