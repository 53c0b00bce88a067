"""What a bug report needs: versions of the packages, Python, the machine, its devices. Works with packages missing."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rlhf.errors import hidden

PACKAGES = (
    "rlhf-recipes", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors",
    "huggingface-hub", "numpy", "jsonargparse", "jaxtyping", "matplotlib", "rich", "PyYAML",
)  # fmt: skip
"""What the library stands on: named even where it is missing."""
OPTIONAL = (
    "gguf", "bitsandbytes", "jsonschema", "fastapi", "uvicorn", "trackio", "tensorboard", "wandb", "vllm", "deepspeed",
    "flash-attn", "triton",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME",
    "PYTORCH_CUDA_ALLOC_CONF", "ACCELERATE_USE_CPU", "WORLD_SIZE",
)  # fmt: skip
"""Variables that change what a run does; none of them holds a secret."""


def report() -> str:
    """Return the lines to paste into a bug report."""
    return "\n".join(f"{name:<24}{value}" for name, value in _entries())


def machine() -> str:
    """Return the machine in a line: processor, cores, memory, and the GPUs if torch is loaded."""
    cores = _usable()
    parts = [f"{_processor()}, {cores} core{'s' if cores > 1 else ''}, {_memory()}"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return "; ".join(parts)


def command() -> str:
    """Return the command line that started this process, as a user would type it, without passwords and tokens."""
    script = Path(sys.argv[0])
    words = [script.name] if script.name == "rlhf" else [Path(sys.executable).name, sys.argv[0]]
    return hidden(shlex.join([*words, *sys.argv[1:]]))


def _entries() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "OS", platform.platform()
    for name in PACKAGES:
        yield name, _version(name) or "not installed"
    yield "optional", ", ".join(f"{name} {version}" for name in OPTIONAL if (version := _version(name))) or "none"
    yield "CPU", f"{_processor()}, {_usable()} of {os.cpu_count()} cores usable, {_memory()}"
    yield from _devices()
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (AttributeError, OSError, ValueError):
        return "memory unknown"


def _devices() -> Iterator[tuple[str, str]]:
    """What torch sees."""
    try:
        import torch
    except Exception as error:  # a broken build raises what it likes
        yield "devices", f"unknown, torch cannot be imported ({type(error).__name__}: {error})"
        return
    able = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    vectors = [name for name in able if name.startswith(("avx", "amx", "fma", "neon", "asimd", "sve", "bf16"))]
    yield "CPU can", ", ".join(sorted(vectors)) or "unknown"
    yield "threads", str(torch.get_num_threads())
    yield "CUDA", f"{torch.version.cuda or 'not in this build of torch'}"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
