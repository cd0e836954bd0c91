"""`condrl serve`, for a checkout: see condrl/commands/serve.py."""

import sys

from condrl.commands.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
