"""`condrl benchmark`, for a checkout: see condrl/commands/benchmark.py."""

import sys

from condrl.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
