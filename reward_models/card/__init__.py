"""The reward model's report card: its accuracy, baselines that it must beat, and the features that its scores follow.

`report` makes it, `page`, `plots` and `verdict` show it. `pairs` has scored pairs and their groups, `baselines` the
length rule and the bag of words, `lengths` the length rule of each group; `calibration`, `surface` and `sensitivity`
make one section each.
"""
