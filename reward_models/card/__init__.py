"""The reward model's report card: how often it is right, beside what it must beat, and what it looks at.

`report` makes it, `page` and `plots` show it; `pairs` holds scored pairs and their groups, `baselines` the length
rules and the bag of words, `calibration`, `surface` and `sensitivity` one section each.
"""
