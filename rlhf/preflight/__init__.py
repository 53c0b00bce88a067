"""Checks that refuse a run that cannot be right, before it spends its time: the parts that all trainers share.

`run` runs checks and tells what failed, `text` looks at tokenizer, template and stop tokens, `measure` compares two
ways to compute the same numbers. Each trainer's own checks stand beside it.
"""

from rlhf.moved import names_in

__getattr__ = names_in("rlhf.ppo.preflight", "rlhf.sft.preflight", only=("check_ppo", "check_sft"))
