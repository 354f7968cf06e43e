"""The C++ kernels under ThreadSanitizer, while another thread rewrites the slots that they are given.

`python -m tests.races --seconds 60` builds them, runs steps for so long, and prints how many.
"""
