"""A canvas as people see it while it is denoised: cells with a text, a state and a confidence, told by what changes.

Not here: which text of it is final (`answers`).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from .answers import INCOMPLETE, TEXT, Decode

if TYPE_CHECKING:
    from .row import Change

State = Literal["masked", "provisional", "committed", "given"]
"""`provisional`: masked, with the token that the last step would have put there. `given`: text between two gaps."""


class Cell(NamedTuple):
    """One token's place."""

    position: int
    """From the first mask of the canvas on."""
    text: str | None
    """In whole characters: one that is spread over tokens stands in the last of their cells, and the others are empty
    as long as it may become whole. None for a token that ends an answer."""
    state: State
    confidence: float | None
    """Probability of the token, when it was committed or at the last step, to two digits."""


class CanvasStep(NamedTuple):
    """What a step changed."""

    step: int
    """Rounds of the decoding so far; 0 shows the canvas before the first one. With `speculate` a round is several
    denoising steps."""
    cells: tuple[Cell, ...]
    """Those that are not as they were, in order."""
    length: int | None = None
    """Of a canvas that begins: as many masked cells, before `cells`."""


def rebuilt(steps: Iterable[CanvasStep]) -> list[Cell]:
    """The whole canvas after some steps, the first of which begins it."""
    canvas: list[Cell] = []
    for step in steps:
        if step.length is not None:
            canvas = [Cell(i, "", "masked", None) for i in range(step.length)]
        for cell in step.cells:
            canvas[cell.position] = cell
    return canvas


class CanvasView:
    """Follows one canvas.

    Args:
        pieces: ids before, between and behind the gaps; what stands before the first gap and behind the last one is not
            part of the view.
        gap_lengths: masks of each gap.
        decode: ids to text.
        end_ids: ids that end an answer.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[int]],
        gap_lengths: Sequence[int],
        *,
        decode: Decode,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._text_of = lru_cache(maxsize=None)(lambda token: decode([token], TEXT))
        self._end_ids = end_ids
        self._tokens: list[int | None] = []
        self._before: dict[int, Sequence[int]] = {}
        """Ids before each gap, by its first position: they may decide how its first token is spelled."""
        self._states: list[State] = []
        self._part: list[int] = []
        """Counts the gaps and the pieces between them; no character is spread over two."""
        for i, (piece, length) in enumerate(zip(pieces, gap_lengths, strict=False)):
            if i:
                self._tokens += piece
                self._states += ["given"] * len(piece)
                self._part += [2 * i - 1] * len(piece)
            self._before[len(self._tokens)] = piece
            self._tokens += [None] * length
            self._states += ["masked"] * length
            self._part += [2 * i] * length
        self._confidences: list[float | None] = [None] * len(self._tokens)
        self._texts: list[str | None] = [""] * len(self._tokens)
        self._steps = 0
        for position, state in enumerate(self._states):
            if state == "given":
                self._spell(position)

    @property
    def cells(self) -> list[Cell]:
        """All cells."""
        return [self._cell(i) for i in range(len(self._tokens))]

    def whole(self) -> CanvasStep:
        """The canvas as it is, for someone who has seen nothing of it."""
        told = tuple(cell for cell in self.cells if cell.state != "masked")
        return CanvasStep(self._steps, told, length=len(self._tokens))

    def step(self, changes: Iterable["Change"], start: int = 0) -> CanvasStep:
        """Follow a step.

        Args:
            changes: what it shows, as `Row.shown`.
            start: column of the first position.
        """
        self._steps += 1
        before: dict[int, Cell] = {}
        for change in changes:
            position = change.column - start
            before.setdefault(position, self._cell(position))
            self._tokens[position] = change.token
            self._states[position] = (
                "committed" if change.is_committed else "masked" if change.token is None else "provisional"
            )
            self._confidences[position] = None if change.probability is None else round(change.probability, 2)
        for position in sorted(before):
            for other, cell in self._spell(position).items():
                before.setdefault(other, cell)
        return CanvasStep(self._steps, tuple(self._cell(i) for i in sorted(before) if self._cell(i) != before[i]))

    def _cell(self, position: int) -> Cell:
        return Cell(position, self._texts[position], self._states[position], self._confidences[position])

    def _alone(self, position: int) -> str:
        """Text of a token by itself."""
        token = self._tokens[position]
        after = self._before.get(position)
        return self._text_of(token) if after is None else self._decode([token], after)

    def _is_settled(self, position: int) -> bool:
        return self._states[position] in ("committed", "given")

    def _is_fragment(self, position: int, beside: int) -> bool:
        """Whether a token is no whole characters, and may be joined with one beside it."""
        if not 0 <= position < len(self._tokens) or self._part[position] != self._part[beside]:
            return False
        token = self._tokens[position]
        return token is not None and token not in self._end_ids and INCOMPLETE in self._alone(position)

    def _is_open(self, position: int, beside: int) -> bool:
        """Whether what belongs to a token may be about to come at a place beside it."""
        is_there = 0 <= position < len(self._tokens) and self._part[position] == self._part[beside]
        return is_there and not self._is_settled(position)

    def _spell(self, position: int) -> dict[int, Cell]:
        """Write a token anew, and those of a character with it; gives the cells as they were."""
        first, behind = position, position + 1
        while self._is_fragment(first - 1, first) and not _ends_whole(self._texts[first - 1]):
            first -= 1
        while self._is_fragment(behind, position):
            behind += 1
        were = {i: self._cell(i) for i in range(first, behind)}
        starts_open = self._is_open(first - 1, first) and not self._is_fragment(first - 1, first)
        pending: list[int] = []
        """Places of a character whose end is to come."""

        def decode(places: Sequence[int]) -> str:
            ids = [self._tokens[i] for i in places]
            return self._decode(ids, self._before.get(places[0], TEXT))

        def put(place: int, text: str | None) -> None:
            nonlocal starts_open
            if starts_open and text is not None:  # the end of a character whose beginning is to come
                text = text.lstrip(INCOMPLETE)
            starts_open = starts_open and not text
            self._texts[place] = text

        def flush(following: int) -> None:
            if pending:
                put(pending[-1], "" if self._is_open(following, pending[-1]) else decode(pending))
                pending.clear()

        for i in range(first, behind):
            token = self._tokens[i]
            if not self._is_fragment(i, i):
                flush(i)
                self._texts[i] = "" if token is None else None if token in self._end_ids else self._alone(i)
                starts_open = self._is_open(i, i)
                continue
            if pending and decode([*pending, i]) == decode(pending) + decode([i]):
                flush(i)
            pending.append(i)
            text = decode(pending)
            self._texts[i] = ""
            if not text.endswith(INCOMPLETE):
                put(i, text)
                pending.clear()
        flush(behind)
        return were


class CanvasStreamer:
    """For `diffusion_generate(streamer=...)`: shows the canvas before the first pass and after each one.

    Args:
        decode: ids to text, as `prompts.Codec.decode`.
        on_step: is called with each `CanvasStep`, the first of which begins the canvas.
        end_ids: ids that end an answer.
    """

    def __init__(
        self, decode: Decode, on_step: Callable[[CanvasStep], object], end_ids: frozenset[int] = frozenset()
    ) -> None:
        self._decode, self._on_step, self._end_ids = decode, on_step, end_ids

    def begin(self, pieces: Sequence[Sequence[int]], gap_lengths: Sequence[int]) -> None:
        """See `streamers.ChangeStreamer`."""
        self._view = CanvasView(pieces, gap_lengths, decode=self._decode, end_ids=self._end_ids)
        self._on_step(self._view.whole())

    def put_changes(self, changes: Sequence["Change"]) -> None:
        """See `streamers.ChangeStreamer`."""
        self._on_step(self._view.step(changes))

    def put(self, value: object) -> None:
        """Final tokens: they have been shown as committed."""

    def end(self) -> None:
        """Nothing is left to show."""


def _ends_whole(text: str | None) -> bool:
    return bool(text) and not text.endswith(INCOMPLETE)
