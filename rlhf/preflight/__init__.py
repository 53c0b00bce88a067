"""Checks before the first step that refuse a run that cannot be right: the parts that all trainers share.

`run` runs checks and raises their failures, `text` checks tokenizer, template and stop tokens, `measure` compares two
ways to compute the same numbers. Each trainer's own checks are in its folder.
"""

from rlhf.moved import names_in

__getattr__ = names_in("rlhf.ppo.preflight", "rlhf.sft.preflight", only=("check_ppo", "check_sft"))
