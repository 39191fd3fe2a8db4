"""The old name of `python -m coda_pretrain export`."""

import sys

from .checkpoints.export import main

if __name__ == "__main__":
    sys.exit(main())
