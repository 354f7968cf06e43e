"""Measures what scoring costs, against rivals and against what the machine can do at best."""
