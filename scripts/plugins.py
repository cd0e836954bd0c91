"""`condrl plugins`, for a checkout: see condrl/commands/plugins.py."""

import sys

from condrl.commands.plugins import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
