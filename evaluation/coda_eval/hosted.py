"""What our models have in common as guests of lm-eval: ranks, answers that are kept, no cache that lies."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessor

from coda_eval import session
from coda_eval.journal import known_likelihood, read_likelihood
from coda_eval.programs import Answer
from coda_eval.session import CACHE_LIES, Asked, label
from CoDALanguageModel.answers import end_ids
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.run_files import refuse_no_model
from CoDALanguageModel.weight_files import check_tokenizer, refuse_not_finite


class ChatPrompt(str):
    """What lm-eval holds as the text of a prompt: a conversation as the template writes it, and the conversation.

    lm-eval hands strings from `apply_chat_template` to the model, in which control tokens and what looks like them
    can no longer be told apart. The messages travel along, also through copies, files and other processes.
    """

    messages: list[dict[str, str]]
    continues: bool
    """Whether the last message is the beginning of the answer."""

    def __new__(cls, text: str, messages: Sequence[dict[str, str]], continues: bool) -> "ChatPrompt":
        """A string that knows the messages."""
        prompt = super().__new__(cls, text)
        prompt.messages, prompt.continues = list(messages), continues
        return prompt

    def __getnewargs__(self) -> tuple[str, list[dict[str, str]], bool]:
        return str(self), self.messages, self.continues


class HostedLM(HFLM):
    """lm-eval's Hugging Face model, which knows its rank also without GPUs and has no cache but the journal.

    Raises:
        UserError: `pretrained` is not a path or a model, its weights are not finite, or the processes do not see each
            other.
    """

    codec: Codec

    fills_gaps = True
    """Whether it is asked for the middle of a text as such, and not to go on behind its beginning."""

    likelihoods_at_once: int | None = None
    """Likelihoods that are computed between two entries of the journal; None: all."""

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        if isinstance(pretrained, (int, float, tuple, list, dict, set, bool)) or pretrained is None:
            raise UserError(
                f"pretrained must be a folder or a Hub name, got {pretrained!r}: key=value arguments are read as "
                'Python values; give such a name as JSON: --model_args \'{"pretrained": "NAME"}\''
            )
        if isinstance(pretrained, str):
            refuse_no_model(pretrained, bare=True)
            check_tokenizer(Path(pretrained))
        super().__init__(pretrained=pretrained, **kwargs)
        if kwargs.get("tp_plan") is not None:
            return  # the ranks hold one model together and do the same work
        if isinstance(pretrained, str):
            refuse_not_finite(self.model.named_parameters(), f"pretrained={pretrained!r}")
        accelerator = getattr(self, "accelerator", None)
        if (
            accelerator is not None and accelerator.num_processes > 1
        ):  # HFLM sets these for the GPUs of one machine only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            self._device = accelerator.device
            if self.model.device != self._device:
                self.model.to(self._device)
        if self.world_size != int(os.environ.get("WORLD_SIZE", "1")) and isinstance(pretrained, str):
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but accelerate sees {self.world_size} process(es), so that "
                "every process would do all the work: set USE_TORCH_XLA=false, and without GPUs ACCELERATE_USE_CPU=true"
            )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as lm-eval shows and keeps it, with what `encode_prompt` needs.

        Raises:
            UserError: the template refuses the messages, a system message for example.
        """
        continues = not add_generation_prompt
        return ChatPrompt(self.codec.render(chat_history, continues), chat_history, continues)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt: control tokens stand only where the chat template puts them."""
        if isinstance(prompt, ChatPrompt):
            return self.codec.encode_chat(prompt.messages, continue_final_message=prompt.continues)
        return self.codec.encode_text(prompt)

    @staticmethod
    def draws(settings: Mapping[str, Any]) -> bool:
        """Whether answers with these settings are drawn: two to one problem may differ."""
        temperature = float(settings.get("temperature") or 0)
        return settings.get("do_sample", temperature > 0) is not False and temperature != 0

    # Likelihoods, through the journal

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods in nats, and whether greedy decoding would give the continuation."""
        return self._remembered(requests, lambda part: HFLM.loglikelihood(self, part, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in nats."""
        return self._remembered(requests, lambda all_: HFLM.loglikelihood_rolling(self, all_, disable_tqdm), whole=True)

    def _remembered(
        self, requests: list[Instance], compute: Callable[[list[Instance]], list[Any]], whole: bool = False
    ) -> list[Any]:
        """Likelihoods from the journal, or computed; together, since the ranks meet on the way, where they are `whole`.

        What is computed together is computed together again, so that no rounding differs after a restart.
        """
        results: list[Any] = []
        step = len(requests) if whole else self.likelihoods_at_once or len(requests)
        for start in range(0, len(requests), step or 1):
            part = requests[start : start + step]
            asked = [Asked(request=r, settings=self.likelihood_settings(), seed=self.base_seed) for r in part]
            lines = [session.find(one) for one in asked]
            are_found = all(line is not None for line in lines)
            if session.everywhere(are_found) if whole else are_found:
                session.keep(list(zip(asked, lines, strict=True)))
                results += [read_likelihood(line) for line in lines]
                continue
            fresh = compute(part)
            session.keep([(one, known_likelihood(value)) for one, value in zip(asked, fresh, strict=True)])
            results += fresh
        return results

    def likelihood_settings(self) -> dict[str, Any]:
        """What a likelihood depends on besides the model and the texts."""
        return {}

    @property
    def base_seed(self) -> int:
        """The seed that all draws come from."""
        return torch.initial_seed()

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse lm-eval's cache.

        Raises:
            UserError: always.
        """
        raise UserError(f"use_cache is refused: {CACHE_LIES}")

    # Prompts that give up the white space at their end

    def decode(self, ids: list[int]) -> str:
        """Text of tokens as they stand after others, without control tokens."""
        raise NotImplementedError

    @cached_property
    def pieces(self) -> list[str]:
        """Text of every token."""
        return [self.decode([token]) for token in range(len(self.tokenizer))]

    def may_begin(self, text: str) -> torch.Tensor:
        """(V,) bool: tokens whose text begins with `text`, or is the beginning of it."""
        if text not in self._begins:
            fits = [piece != "" and (piece.startswith(text) or text.startswith(piece)) for piece in self.pieces]
            self._begins[text] = torch.tensor(fits)
        return self._begins[text]

    @cached_property
    def _begins(self) -> dict[str, torch.Tensor]:
        return {}

    def _end_ids(self) -> set[int]:
        """Ids that end an answer: end tokens of model and settings, and the pad that stands behind them."""
        return set(end_ids(self.tokenizer, self.model.config, self.model.generation_config))


class Begins(LogitsProcessor):
    """Only tokens that go on saying a row's tail, until it is said.

    Args:
        model: knows the tokens' texts.
        start: column in which the rows' answers begin.
        tails: of each row, or the one of all.
        mask: id of tokens that are not written yet, if such stand in the rows; all behind the first one are.
    """

    def __init__(self, model: HostedLM, start: int, tails: Sequence[str], mask: int | None = None) -> None:
        self.model, self.start, self.tails, self.mask = model, start, tails, mask
        self.longest = max(map(len, tails))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and (B, V) scores -> (B, V) scores."""
        rows = [row[: row.index(self.mask)] if self.mask in row else row for row in input_ids[:, self.start :].tolist()]
        if min(map(len, rows), default=self.longest) >= self.longest:  # each token has said a character at least
            return scores
        scores = scores.clone()
        for place, row in enumerate(rows):
            left = self.tails[place if len(self.tails) > 1 else 0]
            for token in row:
                if not left:  # later tokens may have no text
                    break
                left = left[len(self.model.pieces[token]) :]
            if left:
                allowed = self.model.may_begin(left).to(scores.device)
                scores[place, : len(allowed)].masked_fill_(~allowed, -torch.inf)
                scores[place, len(allowed) :] = -torch.inf
        return scores


def without_space(ids: Sequence[int], decode: Callable[[list[int]], str]) -> tuple[list[int], str]:
    """Ids of a prompt without its last tokens, up to one that does not end in white space, and their text."""
    whole = decode(list(ids))
    kept, rest = list(ids), whole
    while len(kept) > 1 and rest[-1:].isspace():
        kept.pop()
        rest = decode(kept)
    if not whole.startswith(rest) or not rest:
        return list(ids), ""  # nothing but white space, or text that does not come apart there
    return kept, whole[len(rest) :]


def place(request: Instance) -> str:
    """The task and the document of a request, for messages."""
    return f"task {request.task_name}, document {label(request)}"


def known(answer: str) -> dict[str, Any]:
    """What the journal keeps of an answer."""
    return {"answer": str(answer), "finish_reason": getattr(answer, "finish_reason", None), **Answer.cost_of(answer)}


def on_device(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and attention mask of a batch, both (B, T) int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], dtype=torch.long, device=device)
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, real
