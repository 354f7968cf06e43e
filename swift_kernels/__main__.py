"""`python -m swift_kernels`: the `swift-kernels` command."""

import sys

from swift_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
