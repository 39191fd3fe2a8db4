"""Autoregressive baselines on the same tasks: `--model hf`, as an lm-eval model registered as `coda_hf`.

Two things go wrong when a task's text is simply handed to such a model, and are done here:

* A prompt that ends in white space ends in the middle of what many tokenizers make one token: after `:` and a line
  break, the break and the next line's indentation. The lone break says that the next line is not indented, and small
  models close the code fence at once. The last tokens are therefore given up and made again by the model, which may
  choose any tokens whose text begins with the same characters (token healing). Prompts themselves stay as they are:
  where a token does end at the break, as with the tokenizers of Qwen and so of CoDA, the same token is chosen again.
* A gap needs the model's own fill-in-the-middle tokens; the text before the gap alone is another question.

A gap that is one line ends with the answer's first one: a diffusion model is told how many tokens it has.
"""

import copy
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from coda_eval import session
from coda_eval.hosted import Begins, ChatPrompt, HostedLM, known, on_device, place, without_space
from coda_eval.journal import digest
from coda_eval.programs import Answer
from coda_eval.session import Asked, slot
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.fill_tokens import FILL_ENDS, FILL_TOKENS, FillTokens
from CoDALanguageModel.prompts import Codec

logger = logging.getLogger(__name__)


_MARK = "\u263a"  # Code Llama's own choice for this
_FIRST_LINE = re.compile(r"\s*\S[^\n]*\n?")  # and the blank ones before it


@dataclass(frozen=True)
class _Prompt:
    """One answer to make."""

    index: int  # place in the list of requests
    asked: Asked
    ids: list[int] | None  # None where lm-eval's own way is right
    tail: str  # text that the answer has to begin with and that is no part of it
    settings: dict[str, Any]
    ends: frozenset[int]
    given_up: int = 0  # tokens of the prompt that are made again
    is_line: bool = False  # the answer is one line


@register_model("coda_hf")
class AutoregressiveModel(HostedLM):
    """lm-eval's `hf` with healed prompts, and with gaps filled by the model's own fill-in-the-middle tokens.

    Raises:
        UserError: the model has no tokens for gaps, or a prompt does not fit in the context (the document is named).
    """

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to requests of any mix of tasks."""
        return session.agree(lambda: self._generate(requests, disable_tqdm))

    def _generate(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        repeats: dict[int, int] = {}
        prompts, surplus = [], set()
        for index, request in enumerate(requests):
            repeats[id(request)] = repeat = repeats.get(id(request), -1) + 1
            if repeat >= (request.repeats or 1):  # lm-eval evens out ranks by repeating the last request
                surplus.add(index)
            prompts.append(self._prompt(index, request, repeat))
        answers = [Answer()] * len(requests)
        progress = tqdm(total=len(prompts), disable=disable_tqdm or self.rank != 0, desc="Generating")
        for batch in self._batches(prompts):
            for prompt, answer in zip(batch, self._answered(batch), strict=True):
                answers[prompt.index] = answer
            progress.update(len(batch))
        progress.close()
        for index, answer in enumerate(answers):
            answer.surplus = index in surplus
        return answers

    def _answered(self, batch: list[_Prompt]) -> list[Answer]:
        """The answers of a batch: from the journal if it has all of them, else made together, with draws of their own.

        So a run that is gone on with makes the batches that it would have made, whose roundings and draws are the same.
        """
        asked = [prompt.asked for prompt in batch]
        lines = [session.find(one) for one in asked]
        if all(line is not None for line in lines):
            session.keep(list(zip(asked, lines, strict=True)))
            return [Answer.read(line) for line in lines]
        started = time.monotonic()
        drawn = digest([[self.base_seed, slot(one.request, one.repeat)] for one in asked])
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(drawn[:12], 16))
            answers = self._answer(batch) if batch[0].ids is not None else self._answer_plainly(batch)
        for answer in answers:
            answer.generation_s = round((time.monotonic() - started) / len(batch), 4)
            answer.seed = self.base_seed
        session.keep([(one, known(answer)) for one, answer in zip(asked, answers, strict=True)])
        return answers

    # Prompts

    def _prompt(self, index: int, request: Instance, repeat: int) -> _Prompt:
        """What the model is asked with."""
        text, given = request.args
        is_gap = isinstance(request.doc, dict) and "infill_prefix" in request.doc
        settings = dict(normalize_gen_kwargs(copy.deepcopy(given), self.max_gen_toks))
        held = {**self.model.generation_config.to_diff_dict(), **settings}
        is_line = is_gap and _is_line(request.doc)
        if is_line:
            held["infill_lines"] = 1
        asked = Asked(request=request, repeat=repeat, settings=held, seed=self.base_seed)
        if is_gap and self.backend != "causal":
            raise UserError(f"{place(request)}: only decoder models fill gaps, not {self.backend}")
        heals = text[-1:].isspace() and self.think_end_token is None and not self._ends_header(text)
        if self.backend != "causal":
            return _Prompt(index, asked, None, "", given, frozenset())
        if is_gap:
            ids, tail, given_up = self._gap_ids(request.doc), "", 0
        else:
            whole = self.tok_batch_encode([text])[0][0].tolist()
            ids, tail = self._healed(text) if heals else (whole, "")
            given_up = len(whole) - len(ids)
        if len(ids) + len(tail) + settings["max_gen_toks"] > self.max_length:
            raise UserError(
                f"{place(request)}: {len(ids)} tokens of prompt and max_gen_toks={settings['max_gen_toks']} "
                f"exceed the context of {self.max_length} tokens; set --gen_kwargs max_gen_toks=N to a smaller number"
            )
        if not (is_gap or heals):
            return _Prompt(index, asked, None, "", given, frozenset())
        ends = self._fill_ends if is_gap else frozenset(self._end_ids())
        return _Prompt(index, asked, ids, tail, settings, ends, given_up, is_line)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation with what `encode_prompt` needs; where the codec or the template refuses it, lm-eval's own."""
        if self.codec is not None and self.backend == "causal":
            try:
                prompt = super().apply_chat_template(chat_history, add_generation_prompt)
                self.encode_prompt(prompt)
                return prompt
            except UserError as error:
                logger.warning("a conversation is encoded as lm-eval does, control tokens in its texts too: %s", error)
        return HFLM.apply_chat_template(self, chat_history, add_generation_prompt)

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of prompts, (B, T) int64; those of a conversation come from the codec."""
        if self.add_bos_token is not None or not all(isinstance(string, ChatPrompt) for string in strings):
            return super().tok_batch_encode(list(strings), padding_side, left_truncate_len, **kwargs)
        ids, real = on_device(list(map(self.encode_prompt, strings)), self.tokenizer.pad_token_id, torch.device("cpu"))
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            logger.warning("prompts of %d tokens lose all but their last %d", ids.shape[1], left_truncate_len)
            ids, real = ids[:, -left_truncate_len:], real[:, -left_truncate_len:]
        return ids, real

    def _ends_header(self, text: str) -> bool:
        """Whether a prompt ends in the chat template's own opening of an answer, which models know as it is."""
        return bool(self._header) and text.endswith(self._header)

    @cached_property
    def _header(self) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return ""
        turn = [{"role": "user", "content": "x"}]
        opened = self.apply_chat_template(turn, add_generation_prompt=True)
        closed = self.tokenizer.apply_chat_template(turn, tokenize=False, **self.chat_template_args)
        return opened[len(closed) :] if opened.startswith(closed) else ""

    def _healed(self, text: str) -> tuple[list[int], str]:
        """Ids of a prompt without its last tokens, up to one that does not end in white space, and their text."""
        return without_space(self.tok_batch_encode([text])[0][0].tolist(), self.decode)

    @cached_property
    def _fill_tokens(self) -> FillTokens:
        """The fill-in-the-middle tokens that the tokenizer has and the model knows."""
        known = self.tokenizer.get_vocab()
        num_ids = self.model.get_input_embeddings().num_embeddings
        for tokens in FILL_TOKENS:
            if all(known.get(token, num_ids) < num_ids for token in tokens[:3]):
                logger.info("gaps are filled with %s, %s and %s", *tokens[:3])
                return tokens
        kinds = ", ".join(tokens.prefix for tokens in FILL_TOKENS)
        raise UserError(
            f"{self.tokenizer.name_or_path!r} has no fill-in-the-middle tokens (known: {kinds} and those that go with "
            "each): the text before a gap alone would be another task; leave the infilling tasks out"
        )

    @cached_property
    def _fill_ends(self) -> frozenset[int]:
        """Tokens that end the text of a gap: every control token."""
        special = {id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        known = self.tokenizer.get_vocab()
        named = {known[token] for token in (*self._fill_tokens[:3], *FILL_ENDS) if token in known}
        return frozenset(special | named | self._end_ids() | set(self.tokenizer.all_special_ids))

    def _gap_ids(self, document: dict[str, Any]) -> list[int]:
        """Control token, prefix, control token, suffix, control token; the pieces are text, whatever they look like."""
        tokens = self._fill_tokens
        start, end, middle = self.tokenizer.convert_tokens_to_ids(list(tokens[:3]))
        prefix = self.encode_piece(tokens.lead + document["infill_prefix"])
        suffix = self.encode_piece(document["infill_suffix"])
        return [*self.tok_encode(""), start, *prefix, end, *suffix, middle]

    # Generation

    def _batches(self, prompts: Sequence[_Prompt]) -> list[list[_Prompt]]:
        """Prompts of the same settings, longest first."""
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        groups: dict[str, list[_Prompt]] = {}
        for prompt in prompts:
            kind = prompt.ids is None
            groups.setdefault(repr((kind, prompt.settings, sorted(prompt.ends), prompt.is_line)), []).append(prompt)
        batches = []
        for group in groups.values():
            group.sort(key=self._order)
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        return batches

    def _order(self, prompt: _Prompt) -> tuple[int, str]:
        """Where a prompt stands among those of its kind; lm-eval's own prompts as lm-eval sorts them."""
        if prompt.ids is not None:
            return -len(prompt.ids), ""
        text = prompt.asked.request.args[0]
        return -len(self.tok_encode(text)), text

    def _answer_plainly(self, batch: list[_Prompt]) -> list[Answer]:
        """Generate one batch as lm-eval does."""
        size, self.batch_size_per_gpu = self.batch_size_per_gpu, len(batch)  # else `auto` is tried anew each time
        try:
            return list(map(Answer, super().generate_until([p.asked.request for p in batch], disable_tqdm=True)))
        finally:
            self.batch_size_per_gpu = size

    def _answer(self, batch: list[_Prompt]) -> list[Answer]:
        """Generate one batch, left-padded, and cut each answer at its end."""
        settings, ends = dict(batch[0].settings), batch[0].ends
        until, new_tokens = settings.pop("until", []), settings.pop("max_gen_toks")
        if not settings.get("temperature") and not settings.get("do_sample"):
            settings.pop("temperature", None)  # greedy: transformers warns of a temperature that is not used
            settings["do_sample"] = False
        pad = self.tokenizer.pad_token_id
        ids, real = on_device([prompt.ids for prompt in batch], pad, self.device)
        start, tails = ids.shape[1], [prompt.tail for prompt in batch]
        kind, amp = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=kind, dtype=amp, enabled=amp is not None):
            rows = self.model.generate(
                input_ids=ids,
                attention_mask=real,
                max_new_tokens=new_tokens + max(len(prompt.tail) for prompt in batch),
                logits_processor=LogitsProcessorList([Begins(self, start, tails)]),
                stopping_criteria=StoppingCriteriaList([_Stops(self, start, tails, until, batch[0].is_line)]),
                eos_token_id=sorted(ends),
                pad_token_id=pad,
                use_cache=True,
                **settings,
            )[:, start:].tolist()
        answers = []
        for prompt, row in zip(batch, rows, strict=True):
            row = row[: new_tokens + prompt.given_up]  # whatever room its company needs
            length = next((at for at, token in enumerate(row) if token in ends), len(row))
            text = self.decode(row[:length])
            text = text[len(prompt.tail) :]
            answer = Answer(postprocess_generated_text(text, until, None))
            if prompt.is_line and (line := _FIRST_LINE.match(answer)):
                answer = Answer(line[0])
            answer.new_tokens = length
            has_ended = length < len(row) or len(answer) < len(text) or (prompt.is_line and answer.endswith("\n"))
            answer.finish_reason = "stop" if has_ended else "length"
            answers.append(answer)
        return answers

    # Text of tokens

    @cached_property
    def codec(self) -> Codec | None:
        """The house's codec, or None for a tokenizer whose pieces of text do not join."""
        try:
            return Codec(self.tokenizer, self.chat_template_args)
        except UserError as error:
            logger.info("pieces of text are encoded after a mark: %s", error)
            return None

    @cached_property
    def _anchor(self) -> list[int]:
        """A mark that pieces are encoded and decoded after, since some tokenizers add or drop a space at the start."""
        return self._as_text(_MARK)

    def _as_text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_piece(self, text: str) -> list[int]:
        """Ids of text as it stands after other text; what looks like a control token is text.

        Raises:
            UserError: the tokenizer does not give the text back.
        """
        if self.codec is not None:
            return self.codec.encode_text(text, joins=True)
        marked = self._as_text(_MARK + text)
        ids = marked[len(self._anchor) :]
        if marked[: len(self._anchor)] != self._anchor or self.decode(ids) != text:
            raise UserError(
                f"{self.tokenizer.name_or_path!r}: the tokenizer does not give a piece of text back as it was"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of tokens as they stand after others, without control tokens."""
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(self._anchor + ids, **settings)[
            len(self.tokenizer.decode(self._anchor, **settings)) :
        ]


def _is_line(document: dict[str, Any]) -> bool:
    """Whether a gap is one line, its line break included, and as long as the true text."""
    true_length = not document.get("infill_tokens") and "infill_lengths" not in document
    middle = document["infill_middle"]
    return true_length and middle.endswith("\n") and middle.count("\n") == 1


class _Stops(StoppingCriteria):
    """A row is done when its answer, which begins after the tail, holds a stop string or, for a line, is one."""

    def __init__(
        self, model: AutoregressiveModel, start: int, tails: Sequence[str], until: Sequence[str], is_line: bool
    ) -> None:
        self.model, self.start, self.tails, self.is_line = model, start, tails, is_line
        self.until = [stop for stop in until if stop]
        self.window = 8 + max(map(len, self.until), default=0)  # tokens; each but parts of letters has a character
        self.done = torch.zeros(len(tails), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T) ids -> (B,) bool."""
        for row in range(len(self.tails)) if self.until or self.is_line else ():
            new, tail = input_ids[row, self.start :].tolist(), len(self.tails[row])
            if self.is_line:
                self.done[row] |= "\n" in self.model.decode(new).lstrip()
            elif len(new) <= self.window + tail:  # the tail, of at most as many tokens as characters, may be in reach
                text = self.model.decode(new)[tail:]
            else:
                text = self.model.decode(new[-self.window :])
            self.done[row] |= any(stop in text for stop in self.until)
        return self.done.to(input_ids.device)
