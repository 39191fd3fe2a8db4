"""The old name of `python -m CoDALanguageModel sample`."""

from .errors import run_program
from .tools.sample import main

if __name__ == "__main__":
    run_program(main)
