"""A server in this process that speaks what the engine uses of vLLM's HTTP, over a tiny model, with planted faults.

The tokens are a plain loop's: a whole forward for every token, in float64 from the logits on. Adapters are loaded and
merged by peft, weights read from a folder by safetensors. What a vLLM server gets over NCCL comes here as POST /tensor,
one after the other, while /update_weights waits for them as vLLM's workers do.
"""

from __future__ import annotations

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TENSORS_SECONDS = 20.0
FULL_SOFTMAX = {
    "n": 1, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True,
}  # fmt: skip
KNOWN = {*FULL_SOFTMAX, "model", "prompt", "return_token_ids", "return_tokens_as_token_ids", "temperature",
         "max_tokens", "logprobs", "seed", "stop_token_ids", "prompt_logprobs"}  # fmt: skip


class Refused(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class FakeVLLM:
    """The server. fault: how it misbehaves, see `choice`, `load`, `reload`. log: the paths and bodies of requests."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        self.lock, self.arrived = threading.Lock(), threading.Condition()
        self.fault, self.log = "", []
        self.dies_after: int | None = None  # so many completions more; None: it lives
        self.dead = threading.Event()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start as a new process would: with the weights of the folder, without adapters, at the port from before."""
        self.base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.models: dict[str, Any] = {"base": self.base}
        self.kept: Any = None
        self.tensors: list[torch.Tensor] = []
        self.paused = self.updating = self.asleep = False
        self.dead.clear()
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"served": self}))
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def dies(self) -> bool:
        """Return whether it dies now, instead of answering."""
        with self.lock:
            now = self.dies_after == 0
            if self.dies_after is not None:
                self.dies_after = None if now else self.dies_after - 1
            return now

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.log]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for found, body in self.log if found == path]

    def reset(self) -> None:
        """Become as at the start, without a fault."""
        self.stop()
        self.fault, self.log, self.dies_after = "", [], None
        self.start()

    # -- sampling --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        strange = {name: value for name, value in FULL_SOFTMAX.items() if request.get(name) != value}
        if strange or set(request) - KNOWN:
            raise Refused(400, f"not the full softmax, or unknown: {strange} {set(request) - KNOWN}")
        if self.paused or self.asleep:
            raise Refused(400, "paused or asleep")
        if request["model"] not in self.models:
            raise Refused(404, f"The model `{request['model']}` does not exist.")
        if not all(isinstance(token, int) for token in request["prompt"]):
            raise Refused(400, "not token ids")
        return {"choices": [self.choice(request["prompt"], request)]}

    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        with self.lock:
            return self.models[name](input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()

    def choice(self, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" in request:
            rows = self.logits(request["model"], prompt)[:-1].log_softmax(-1)
            found = [{str(t): {"logprob": float(row[t]), "rank": 1}} for row, t in zip(rows, prompt[1:], strict=True)]
            return {"token_ids": [0], "prompt_logprobs": [None, *found]}
        draw = torch.Generator().manual_seed(request["seed"])
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < request["max_tokens"] and not (ids and ids[-1] in request["stop_token_ids"]):
            logits = self.logits(request["model"], prompt + ids)[-1]
            drawn_from = (logits / request["temperature"]).log_softmax(-1)
            if self.fault == "top-k":
                drawn_from[drawn_from < drawn_from.topk(20).values[-1]] = -torch.inf
                drawn_from = drawn_from.log_softmax(-1)
            if self.fault == "other temperature":
                drawn_from = (logits / 3.0).log_softmax(-1)
            ids.append(int(torch.multinomial(drawn_from.exp(), 1, generator=draw)))
            told = logits.log_softmax(-1) if self.fault == "raw logprobs" else drawn_from
            logprobs.append(float(told[ids[-1]]))
        tokens = [f"token_id:{token}" for token in ids]
        lists = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None}
        return self.spoilt({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": lists}, request)

    def spoilt(self, choice: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        lists = choice["logprobs"]
        if self.fault == "no logprobs":
            choice["logprobs"] = None
        elif self.fault == "a logprob too few":
            choice["logprobs"] = {name: values and values[:-1] for name, values in lists.items()}
        elif self.fault == "logprob is NaN":
            lists["token_logprobs"][0] = float("nan")
        elif self.fault == "other tokens":
            lists["tokens"][0] = "token_id:-1"
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

    # -- weights ---------------------------------------------------------------------------------------------

    def load(self, name: str, path: str) -> None:
        if name in self.models:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        plain = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(plain, path).merge_and_unload().eval()
        if self.fault == "not applied":
            model = self.base
        if self.fault == "keeps the adapter":
            model = self.kept = self.kept or model
        self.models[name] = model

    @torch.no_grad()
    def reload(self, folder: str) -> None:
        if not self.paused:
            raise Refused(400, "reload_weights while it may sample")
        found = {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
        own = dict(self.base.named_parameters(remove_duplicate=False))
        if found.keys() != own.keys():
            raise Refused(500, f"names differ: {sorted(found.keys() ^ own.keys())}")
        for name, tensor in found.items():
            if self.fault != "keeps weights" and not (self.fault == "old head" and name == "lm_head.weight"):
                own[name].copy_(tensor)

    @torch.no_grad()
    def update(self, info: dict[str, Any]) -> None:
        """Wait for as many tensors as were announced, and take them under the announced names."""
        names = info["names"]
        with self.arrived:
            if not self.updating:
                raise Refused(400, "no /start_weight_update before")
            if not self.arrived.wait_for(lambda: len(self.tensors) >= len(names), TENSORS_SECONDS):
                raise Refused(400, f"{len(self.tensors)} tensors of {len(names)} came")
            tensors, self.tensors = self.tensors, []
        own = dict(self.base.named_parameters())
        if set(names) != set(own) or len(names) != len(own):
            raise Refused(400, f"names differ: {sorted(set(names) ^ set(own))}")
        for name, dtype, shape, tensor in zip(names, info["dtype_names"], info["shapes"], tensors, strict=True):
            if list(tensor.shape) != shape or str(tensor.dtype) != f"torch.{dtype}":
                raise Refused(400, f"{name}: announced as {dtype} {shape}, came as {tensor.dtype} {tensor.shape}")
            own[name].copy_(tensor)

    # -- HTTP ------------------------------------------------------------------------------------------------

    def answer(self, path: str, query: str, body: bytes) -> Any:
        """Return the answer's content: an object, sent as JSON, or text."""
        if path == "/tensor":
            with self.arrived:
                self.tensors.append(torch.load(io.BytesIO(body), weights_only=True))
                self.arrived.notify_all()
            return {}
        request = json.loads(body or b"{}")
        self.log.append((path, request))
        if path == "/health":
            if self.fault == "unwell":
                raise Refused(503, "")
            return ""
        if path == "/v1/models":
            names = {name: None if name == "base" else "base" for name in self.models}
            return {"data": [{"id": name, "parent": parent} for name, parent in names.items()]}
        if path == "/server_info":
            return {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/v1/completions":
            if self.fault == "hangs":
                time.sleep(2.0)
            return self.complete(request)
        if path == "/v1/load_lora_adapter" and self.fault != "no adapters":
            self.load(request["lora_name"], request["lora_path"])
            return f"Success: LoRA adapter '{request['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            if self.models.pop(request["lora_name"], None) is None:
                raise Refused(404, "The lora adapter cannot be found.")
            return "Success"
        if path in ("/pause", "/resume"):
            if self.fault == "no development endpoints":
                raise Refused(404, "Not Found")
            assert query == ("mode=wait" if path == "/pause" else "")
            self.paused = path == "/pause"
        elif path in ("/sleep", "/wake_up"):
            assert query == ("level=1" if path == "/sleep" else "")
            self.asleep = path == "/sleep"
        elif path == "/collective_rpc":
            assert request["method"] == "reload_weights"
            self.reload(request["kwargs"]["weights_path"])
        elif path in ("/start_weight_update", "/finish_weight_update"):
            self.updating = path == "/start_weight_update"
        elif path == "/update_weights":
            self.update(request["update_info"])
        elif path not in ("/reset_prefix_cache", "/init_weight_transfer_engine"):
            raise Refused(404, "Not Found")
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: FakeVLLM

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        if path == "/v1/completions" and self.served.dies():
            self.served.stop()  # and no answer
            self.served.dead.set()
            self.close_connection = True
            return
        try:
            status, answer = 200, self.served.answer(path, query, body)
        except Refused as error:
            status, answer = error.status, {"error": {"message": str(error)}}
        except Exception as error:
            status, answer = 500, {"error": {"message": f"{type(error).__name__}: {error}"}}
        text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass
