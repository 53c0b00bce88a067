"""Evaluation that can be believed: test sets, judges with a measured error, contamination, prediction.

`registry` reads evals, and `classes` gives their verdicts. `asks` asks a model for one of several choices, `judge`
compares and grades responses with it, and `correction` corrects a judge by a few human labels. `contamination` finds
eval items in training data; `prediction` fits scaling laws and registers what they predict.
"""
