"""Slow versions and published vectors for the tests, and the run-time check of shapes in signatures."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # int is taken where float is written
