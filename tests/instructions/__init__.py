"""Counts the instructions of a step under valgrind, and holds them against the committed counts.

`python -m tests.instructions` counts, compares and prints; `cases.py` says what, `measure.py` how.
"""
