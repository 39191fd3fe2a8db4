"""Which tokens of a row are masked: strategies, how they move over a run, and the rows of a step."""
