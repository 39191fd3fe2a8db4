"""The old name of `python -m coda_pretrain cluster`."""

from CoDALanguageModel.errors import run_program

from .data.cluster import main

if __name__ == "__main__":
    run_program(main)
