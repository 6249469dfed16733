"""``python -m fp8tune``."""

import sys

from fp8tune.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
