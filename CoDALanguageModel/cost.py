"""What an answer cost, counted, and how many tokens a forward pass gave. Free of torch."""

from dataclasses import dataclass, fields


def tokens_per_forward(num_tokens: int | None, forwards: int | None) -> float | None:
    """Tokens of answers over forward passes, the "TPF" of the literature on diffusion language models.

    An answer's tokens are those that its text stands for: its end token is none of them, nor is what was filled in
    behind its end. A pass counts once for each answer that takes part in it, so that the figure is the same in any
    company: once however many drafts of the answer it verifies, and however little a cache leaves to compute. Passes of
    candidates that lose against an answer are counted with those of the answer.

    Args:
        num_tokens: of one answer, or of several together.
        forwards: passes that each took part in, added up.

    Returns:
        None where nothing was computed, or nobody counted.
    """
    return num_tokens / forwards if forwards and num_tokens is not None else None


@dataclass
class DecodingCost:
    """What an answer cost, counted over the rows of a batch or for one."""

    forwards: int = 0
    """Forward passes of the model, one after the other; of a row those that it took part in."""

    rows_evaluated: int = 0
    """Rows in these passes."""

    tokens_evaluated: int = 0
    """Tokens in these rows, without padding to equal lengths."""

    tokens_shared: int = 0
    """Tokens at the start of the text whose keys and values were those of another row, and not computed."""

    tokens_committed: int = 0
    """Tokens that were filled in, end tokens included and tails behind them not."""

    cache_refreshes: int = 0
    """Rows whose keys and values were computed anew, the first time of each block included."""

    drift_checks: int = 0
    """Rows whose cached distributions were compared with fresh ones."""

    guard_hits: int = 0
    """Near ties that were computed again alone."""

    answer_tokens: int = 0
    """Those of the committed tokens that are the answer's, see `tokens_per_forward`."""

    row_forwards: int = 0
    """Forward passes, each counted once for every row that took part in it."""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the answers per forward pass of their rows; 0 where there was none."""
        return tokens_per_forward(self.answer_tokens, self.row_forwards) or 0.0

    def as_dict(self) -> dict[str, float]:
        """All counts and the tokens per forward pass, for logs and responses."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"tokens_per_forward": self.tokens_per_forward}

    def add(self, row: "DecodingCost") -> None:
        """Add what a row cost; the passes that it shared with others are not its own."""
        for f in fields(self):
            if f.name != "forwards":
                setattr(self, f.name, getattr(self, f.name) + getattr(row, f.name))
