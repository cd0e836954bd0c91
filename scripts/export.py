"""`condrl export`, for a checkout: see condrl/commands/export.py."""

import sys

from condrl.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
