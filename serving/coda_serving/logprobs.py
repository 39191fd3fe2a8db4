"""Log-probabilities of tokens, in the two shapes that OpenAI gives them.

A token's log-probability is the one that the model gave it when it was committed, before temperature and filters.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from CoDALanguageModel.answers import INCOMPLETE, TEXT, Decode

from .engine import Judged

LEAST = -9999.0
"""Stands for minus infinity, which JSON has not, as in OpenAI's API."""


class BestToken(BaseModel):
    """A token and its log-probability."""

    token: str
    """Its text; `token_id:N` where it is no whole character, or no text."""
    logprob: float
    bytes: list[int] | None
    """UTF-8 of its text, where that is whole."""


class ChatToken(BestToken):
    """A token of an answer."""

    top_logprobs: list[BestToken]
    step: int
    """Denoising step that committed it. Extension."""


class ChatLogprobs(BaseModel):
    """`logprobs` of a conversation."""

    content: list[ChatToken]
    refusal: None = None


class TextLogprobs(BaseModel):
    """`logprobs` of a plain text. The first token of an echoed prompt, which nothing stands before, has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's text before each token."""
    steps: list[int | None]
    """Denoising step that committed each. Extension."""


class Spelling(NamedTuple):
    """How tokens are written.

    Args:
        decode: token ids to text.
        num_best: most probable tokens to name at each place.
    """

    decode: Decode
    num_best: int

    def token(self, token: int) -> tuple[str, list[int] | None]:
        """A token by itself: its text and bytes."""
        text = self.decode([token], TEXT)
        return (f"token_id:{token}", None) if not text or INCOMPLETE in text else (text, list(text.encode()))

    def best(self, judged: Judged) -> list[BestToken]:
        """The most probable tokens at a place."""
        best = judged.evidence.best[: self.num_best]
        named = ((*self.token(token), logprob) for token, logprob in best if logprob > LEAST)
        return [BestToken(token=text, bytes=raw, logprob=logprob) for text, raw, logprob in named]

    def chat(self, tokens: Sequence[Judged]) -> ChatLogprobs:
        """In the shape of a conversation."""
        content = []
        for judged in tokens:
            text, raw = self.token(judged.token)
            content.append(
                ChatToken(
                    token=text,
                    bytes=raw,
                    logprob=finite(judged),
                    top_logprobs=self.best(judged),
                    step=judged.evidence.step,
                )
            )
        return ChatLogprobs(content=content)

    def text(
        self, tokens: Sequence[Judged], *, first: int | None = None, offsets: "Offsets | None" = None
    ) -> TextLogprobs:
        """In the shape of a plain text.

        Args:
            tokens: those of the text, or of a part of it.
            first: a token before them that nothing judged.
            offsets: where the parts before ended; None for the beginning.
        """
        offsets = offsets or Offsets(self.decode)
        before = [] if first is None else [first]
        spelled = [self.token(token)[0] for token in (*before, *(judged.token for judged in tokens))]
        top = []
        for judged, text in zip(tokens, spelled[len(before) :], strict=True):
            best = {text: finite(judged)}
            for other in self.best(judged):  # two tokens may be spelled alike: the more probable one counts
                best.setdefault(other.token, other.logprob)
            top.append(best)
        return TextLogprobs(
            tokens=spelled,
            token_logprobs=[None] * len(before) + [finite(judged) for judged in tokens],
            top_logprobs=[None] * len(before) + top,
            text_offset=offsets.of([*before, *(judged.token for judged in tokens)]),
            steps=[None] * len(before) + [judged.evidence.step for judged in tokens],
        )


class Offsets:
    """Characters before each token of a text, of which any portions come in turn.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._start = 0
        self._pending: list[int] = []

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Those of the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._start)
            self._pending.append(token)
            text = self._decode(self._pending, TEXT)
            if not text.endswith(INCOMPLETE):  # a character may have several tokens
                self._start, self._pending = self._start + len(text), []
        return offsets


def finite(judged: Judged) -> float:
    """The log-probability of a token."""
    return max(judged.evidence.log_probability, LEAST)
