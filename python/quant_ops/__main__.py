"""``python -m quant_ops``: see the package cli."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
