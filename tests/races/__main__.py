from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.races import run


def main() -> int:
    parser = argparse.ArgumentParser(description="Looks for races of the C++ kernels with ThreadSanitizer.")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    if reason := run.missing():
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        code, found, said = run.run(run.build(Path(folder)), seconds=options.seconds)
    print(said if found is None else found)
    return code


if __name__ == "__main__":
    sys.exit(main())
