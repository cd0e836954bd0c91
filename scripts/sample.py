"""`condrl sample`, for a checkout: see condrl/commands/sample.py."""

import sys

from condrl.commands.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
