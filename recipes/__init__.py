"""What people run: a recipe per stage, each both `rlhf NAME` and `python recipes/NAME.py`.

Installed, this folder is the package `rlhf_recipes`, with the repository's `data/` inside it. `stage` holds what every
recipe does around its stage; `configs/` and `notebooks/` are there to be copied (`rlhf copy`), `guides/` to be read.
"""
