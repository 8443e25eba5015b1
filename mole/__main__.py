"""`python -m mole`."""

import sys

from mole.cli.main import main

if __name__ == "__main__":  # spawned workers import this file again
    sys.exit(main())
