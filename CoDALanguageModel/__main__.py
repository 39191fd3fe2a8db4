"""`python -m CoDALanguageModel VERB`: decode in the shell, compare regimes, write the tables of settings."""

import importlib
import sys

from .errors import run_program

VERBS = {
    "sample": "decode a prompt or a text with gaps, live",
    "agreement": "how far a regime is from the exact one, in tokens, forward passes and time",
    "tables": "write the tables of decoding settings in READMEs anew",
}


def main() -> None:
    """Run the verb; each has its own `--help`."""
    verb, words = (sys.argv[1], sys.argv[2:]) if sys.argv[1:] else ("", [])
    if verb not in VERBS:
        told = "\n".join(f"  {name:<10} {says}" for name, says in VERBS.items())
        print(
            f"usage: python -m CoDALanguageModel VERB ...\n{told}",
            file=sys.stdout if verb in ("-h", "--help") else sys.stderr,
        )
        sys.exit(0 if verb in ("-h", "--help") else 2)
    try:
        module = importlib.import_module(f".tools.{verb}", __package__)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {verb} needs the package {error.name}: install the extra 'tools'")
    module.main(words)


if __name__ == "__main__":
    run_program(main)
