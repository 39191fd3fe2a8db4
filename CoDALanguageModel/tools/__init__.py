"""Programs for the shell, which do not travel with weights: `python -m CoDALanguageModel VERB`. The extra `tools`."""
