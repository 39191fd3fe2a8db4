"""The old name of `python -m CoDALanguageModel agreement`."""

from .errors import run_program
from .tools.agreement import main

if __name__ == "__main__":
    run_program(main)
