"""The old name of `python -m CoDALanguageModel sample`."""

from .tools.sample import main

if __name__ == "__main__":
    main()
