"""`condrl evaluate`, for a checkout: see condrl/commands/evaluate.py."""

import sys

from condrl.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
