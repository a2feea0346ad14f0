"""``python -m pointfuse``."""

import sys

from pointfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
