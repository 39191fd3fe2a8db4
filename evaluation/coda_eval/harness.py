"""CoDA as an lm-eval model, registered as `coda` and `diffllm`.

Loading, tokenizer, chat template and the accelerate plumbing are lm-eval's `HFLM` and `hosted.py`; what differs
for a masked-diffusion model is here: generation, infilling, and the likelihood (`likelihood.py`).
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from coda_eval import session
from coda_eval.hosted import Begins, ChatPrompt, HostedLM, known, place, without_space
from coda_eval.journal import Nats
from coda_eval.likelihood import LikelihoodBound, bound_log_likelihoods
from coda_eval.programs import Answer
from coda_eval.run import LENGTHS
from coda_eval.session import Asked
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.answers import TEXT, AnswerReader, end_ids
from CoDALanguageModel.cost import DecodingCost
from CoDALanguageModel.decoder import Decoding, Progress
from CoDALanguageModel.decoding_settings import SETTINGS, offered
from CoDALanguageModel.errors import UserError, did_you_mean
from CoDALanguageModel.infilling import lay_out
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.row import Request, Row, Sampling, complete
from CoDALanguageModel.run_files import refuse_no_model

logger = logging.getLogger(__name__)

LOADER_SETTINGS = frozenset({"attn_implementation", "device_map", "load_in_4bit", "load_in_8bit"})
"""Keyword arguments of `from_pretrained` that model_args may hold."""

_NOT_OF_ANSWERS = ("seed", "num_return_sequences", "output_history", "output_scores", "return_dict_in_generate")
"""Settings that no answer depends on here; each has its own seed."""


def generation_settings() -> set[str]:
    """Decoding settings that model_args, --gen_kwargs and task files may hold."""
    return {setting.name for setting in offered("evaluation")}


def refuse_unknown(given: Iterable[str], known: Iterable[str], place: str) -> None:
    """Raise UserError for the first name that is not known, with the nearest one that is, or why it is withheld."""
    for name in given:
        if name not in known:
            if name in SETTINGS:
                raise UserError(f"{name} cannot be set in {place}: {SETTINGS[name].withheld['evaluation']}")
            hint = did_you_mean(name, sorted(known))
            raise UserError(f"unknown setting {name!r} in {place}{hint} (known: {', '.join(sorted(known))})")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One answer to make."""

    index: int  # place in the list of requests
    repeat: int  # which of the answers to one document
    ids: list[int]
    gap: slice | None  # where the answer stands in the ids, if it does
    settings: dict[str, Any]
    until: list[str]
    asked: Asked
    rivals: tuple[int, ...] = ()  # all lengths that are tried
    tail: str = ""  # text that the tokens begin with and that is no part of the answer

    @property
    def seed(self) -> int:
        """Base of the answer's draws."""
        return self.asked.seed


@dataclasses.dataclass
class _Running:
    """An answer that is being made."""

    job: _Job
    row: Row
    reader: AnswerReader
    seconds: float = 0.0  # of each step its part among the rows

    def __post_init__(self) -> None:
        gap = self.job.gap
        self.column, self.stop = (len(self.job.ids), self.row.width) if gap is None else (gap.start, gap.stop)

    def read(self, progress: Progress) -> Answer | None:
        """Read what a step made final; the answer, if nothing more is to be computed for it."""
        settled = min(progress.settled, self.stop)
        fresh = self.row.ids[self.column : settled]
        self.column = max(self.column, settled)
        reading = self.reader.feed(fresh, is_full=self.column == self.stop)
        if progress.finished is None and (reading.end is None or not self.row.config.eos_early_stop):
            return None
        answer = Answer(reading.text)
        answer.new_tokens, answer.generation_s = reading.num_tokens, round(self.seconds, 4)
        spent = dataclasses.replace(self.row.spent(), answer_tokens=reading.num_tokens)
        answer.forwards, answer.cost = spent.forwards, spent.as_dict()
        answer.seed = self.job.seed
        answer.finish_reason = reading.finish_reason if self.job.gap is None else None
        if self.job.rivals:  # the rule of `CoDALanguageModel.infilling`: the mean over all that was filled in
            answer.nats = float(self.row.log_probability[self.job.gap].mean())
        return answer


class _Rivals:
    """Keeps the answers of the lengths that are tried for a gap until they are all there."""

    def __init__(self) -> None:
        self.answers: dict[int, dict[int, Answer]] = defaultdict(dict)

    def best(self, job: _Job, answer: Answer) -> Answer | None:
        """The answer with the highest mean log-probability per token, the first of equals, once it is known.

        It has cost what all of them did.
        """
        if not job.rivals:
            return answer
        found = self.answers[job.index]
        found[job.gap.stop - job.gap.start] = answer
        if len(found) < len(job.rivals):
            return None
        del self.answers[job.index]
        best = max((found[length] for length in job.rivals), key=lambda answer: answer.nats)
        total = DecodingCost()
        for other in found.values():
            total.add(DecodingCost(**{f.name: other.cost[f.name] for f in dataclasses.fields(DecodingCost)}))
        total.forwards = best.forwards = total.row_forwards
        total.answer_tokens = best.new_tokens
        best.cost, best.generation_s = total.as_dict(), round(sum(a.generation_s for a in found.values()), 4)
        return best


@register_model("coda", "diffllm")
class CoDAEvalModel(HostedLM):
    """A CoDA folder behind lm-eval's interface.

    Args:
        pretrained: a CoDA folder or Hub name, or a loaded model.
        mc_num: masked inputs per likelihood; a continuation, or block of it, with at most that many mask patterns is
            exact.
        seed: base of all draws; by default the torch seed of `--seed`. Each answer's own seed is made from this
            one, the task, the document and the repeat, and from nothing else.
        **kwargs: any setting of `DiffusionGenerationConfig` that is not withheld here, which then wins over
            `--gen_kwargs`, which wins over the task file, which wins over the checkpoint's
            `generation_config.json`; and `HFLM`'s arguments.

    Raises:
        UserError: an unknown setting, with the nearest known one, a value that cannot hold, or a tokenizer that does
            not give pieces of text back as they were.
    """

    AUTO_MODEL_CLASS = CoDALanguageModel

    likelihoods_at_once = 64

    def __init__(self, pretrained: Any, *, mc_num: int = 128, seed: int | None = None, **kwargs: Any) -> None:
        loader = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
        settings = generation_settings() - {"seed"}  # the parameter
        refuse_unknown(kwargs, loader | settings | LOADER_SETTINGS | {"mc_num", "seed"}, "model_args")
        if isinstance(mc_num, bool) or not isinstance(mc_num, int) or mc_num < 1:
            raise UserError(f"mc_num must be a positive integer, got {mc_num!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise UserError(f"seed must be an integer >= 0, got {seed!r}")
        if str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise UserError("batch_size must be a number for this model, got 'auto'; set --batch_size N")
        if isinstance(pretrained, str):
            refuse_no_model(pretrained)
        given = {name: kwargs.pop(name) for name in sorted(settings & kwargs.keys())}
        self.fixed_settings = {name: SETTINGS[name].read(value) for name, value in given.items()}
        self.mc_num, self.seed = mc_num, seed
        super().__init__(pretrained=pretrained, **kwargs)
        if not isinstance(self.model, torch.nn.Module) or not hasattr(self.model, "diffusion_generate"):
            raise UserError(f"{pretrained!r} is not a CoDA model; run autoregressive models with --model hf")
        # Refuses bad values before any work is done.
        complete(self.model.generation_config.merged(self.fixed_settings), self.model.config)
        # Refuses tokenizers whose pieces do not join to the text.
        self.codec = Codec(self.tokenizer, self.chat_template_args)

    # Prompts

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of text in likelihoods, behind the tokens with which the tokenizer itself begins."""
        start = super().tok_encode("", add_special_tokens)
        ids = [*start, *self.codec.encode_text(string)]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what is scored behind it: in a chat, as it is trained and asked."""
        if isinstance(context, ChatPrompt):
            return self.encode_prompt(context), self.codec.encode_text(continuation, joins=True)
        return super()._encode_pair(context, continuation)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests of any mix of tasks; each answer is what the request would get alone.

        Raises:
            UserError: an unknown setting, or a prompt that does not fit in the context (the document is named).
        """
        return session.agree(lambda: self._generate(requests, disable_tqdm))

    def _generate(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        answers: list[str | None] = [None] * len(requests)
        groups: dict[str, list[_Job]] = defaultdict(list)
        repeats: Counter[int] = Counter()
        originals: dict[tuple[int, int], int] = {}
        copies: list[tuple[int, int]] = []
        found: list[tuple[Asked, dict[str, Any]]] = []
        for index, request in enumerate(requests):
            repeat, wanted = repeats[id(request)], request.repeats or 1
            repeats[id(request)] += 1
            if repeat >= wanted:  # lm-eval evens out ranks by repeating the last request: nothing to compute
                copies.append((index, originals[id(request), repeat % wanted]))
                continue
            originals[id(request), repeat] = index
            job = self._job(index, request, repeat)
            line = session.find(job.asked)
            if line is not None:
                answers[index] = Answer.read(line)
                found.append((job.asked, line))
                continue
            if job.gap and job.gap.start == job.gap.stop:  # an empty gap: nothing to ask
                answers[index] = Answer()
                answers[index].new_tokens = answers[index].forwards = 0
                answers[index].seed = job.seed
                session.keep([(job.asked, known(answers[index]))])
                continue
            for rival in self._rivals(job, request):
                groups[json.dumps([rival.gap is not None, rival.settings], sort_keys=True)].append(rival)
        session.keep(found)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Denoising")
        progress.update(sum(answer is not None for answer in answers))
        for group in groups.values():  # neighbours share forward passes and are of like length
            group.sort(key=lambda job: (-len(job.ids), job.index))
        rivals = _Rivals()  # of gaps of unknown length
        for job, made in self._answered(list(chain.from_iterable(groups.values()))):
            answer = rivals.best(job, made)
            if answer is None:
                continue
            answers[job.index] = answer
            session.keep([(job.asked, known(answer))])
            progress.update()
        progress.close()
        for index, original in copies:
            answers[index] = Answer(answers[original])
            answers[index].surplus = True
        return answers

    def _job(self, index: int, request: Instance, repeat: int) -> _Job:
        prompt, given = request.args[0], dict(request.args[1])
        document = request.doc if isinstance(request.doc, dict) else {}
        name, tail = place(request), ""
        settings, until = self._settings(given, f"the generation settings of {request.task_name}")
        try:
            if "infill_prefix" in document:
                ids, gap = self._gap(document)
                settings["max_new_tokens"], until = 0, []
                if isinstance(prompt, ChatPrompt) and index == 0:
                    logger.warning("gaps are filled in place: no chat template is used for %s", request.task_name)
            else:
                ids, gap = self.encode_prompt(prompt), None
                ids, tail = self._healed(prompt, ids, settings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        total = len(ids) + settings["max_new_tokens"]
        if total > self.max_length:
            raise UserError(
                f"{name}: {len(ids)} tokens of prompt and max_new_tokens={settings['max_new_tokens']} exceed the "
                f"context of {self.max_length} tokens; prompts are never cut, so lower max_new_tokens or leave it out"
            )
        if not ids:
            raise UserError(f"{name}: the prompt is empty")
        content = json.dumps([self.base_seed, request.task_name, self._identity(request), repeat])
        seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:7])
        try:  # before any answer is made
            config = complete(self.model.generation_config.merged(settings), self.model.config)
            if gap is None or gap.start < gap.stop:
                self._decoding().admit(self._request(ids, settings, seed, tail))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        held = {name: getattr(config, name) for name in SETTINGS if name not in _NOT_OF_ANSWERS} | {"until": until}
        held |= {"tail": tail} if tail else {}
        asked = Asked(request=request, repeat=repeat, settings=held, seed=seed)
        return _Job(index, repeat, ids, gap, settings, until, asked, tail=tail)

    def _healed(self, prompt: str, ids: list[int], settings: dict[str, Any]) -> tuple[list[int], str]:
        """Ids of a prompt, and the text of those that it gave up and that the tokens of the answer now begin with.

        As in `autoregressive`, for the same reason: blocks of one token are such a model. Others are trained with
        answers that begin wherever prompts end.

        Args:
            prompt: its text.
            ids: all of its ids.
            settings: of the request, which get room for it.
        """
        is_opened = isinstance(prompt, ChatPrompt) and not prompt.continues
        text = prompt.messages[-1]["content"] if isinstance(prompt, ChatPrompt) else str(prompt)
        constrained = settings.get("regex") is not None or settings.get("json_schema") is not None
        if self.model.config.block_size != 1 or is_opened or constrained or not text[-1:].isspace():
            return ids, ""
        kept, tail = without_space(ids, self.decode)
        if tail:
            held = self.model.generation_config.merged(settings)
            settings |= {name: getattr(held, name) + len(ids) - len(kept) for name in ("max_new_tokens", "steps")}
        return kept, tail

    def _rivals(self, job: _Job, request: Instance) -> list[_Job]:
        """The canvases of a job: its own, or one for each length that is tried for its gap."""
        lengths = request.doc.get("infill_lengths") if job.gap else None
        if not lengths:
            return [job]
        # Every length is filled to its end, so that the means are over all tokens.
        settings = {**job.settings, "output_scores": True, "eos_early_stop": False}
        start, before, behind = job.gap.start, job.ids[: job.gap.start], job.ids[job.gap.stop :]
        masks = {length: [self.model.config.mask_token_id] * length for length in lengths}
        return [
            dataclasses.replace(
                job,
                ids=[*before, *masks[length], *behind],
                gap=slice(start, start + length),
                settings=settings,
                rivals=tuple(lengths),
            )
            for length in lengths
        ]

    def _decoding(self) -> Decoding:
        """Where rows are decoded."""
        return Decoding(self.model, decode=self.codec.decode, lexicon=self.codec.lexicon)

    def _request(self, ids: list[int], settings: dict[str, Any], seed: int, tail: str = "") -> Request:
        """What is to be decoded, as the model room takes it."""
        begins = [Begins(self, len(ids), [tail], self.model.config.mask_token_id)] if tail else []
        return Request(ids=ids, settings=self.model.generation_config.merged(settings), seed=seed, processors=begins)

    def decode(self, ids: list[int]) -> str:
        """Text of tokens as they stand after others, without control tokens."""
        return self.codec.decode(ids, TEXT)

    @staticmethod
    def _identity(request: Instance) -> str:
        """What names a document whatever subset of its task runs: its task_id, or else its content."""
        if isinstance(request.doc, dict) and "task_id" in request.doc:
            return str(request.doc["task_id"])
        return hashlib.sha256(json.dumps(request.doc, sort_keys=True, default=str).encode()).hexdigest()

    def _settings(self, given: dict[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
        """Resolve one request's settings: model_args over the request's own; stop strings apart."""
        until = given.pop("until", None) or []
        lengths = [given.pop(name) for name in LENGTHS if name in given]
        if "seed" in given:
            raise UserError(f"seed cannot be set in {place}: --seed or the seed of model_args is for all tasks")
        refuse_unknown(given, generation_settings() | {"until", *LENGTHS}, place)
        given = {name: SETTINGS[name].read(value) for name, value in given.items()}
        if lengths:
            given["max_new_tokens"] = SETTINGS["max_new_tokens"].checked(lengths[0])
        if given.get("do_sample") is False and given.get("temperature"):
            if "temperature" not in self.fixed_settings:
                logger.warning("do_sample is false: temperature %s is not used", given["temperature"])
        if "temperature" in self.fixed_settings:
            given.pop("do_sample", None)  # a temperature in model_args wins over the task's "greedy"
        settings = {**given, **self.fixed_settings}
        settings.setdefault("max_new_tokens", self.model.generation_config.max_new_tokens)
        return settings, [until] if isinstance(until, str) else list(until)

    def draws(self, settings: Mapping[str, Any]) -> bool:
        """Whether answers with a task's settings are drawn."""
        held, _ = self._settings(dict(settings), "the generation settings")
        request = self._request([], held, 0)
        return Sampling.of(complete(request.settings, self.model.config), request).temperature > 0

    def _gap(self, document: dict[str, Any]) -> tuple[list[int], slice]:
        """Ids of a text with one gap, and where the gap is."""
        names = ("infill_prefix", "infill_middle", "infill_suffix")
        prefix, middle, suffix = self.codec.encode_pieces([document[name] for name in names])
        config, start = self.model.config, self.custom_prefix_token_id
        text = lay_out(
            [prefix, suffix],
            [max(document.get("infill_lengths") or [document["infill_tokens"] or len(middle)])],
            config.mask_token_id,
            config.document_start_id if start is None else start,
        )
        return text.ids, text.gaps[0]

    def _answered(self, jobs: list[_Job]) -> Iterator[tuple[_Job, Answer]]:
        """Decode at most `batch_size` jobs at a time; where one ends the next joins at once."""
        decoding = self._decoding()
        waiting, running = deque(jobs), {}
        while waiting or running:
            while waiting and len(running) < int(self.batch_size):
                job = waiting.popleft()
                row = decoding.admit(self._request(job.ids, job.settings, job.seed, job.tail))
                running[row] = _Running(job, row, self._reader(job, row.config))
            started = time.monotonic()
            progress = decoding.step()
            share = (time.monotonic() - started) / len(progress)
            for record in progress:
                if record.error is not None:
                    raise record.error
                one = running[record.row]
                one.seconds += share
                answer = one.read(record)
                if answer is not None:
                    decoding.drop(record.row)
                    del running[record.row]
                    yield one.job, answer

    def _reader(self, job: _Job, config: Any) -> AnswerReader:
        """What reads the answer of a job that is decoded with the settings `config`."""
        return AnswerReader(
            decode=self.codec.decode,
            mask_token_id=config.mask_token_id,
            eos_token_ids=end_ids(self.model.config, config),
            prompt_ids=job.ids if job.gap is None else job.ids[: job.gap.start],
            stop=[string for string in (*job.until, *(config.stop_strings or ())) if string],
            begins=job.tail,
        )

    # Likelihood

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Lower bounds on log p(continuation | context), in nats; never to be compared with autoregressive values.

        Blocks of one token are the exception: they have log p itself.

        The second value, whether greedy decoding would give the continuation, is always False: it would cost as many
        forward passes as the continuation has tokens.
        """
        size = override_bs or int(self.batch_size)
        pairs = [(context, continuation) for _, context, continuation in requests]
        bounds: list[LikelihoodBound] = bound_log_likelihoods(
            self.model, pairs, mc_num=self.mc_num, seed=self.base_seed, batch_size=size, max_length=self.max_length
        )
        return [(Nats.of(bound.nats, bound.stderr), False) for bound in bounds]

    def likelihood_settings(self) -> dict[str, Any]:
        """What a likelihood depends on besides the model and the texts."""
        return {"mc_num": self.mc_num}

    @property
    def base_seed(self) -> int:
        """The seed that all draws come from."""
        return super().base_seed if self.seed is None else self.seed

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores with the results: HFLM's facts and every setting fixed by model_args."""
        return {**super().get_model_info(), "generation_settings": self.fixed_settings, "mc_num": self.mc_num}
