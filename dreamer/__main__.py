"""`python -m dreamer` is `dreamer`."""

import sys

from dreamer.cli import main

if __name__ == "__main__":
    sys.exit(main())
