"""The reward model's report card: its accuracy, baselines that it must beat, and the features that its scores follow.

`report` makes it, `page` and `plots` show it. `pairs` has scored pairs and their groups, `baselines` the length rules
and the bag of words; `calibration`, `surface` and `sensitivity` make one section each.
"""
