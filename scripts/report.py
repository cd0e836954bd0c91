"""`condrl report`, for a checkout: see condrl/commands/report.py."""

import sys

from condrl.commands.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
