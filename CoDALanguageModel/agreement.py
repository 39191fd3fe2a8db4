"""The old name of `python -m CoDALanguageModel agreement`."""

from .tools.agreement import main

if __name__ == "__main__":
    main()
