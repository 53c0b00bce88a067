"""A program that serves a tiny model's tokens over HTTP as `vllm serve` would, for trl's VLLMClient.

    python tests/reference/token_server.py MODEL_FOLDER      prints two ports

The tokens are a plain loop's: a whole forward for every token, in float64 from the logits on. What a vLLM server gets
over NCCL comes here as POST /tensor, one after the other, while /update_weights waits for them as vLLM's workers do.
POST /fault {"fault": name} makes it misbehave; GET /log tells what it was asked. The second port is that of a copy,
a process of its own, that may die of a fault.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TENSORS_SECONDS = 20.0
FULL_SOFTMAX = {"n": 1, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "ignore_eos": True}
KNOWN = {*FULL_SOFTMAX, "model", "prompt", "return_token_ids", "return_tokens_as_token_ids", "temperature",
         "max_tokens", "logprobs", "seed", "stop_token_ids"}  # fmt: skip


class Served:
    """The model and everything that requests share."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.lock = threading.Lock()
        self.arrived = threading.Condition()
        self.tensors: list[torch.Tensor] = []
        self.updating = False
        self.fault = ""
        self.log: list[dict[str, Any]] = []

    @torch.no_grad()
    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to /v1/completions, with what trl's client reads of it."""
        strange = {name: value for name, value in FULL_SOFTMAX.items() if request.get(name) != value}
        if strange or set(request) - KNOWN:
            raise ValueError(f"not the full softmax, or unknown: {strange} {set(request) - KNOWN}")
        if not all(isinstance(token, int) for prompt in request["prompt"] for token in prompt):
            raise ValueError("not token ids")
        return {"choices": [self.choice(prompt, request) for prompt in request["prompt"]]}

    def choice(self, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(request["seed"])
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < request["max_tokens"] and not (ids and ids[-1] in request["stop_token_ids"]):
            with self.lock:
                logits = self.model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
            drawn_from = (logits / request["temperature"]).log_softmax(-1)
            ids.append(int(torch.multinomial(drawn_from.exp(), 1, generator=draw)))
            logprobs.append(float(drawn_from[ids[-1]]))
        tokens = [f"token_id:{token}" for token in ids]
        choice = {
            "prompt_token_ids": prompt,
            "token_ids": ids,
            "logprobs": {
                "tokens": tokens,
                "token_logprobs": logprobs,
                "top_logprobs": [{token: value} for token, value in zip(tokens, logprobs, strict=True)],
            },
        }
        return self.spoilt(choice, request)

    def spoilt(self, choice: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        lists = choice["logprobs"]
        if self.fault == "no logprobs":
            choice["logprobs"] = None
        elif self.fault == "a logprob too few":
            choice["logprobs"] = {name: values[:-1] for name, values in lists.items()}
        elif self.fault == "logprob is NaN":
            lists["token_logprobs"][0], lists["top_logprobs"][0] = float("nan"), {}
        elif self.fault == "other prompt":
            choice["prompt_token_ids"] = [*choice["prompt_token_ids"], 5]
        elif self.fault == "empty":
            choice["token_ids"] = []
        elif self.fault == "too long":
            choice["token_ids"] = [7] * (request["max_tokens"] + 1)
        elif self.fault == "cut short":
            choice["token_ids"] = [7]
        elif self.fault == "goes on":
            choice["token_ids"] = [*request["stop_token_ids"][:1], 7]
        elif self.fault == "no token ids":
            del choice["token_ids"]
        return choice

    @torch.no_grad()
    def update(self, info: dict[str, Any]) -> None:
        """Wait for as many tensors as were announced, and take them under the announced names."""
        names = info["names"]
        with self.arrived:
            if not self.updating:
                raise ValueError("no /start_weight_update before")
            if not self.arrived.wait_for(lambda: len(self.tensors) >= len(names), TENSORS_SECONDS):
                raise ValueError(f"{len(self.tensors)} tensors of {len(names)} came")
            tensors, self.tensors = self.tensors, []
        own = dict(self.model.named_parameters())
        if set(names) != set(own) or len(names) != len(own):
            raise ValueError(f"names differ: {sorted(set(names) ^ set(own))}")
        with self.lock:
            for name, dtype, shape, tensor in zip(names, info["dtype_names"], info["shapes"], tensors, strict=True):
                if list(tensor.shape) != shape or str(tensor.dtype) != f"torch.{dtype}":
                    raise ValueError(f"{name}: announced as {dtype} {shape}, came as {tensor.dtype} {tensor.shape}")
                own[name].copy_(tensor)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/tensor":
            with self.arrived:
                self.tensors.append(torch.load(io.BytesIO(body), weights_only=True))
                self.arrived.notify_all()
            return {}
        request = json.loads(body or b"{}")
        if path == "/fault":
            self.fault = request["fault"]
            return {}
        if path == "/log":
            log, self.log = self.log, []
            return {"log": log}
        self.log.append({"path": path, **request})
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if path == "/server_info":
            transfer = None if self.fault == "no weight transfer" else {"backend": "nccl"}
            mode = "raw_logprobs" if self.fault == "raw logprobs" else "processed_logprobs"
            return {"vllm_config": {"weight_transfer_config": transfer, "model_config": {"logprobs_mode": mode}}}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/v1/completions":
            if self.fault == "dies":
                os._exit(1)
            if self.fault == "hangs":
                time.sleep(5.0)
            return self.complete(request)
        if path in ("/start_weight_update", "/finish_weight_update"):
            self.updating = path == "/start_weight_update"
        if path == "/update_weights":
            self.update(request["update_info"])
        return {}  # /health, /init_weight_transfer_engine, /reset_prefix_cache


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        try:
            if path == "/server_info" and self.served.fault == "no development endpoints":
                raise FileNotFoundError("Not Found")
            status, answer = 200, self.served.answer(path, body)
        except Exception as error:
            status, answer = (404 if isinstance(error, FileNotFoundError) else 400), {"error": str(error)}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


def main() -> None:
    torch.set_num_threads(1)  # and no thread is there before the copy is made
    Handler.served = Served(sys.argv[1])
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    print(*(server.server_address[1] for server in servers), flush=True)
    is_copy = os.fork() == 0
    servers[not is_copy].server_close()
    if is_copy:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    servers[is_copy].serve_forever()


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


if __name__ == "__main__":
    main()
