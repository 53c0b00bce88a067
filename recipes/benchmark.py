"""Our PPO against trl's on this machine.

    rlhf benchmark
    rlhf benchmark --only speed --cases "[tiny]" --updates 2

The benchmark itself is recipes/benchmarks/ppo_vs_trl.py.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from rlhf import config as configs


def main(argv: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
    import_module("ppo_vs_trl").main(argv)


if __name__ == "__main__":
    configs.run(main)
