"""The old name of `python -m coda_pretrain cluster`."""

import sys

from .data.cluster import main

if __name__ == "__main__":
    sys.exit(main())
