"""Evaluation that can be believed: test sets, judges with a measured error, contamination, prediction.

`registry` and `own` read evals, `classes` and `modelgraded` judge answers, `run` asks for them and `compare` pairs two
runs. `asks` asks a model for one of several choices, `judge` compares and grades responses with it, `judge_card`
measures a judge against people, and `correction` corrects it by a few of their labels. `contamination` finds eval items
in training data; `prediction` fits scaling laws and registers what they predict.
"""
