"""`condrl finetune`, for a checkout: see condrl/commands/finetune.py."""

import sys

from condrl.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
