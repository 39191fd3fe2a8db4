"""The old name of `python -m coda_pretrain export`."""

from CoDALanguageModel.errors import run_program

from .checkpoints.export import main

if __name__ == "__main__":
    run_program(main)
