"""Reading an answer that has text between its gaps. Not here: which lengths these have (`infilling` of the model)."""

from collections.abc import Callable, Sequence

from CoDALanguageModel.answers import TEXT, AnswerReader, Decode, Reading

from .scheduler import CanvasRequest


class GapReader:
    """Reads what stands between the first piece of a text and the last: gaps, each as an answer, and pieces in turn.

    Args:
        request: a canvas with several gaps.
        make_reader: reads one gap, given the ids left of it.
        decode: token ids to text, as `answers.Decode`.
    """

    def __init__(
        self, request: CanvasRequest, make_reader: Callable[[Sequence[int]], AnswerReader], decode: Decode
    ) -> None:
        self._request = request
        self._readers = [make_reader(piece) for piece in request.pieces[:-1]]
        self._decode = decode
        self._place = 0
        """The gap that is being read."""
        self._left = request.gap_lengths[0]
        """Tokens of it that are to come; negative: those of the piece before it."""
        self._before = ""
        """Text of all before it."""
        self._readings: list[Reading] = []
        """Of the gaps before it, and of this one."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Text of each gap that was read."""
        return tuple(reading.text for reading in self._readings)

    def feed(self, ids: Sequence[int], *, is_full: bool = False) -> Reading:
        """Read the next final tokens of the canvas, as `AnswerReader.feed`."""
        rest = list(ids)
        while True:
            if self._left < 0:
                skipped = min(len(rest), -self._left)
                rest, self._left = rest[skipped:], self._left + skipped
                if self._left < 0:
                    break
                self._left = self._request.gap_lengths[self._place]
            part, rest = rest[: self._left], rest[self._left :]
            self._left -= len(part)
            reading = self._readers[self._place].feed(part, is_full=not self._left)
            self._readings[self._place :] = [reading]
            if self._left or self._place == len(self._readers) - 1:
                break
            self._place += 1
            piece = self._request.pieces[self._place]
            self._before += reading.text + self._decode(piece, TEXT)
            self._left = -len(piece)
            if not piece:
                self._left = self._request.gap_lengths[self._place]
        return self._whole()

    def _whole(self) -> Reading:
        last = self._readings[-1]
        at_last = len(self._readings) == len(self._readers)
        is_over = at_last and last.finish_reason is not None
        ended = all(reading.finish_reason == "stop" for reading in self._readings)
        return Reading(
            text=self._before + (last.text if len(self._readings) > self._place else ""),
            num_tokens=sum(reading.num_tokens for reading in self._readings),
            finish_reason=("stop" if ended else "length") if is_over else None,
            end=last.end if is_over else None,
            stop=last.stop if is_over else None,
        )
