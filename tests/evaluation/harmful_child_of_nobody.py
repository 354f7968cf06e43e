"""The harmful child as a user without any rights of the system's."""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    child = runpy.run_path(str(Path(__file__).with_name("harmful_child.py")))
    child["main"](child["NOBODY"])
