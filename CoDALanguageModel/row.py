"""One canvas of a decoding, on the host: its settings, its plan, and what of it has become final.

All that a step does here is about the tokens that changed in it. Not here: tensors of many rows (`canvas`).
"""

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from operator import attrgetter, index
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .attention_coda import block_numbers
from .configuration_coda import CoDAConfig, token_ids
from .constraints import Cells, Constraint
from .cost import DecodingCost
from .diffusion import scored_by
from .errors import UserError
from .generation_config_coda import DiffusionGenerationConfig
from .orders import ORDERS, REMASKS, RULES, Order, Rule
from .schedule import Commit, plan_commits
from .vocabulary import Vocabulary

Decode = Callable[[list[int]], str]
FinishReason = Literal["end", "stop", "length"]
"""An end token, a stop string, or neither in a canvas without masks."""

TOKENS_OF_A_CHARACTER = 4
"""At most: no character has more bytes in UTF-8."""

NOTHING_TO_FILL = "nothing to fill: max_new_tokens is 0 and inputs hold no mask token"


class DecodingStalled(RuntimeError):
    """A step committed nothing in a row, which would then be decoded for ever."""


class Evidence(NamedTuple):
    """What the model thought of a token when it was committed, before temperature and filters."""

    log_probability: float
    step: int
    best: tuple[tuple[int, float], ...]
    """The most probable tokens there and their log-probabilities, where the request keeps them."""


class Change(NamedTuple):
    """What a step shows of a column that it did not show before."""

    column: int
    token: int | None
    """What stands there, or what the step would have put there; None where it is masked and nothing is known of it."""
    probability: float | None
    """That the model gave the token when it was committed, or at this step; before temperature and filters."""
    is_committed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One canvas to fill.

    Raises:
        UserError: `ids`, `attention_mask` or `forced` are no integers of one row.
    """

    ids: Sequence[int]
    """The prompt: a list, or a tensor or array of one dimension. Mask tokens in it are gaps; `max_new_tokens` masks are
    appended."""

    settings: DiffusionGenerationConfig
    """All decoding settings; token ids that are None are the model's. `num_return_sequences`, `output_history` and
    `return_dict_in_generate` are for callers that give back whole batches and mean nothing here."""

    seed: int | None = None
    """Instead of the one in the settings."""

    attention_mask: Sequence[int] | None = None
    """1 at real tokens and 0 at padding, anywhere; by default all real."""

    processors: Sequence[Any] = ()
    """transformers' logits processors, called with the (N, width) canvases and (N, V) scores of rows with the same
    processors."""

    keeps_best: bool = False
    """With `output_scores`, keep the `NUM_BEST` most probable tokens beside each one committed."""

    keeps_guesses: bool = False
    """Keep what each step would have put at the masks that it leaves, see `Row.shown`."""

    forced: Sequence[int] | None = None
    """One token per column: what is committed at masks instead of the model's choice; the model only judges it."""

    constraint: Constraint | None = None
    """What `constraints.constraint_of` made of `regex` or `json_schema`, where the settings have one of them."""

    def __post_init__(self):
        for name in ("ids", "attention_mask", "forced"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integers(name, getattr(self, name)))


def _integers(name: str, values: Any) -> list[int]:
    """The integers in a list, tensor or array of one dimension."""
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray))
    try:
        return [int(index(value)) for value in (values if is_list else values.tolist())]
    except (AttributeError, TypeError) as error:
        got = f"{values.dtype} {tuple(values.shape)}" if hasattr(values, "shape") else f"{values!r:.80}"
        raise UserError(f"{name} must be a list or tensor of one dimension, of integers, got {got}") from error


class Sampling(NamedTuple):
    """What a decision depends on besides the scores of a row, its step and its seed."""

    order: Order
    alg_temp: float | None
    temperature: float
    top_p: float | None
    top_k: int | None
    rule: Rule | None
    bound: float | None
    remask: Callable[[Tensor, Tensor], Tensor] | None
    eta: float | None
    keeps_scores: bool
    keeps_best: bool
    is_forced: bool

    @classmethod
    def of(cls, config: DiffusionGenerationConfig, request: Request) -> "Sampling":
        """What the settings say."""
        rule = config.parallel_rule
        return cls(
            order=ORDERS[config.alg],
            alg_temp=config.alg_temp,
            temperature=0.0 if config.do_sample is False else float(config.temperature),
            top_p=config.top_p,
            top_k=config.top_k,
            rule=None if rule is None else RULES[rule],
            bound=None if rule is None else float(getattr(config, rule)),
            remask=None if config.remask is None else REMASKS[config.remask],
            eta=config.eta,
            keeps_scores=config.output_scores or config.remask is not None or request.keeps_guesses,
            keeps_best=config.output_scores and request.keeps_best,
            is_forced=request.forced is not None,
        )


@dataclass(eq=False)
class Row:
    """A canvas being decoded: the handle that `Decoding.admit` gives.

    Raises:
        UserError: the request cannot be decoded.
    """

    request: Request
    number: int
    """Counts the requests of a decoding."""
    model_config: CoDAConfig = field(repr=False)
    decode: Decode | None = field(repr=False)

    def __post_init__(self):
        request, model = self.request, self.model_config
        self.config = config = complete(request.settings, model)
        if config.stop_strings and self.decode is None:
            raise UserError("stop_strings need the tokenizer: give its decode function")
        self.seed: int = config.seed if request.seed is None else request.seed
        if not isinstance(self.seed, int):
            raise UserError(f"seed must be one integer for one row, got {self.seed!r}")
        self.prompt_length = len(request.ids)
        if config.max_new_tokens > model.max_position_embeddings:  # before there is a list of so many
            raise self._too_long(self.prompt_length)
        self.ids: list[int] = [*request.ids, *[config.mask_token_id] * config.max_new_tokens]
        self.attention_mask = [*(request.attention_mask or [1] * self.prompt_length), *[1] * config.max_new_tokens]
        self.width = len(self.ids)
        if len(self.attention_mask) != self.width or not {0, 1}.issuperset(self.attention_mask):
            raise UserError(f"attention_mask must hold 0 or 1 for each id ({self.prompt_length})")
        self.num_real = sum(self.attention_mask)
        self._lay_out()
        self._check()
        self.vocabulary = Vocabulary(config, model.vocab_size, request.processors)
        self.sampling = Sampling.of(config, request)
        self.constraint = request.constraint
        self._constrain()
        self._coming = plan_commits(
            [last - first for first, last in pairwise(self.starts)],
            steps=config.steps,
            eps=config.eps,
            schedule=config.schedule,
            keeps_deciding=self.sampling.order.keeps_deciding,
        )
        self.plan: list[Commit] = []
        """The steps of all blocks up to the present one; those behind it are planned when it is done."""
        self._totals: list[int] = []
        """Tokens that the steps commit up to each of them."""
        self.eos_ids = frozenset(token_ids(config.eos_token_id))
        width = self.width if self.vocabulary.processors else None
        self.key: Hashable = (self.vocabulary.key, width, self.sampling, self.constraint)
        """Equal for rows that are treated alike."""
        self.cost = DecodingCost()
        self.committed = self.num_steps = self.num_settled = self._searched = 0
        self._longest_stop = max(map(len, config.stop_strings or ()), default=0)
        self.end = self.width
        """Column behind the last token of the answer."""
        self.reason: FinishReason | None = None
        """Why the answer ends there, as soon as it is known."""
        self.error: Exception | None = None
        """What was wrong with this row alone; it has left the decoding then."""
        self.is_present = True
        self.changed: list[int] = []
        """Columns whose token has changed in the present step."""
        self.commit_steps = [-1] * self.width if config.output_scores else None
        self.log_probability: Tensor | None = None
        """(width,) float32 with `output_scores`, once the row has left the decoding."""
        self.keeps_evidence: bool = config.output_scores or request.keeps_guesses
        self.evidence: dict[int, Evidence] = {}
        """Of each committed column, where the row keeps it."""
        self.guesses: dict[int, tuple[int, float]] = {}
        """Columns that the last step left masked: the token that it would have put there, and its log-probability."""
        self.cached_block, self.cache_age = -1, 0
        self.drafts: list[tuple[Tensor, Tensor]] = []

    def _lay_out(self) -> None:
        """Find for each column its position, what scores it, and the block in which it is decoded."""
        model, length = self.model_config, self.config.block_length
        real = torch.tensor(self.attention_mask)
        position = (real.cumsum(0) - 1).clamp(min=0)
        gaps = ((torch.tensor(self.ids) == self.config.mask_token_id) & real.bool()).nonzero().squeeze(1)
        ordinal = torch.arange(len(gaps))
        self.columns: list[int] = real.nonzero().squeeze(1).tolist()
        """Column of each position of the text."""
        self.gaps: list[int] = gaps.tolist()
        """Columns to fill."""
        masked = position[gaps]
        self.answer_start = int(masked[0]) if self.gaps and model.block_origin == "answer" else 0
        """Position at which a block of the model begins."""
        if model.has_blocks:
            answer_start = torch.tensor(self.answer_start)
            number = block_numbers(masked, length, answer_start)
            block = number.unique_consecutive(return_inverse=True)[1]
        else:
            block = ordinal // (length or max(1, len(gaps)))
        is_start = torch.ones_like(block, dtype=torch.bool)
        is_start[1:] = block[1:] != block[:-1]
        self.starts: list[int] = [*is_start.nonzero().squeeze(1).tolist(), len(gaps)]
        """Masks left of each block that is decoded, and all of them."""
        if model.has_blocks:
            first = masked[self.starts[:-1]]
            self.blocks: list[int] = block_numbers(first, model.block_size, answer_start).tolist()
            """The model's block in which each block is decoded."""
        nowhere = torch.full_like(position, -1)
        self.facts = {
            "attention_mask": real,
            "position_ids": position,
            "column": torch.nn.functional.pad(real.nonzero().squeeze(1), (0, self.width - len(self.columns))),
            "source": scored_by(real[None], shift=model.logits_shift)[0],
            "ordinal": nowhere.index_put((gaps,), ordinal),
            "block": nowhere.index_put((gaps,), block),
        }
        """(width,) int64 each; see `Canvas`."""

    def _check(self) -> None:
        config, model, prompt = self.config, self.model_config, self.ids[: self.prompt_length]
        if prompt and not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise UserError(f"token ids must be in [0, {model.vocab_size}), got {min(prompt)} to {max(prompt)}")
        if not self.gaps:
            raise UserError(NOTHING_TO_FILL)
        longest = self.num_real - config.max_new_tokens
        if self.request.forced is not None and len(self.request.forced) != self.width:
            raise UserError(f"forced must hold one token per column ({self.width}), got {len(self.request.forced)}")
        if self.num_real > model.max_position_embeddings:
            raise self._too_long(longest)
        if self.facts["source"][self.gaps[0]] < 0:
            raise UserError(
                f"row {self.number} starts with a mask, which nothing scores: each token is scored by the one before "
                "it, so put a token (such as the start token) in front"
            )
        if model.has_blocks:
            behind = self.span(0)[1]
            late = [i for i in range(behind, longest) if self.ids[self.columns[i]] != config.mask_token_id]
            if late:
                raise UserError(
                    f"the gap at token {self.columns.index(self.gaps[0])} of the text has text behind it in a later "
                    f"block (token {late[0]}), which a model with attention 'block_causal' does not see while it fills "
                    f"the gap: all text must stand before token {behind}, where the gap's block of block_size="
                    f"{model.block_size} ends, or the model must have attention 'full'"
                )

    def _too_long(self, prompt: int) -> UserError:
        return UserError(
            f"the prompt of {prompt} tokens and max_new_tokens={self.config.max_new_tokens} do not fit in the context "
            f"of {self.model_config.max_position_embeddings} tokens"
        )

    def _constrain(self) -> None:
        """Lay out what the constraint covers: all from the first gap to the last."""
        name = next((name for name in ("regex", "json_schema") if getattr(self.config, name) is not None), None)
        if (name is None) != (self.constraint is None):
            raise UserError(
                "regex and json_schema need what is made of them with the tokenizer: give `diffusion_generate` "
                "tokenizer=..., `Decoding` lexicon=..., or `Request` constraint=..."
            )
        if self.constraint is None:
            return
        first, last = self.columns.index(self.gaps[0]), self.columns.index(self.gaps[-1])
        self.covered = self.columns[first : last + 1]
        """Columns that the constraint covers."""
        self.cell_of = {column: i for i, column in enumerate(self.covered)}
        """Place of each of them among the cells."""
        self.cells = Cells(self.constraint, self._cell_tokens(()))
        if not self.cells.is_completable:
            least, given = self.constraint.least, len(self.gaps)
            if given == self.config.max_new_tokens:
                if given < least:
                    raise UserError(f"max_new_tokens must be at least {least} for this {name}, got {given}")
                raise UserError(
                    f"max_new_tokens={given}: no text of so many tokens matches {name}, and none may end before"
                )
            raise UserError(
                f"gaps of {given} masks cannot be filled so that all from the first to the last matches {name}; the "
                f"shortest text of it has {least} tokens"
            )

    def _cell_tokens(self, masked: Collection[int]) -> list[int | None]:
        mask, ids = self.config.mask_token_id, self.ids
        return [None if ids[column] == mask or column in masked else ids[column] for column in self.covered]

    def open_cells(self, masked: Collection[int]) -> Cells:
        """The cells that the constraint covers, as they are now; columns in `masked` as if they were masked."""
        self.cells.update(self._cell_tokens(masked))
        return self.cells

    def span(self, block: int) -> tuple[int, int]:
        """The first position of the model's block in which a block is decoded, and the one behind its last."""
        size = self.model_config.block_size
        start = self.blocks[block] * size - -self.answer_start % size
        return max(0, start), min(start + size, self.num_real)

    def shared_with(self, other: "Row") -> int:
        """Tokens at the start of both prompts whose keys and values are the same, in whole blocks of the model."""
        if (self.answer_start - other.answer_start) % self.model_config.block_size:
            return 0
        pairs = zip(self.prefix, other.prefix, strict=False)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.prefix), len(other.prefix)))
        return self.whole_blocks(equal)

    def whole_blocks(self, length: int) -> int:
        """As many of the first `length` tokens as are whole blocks of the model."""
        size = self.model_config.block_size
        ahead = -self.answer_start % size
        return max(0, (length + ahead) // size * size - ahead)

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens of the text before the first block of the model that holds a mask."""
        return [self.ids[column] for column in self.columns[: self.span(0)[0]]]

    @property
    def live(self) -> int:
        """Columns that the canvas needs: with attention by blocks all behind the present block are unseen masks."""
        if not self.model_config.has_blocks:
            return self.width
        # A draft of several steps may end in the next block.
        block = min(self.next_commit().block + bool(self.config.speculate), len(self.blocks) - 1)
        return max(self.prompt_length, self.columns[self.span(block)[1] - 1] + 1)

    @property
    def settled(self) -> int:
        """Columns at the left whose tokens are final."""
        return self.gaps[self.num_settled] if self.num_settled < len(self.gaps) else self.width

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to decode."""
        if self.num_settled == len(self.gaps):
            return True
        return self.reason is not None and self.config.eos_early_stop

    def next_commit(self, ahead: int = 0) -> Commit:
        """What the next step is to do, after `ahead` tokens that are assumed to be committed already."""
        if not self.config.commits_are_final:
            while len(self.plan) <= self.num_steps:
                self._plan_block()
            return self.plan[self.num_steps]
        done = self.committed + ahead
        while not self._totals or self._totals[-1] <= done:
            self._plan_block()
        # Rows that are ahead of the schedule skip the steps that would commit nothing.
        place = bisect_right(self._totals, done)
        return self.plan[place]._replace(count=self._totals[place] - done)

    def _plan_block(self) -> None:
        for commit in next(self._coming):
            self.plan.append(commit)
            self._totals.append(commit.count + (self._totals[-1] if self._totals else 0))

    def commits_of(self, block: int) -> list[Commit]:
        """The planned steps of a block, up to the present one."""
        number = attrgetter("block")
        return self.plan[bisect_left(self.plan, block, key=number) : bisect_right(self.plan, block, key=number)]

    def take(
        self, commit: Commit, count: int, columns: list[int], tokens: list[int], evidence: list[Evidence] | None = None
    ) -> None:
        """Note what a step did.

        Args:
            commit: what it was to do.
            count: tokens that it chose.
            columns: where the canvas has changed.
            tokens: what stands there now.
            evidence: what the model thought of them, where it is kept.
        """
        config = self.config
        if not count:  # although its plan asks for it in every step
            self.error = DecodingStalled(
                f"step {commit.step} of row {self.number} committed none of {commit.count} tokens: its scores are not "
                f"finite (alg {config.alg!r}, alg_temp {config.alg_temp}, temperature {config.temperature})"
            )
            return
        for column, token in zip(columns, tokens, strict=True):
            self.ids[column] = token
            if self.commit_steps is not None and token != config.mask_token_id:
                self.commit_steps[column] = commit.step
        if self.keeps_evidence and evidence is not None:
            self.evidence.update(zip(columns, evidence, strict=True))
        self.changed += columns
        self.committed += count
        self.num_steps += 1
        start = self.num_settled
        if config.commits_are_final:
            while self.num_settled < len(self.gaps) and self.ids[self.gaps[self.num_settled]] != config.mask_token_id:
                self.num_settled += 1
        else:  # tokens of a block may be taken back until all of it is done
            is_done = self.num_steps == len(self.plan) or self.plan[self.num_steps].block > commit.block
            self.num_settled = self.starts[commit.block + is_done]
        if self.reason is None and self.num_settled > start:
            self._look_for_the_end(start)

    def _look_for_the_end(self, start: int) -> None:
        """Find the end of the answer: final tokens left of the first one that is not, appended ones only."""
        fresh = (gap for gap in self.gaps[start : self.num_settled] if gap >= self.prompt_length)
        first_end = next((gap for gap in fresh if self.ids[gap] in self.eos_ids), None)
        stop = self._first_stop(self.settled if first_end is None else first_end)
        if stop is not None:
            self.end, self.reason = stop, "stop"
        elif first_end is not None:
            self.end, self.reason = first_end + 1, "end"
        elif self.num_settled == len(self.gaps):
            self.reason = "length"

    def _first_stop(self, last: int) -> int | None:
        """Column behind the fewest appended tokens whose text holds a stop string; None if there is none before `last`.

        Only what is new is decoded, and as much on its left as a stop string that ends in it can hold.
        """
        if not self._longest_stop or last <= self.prompt_length:
            return None
        seen = self._searched - TOKENS_OF_A_CHARACTER * (self._longest_stop + 1)
        self._searched = last - self.prompt_length
        if not self._holds_stop(self.ids[self.prompt_length + max(0, seen) : last]):
            return None
        new = self.ids[self.prompt_length : last]
        if not self._holds_stop(new):  # it was not in the text, but in a piece of a character
            return None
        low, high = 1, len(new)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds_stop(new[:middle]) else (middle + 1, high)
        return self.prompt_length + low

    def _holds_stop(self, ids: list[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.config.stop_strings)

    def shown(self) -> list[Change]:
        """What the present step shows, of a row whose request has `keeps_guesses`; columns in order."""
        changes = []
        for column in sorted({*self.changed, *self.guesses}):
            token, probability = self.ids[column], None
            is_committed = token != self.config.mask_token_id
            if is_committed:
                probability = math.exp(self.evidence[column].log_probability)
            elif column in self.guesses:
                token, log_probability = self.guesses[column]
                probability = math.exp(log_probability)
            known = token if probability is not None else None
            changes.append(Change(column, known, probability, is_committed))
        return changes

    def leave(self) -> None:
        """The row is decoded no more."""
        self.is_present = False

    def spent(self) -> DecodingCost:
        """What it cost so far: `cost` with the tokens that stand in the gaps now."""
        mask = self.config.mask_token_id
        committed = sum(self.ids[gap] != mask for gap in self.gaps if gap < self.end)
        return replace(
            self.cost,
            tokens_committed=committed,
            answer_tokens=committed - (self.reason == "end"),
            row_forwards=self.cost.forwards,
        )

    def text_ids(self) -> list[int]:
        """The canvas with the pad token behind the end of its answer."""
        fill = self.config.pad_token_id
        if fill is None:
            fill = next(iter(token_ids(self.config.eos_token_id)), None)
        return self.ids if fill is None else self.ids[: self.end] + [fill] * (self.width - self.end)


def complete(settings: DiffusionGenerationConfig, model: CoDAConfig) -> DiffusionGenerationConfig:
    """Checked settings whose token ids are the model's where they were None.

    Raises:
        UserError: a bad setting, an id that the model has not, or another mask token than the model's.
    """
    config = copy.copy(settings)
    if config.mask_token_id not in (None, model.mask_token_id):
        raise UserError(
            f"mask_token_id must be {model.mask_token_id}, the token that the model was trained to replace, or none, "
            f"got {config.mask_token_id!r}"
        )
    for name in ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(model, name))
    config.validate()
    config.check_vocabulary(model.vocab_size)
    _settle_blocks(config, model)
    return config


def _settle_blocks(config: DiffusionGenerationConfig, model: CoDAConfig) -> None:
    """Let a model's blocks decide what the settings leave open, and refuse settings that contradict them."""
    if not model.has_blocks:
        if config.kv_cache == "exact":
            raise UserError(
                "kv_cache 'exact' needs attention 'block_causal', where finished blocks change no more: with attention "
                "'full' it must be one of none, prefix, dual"
            )
        config.kv_cache = "none" if config.kv_cache == "auto" else config.kv_cache
        return
    if config.kv_cache in ("prefix", "dual"):
        raise UserError(
            f"kv_cache {config.kv_cache!r} approximates attention 'full'; with attention 'block_causal' it must be "
            "exact or none"
        )
    if config.suffix_window is not None:
        raise UserError("suffix_window says nothing with attention 'block_causal', which sees no mask behind a block")
    if config.block_length is not None and model.block_size % config.block_length:
        raise UserError(
            f"block_length must divide the model's block_size={model.block_size}, or be None for all of it, got "
            f"{config.block_length}"
        )
    config.kv_cache = "exact" if config.kv_cache == "auto" else config.kv_cache
    config.block_length = config.block_length or model.block_size
