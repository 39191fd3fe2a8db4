"""The model alone: its weights, its twin in this project's terms, and both twins' greedy texts."""

import json
import os
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.configuration_coda import token_ids
from CoDALanguageModel.conversion import load_source
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.families import AUTOREGRESSIVE_TYPES, family_of
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.run_files import read_json
from CoDALanguageModel.weight_files import check_weights, weight_files
from save_hf_model import Agreement, convert, find_checkpoint, load_tokenizer, replacing

from .task import Task, say, timed

REQUESTS = (
    "Write a Python function that returns the sum of the squares of a list.",
    "What is the difference between a list and a tuple in Python?",
    "Write a Python function that says whether a string reads the same backwards.",
)
"""What the greedy texts answer."""

GREEDY_TOKENS = 64
ROWS, LENGTH = 2, 128
"""Shape of the text whose logits are compared."""


def source(task: Task) -> None:
    """A float32 folder of transformers' own class: GGUF is read by transformers and dequantised, a folder is linked to.

    A folder's own decoding settings stay behind: both roads decode greedily, and say so themselves.

    Raises:
        UserError: what was given is broken or not whole, has no tokenizer, or is no autoregressive model of a known
            family.
    """
    folder, gguf = find_checkpoint(str(task.model))
    refuse(folder, gguf)
    facts: dict[str, Any] = {"file": task.model.name}
    with replacing(task.work / "source", overwrite=True) as made, timed(facts):
        if gguf:
            model, _ = load_source(folder, gguf)
            facts["tensors"] = quantisation(folder / gguf["gguf_file"])
            model.save_pretrained(made)
            AutoTokenizer.from_pretrained(folder, **gguf).save_pretrained(made)
            facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            facts["type"] = model.config.model_type
        else:
            for file in folder.iterdir():
                if file.name != "generation_config.json":
                    (made / file.name).symlink_to(file.resolve())
            facts["type"] = AutoConfig.from_pretrained(folder).model_type
            own = folder / "generation_config.json"
            values = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
            ids = {name: value for name, value in values.items() if name.endswith("_token_id")}
            GenerationConfig(**ids).save_pretrained(made)
    size = sum(file.stat().st_size for file in ([task.model] if gguf else task.model.glob("*.safetensors")))
    say(what="weights", mb=round(size / 1e6, 1), **facts)


def refuse(folder: Path, gguf: dict[str, str]) -> None:
    """Refuse before any weight is read what the later stages would break on, one by one.

    Raises:
        UserError: see `source`.
    """
    check_weights(folder, gguf.get("gguf_file"))
    if gguf:
        return
    family = family_of(read_json(folder / "config.json"))
    if not family.is_autoregressive:
        raise UserError(f"the model must be autoregressive, one of {', '.join(AUTOREGRESSIVE_TYPES)}")
    if not weight_files(folder):
        raise UserError(f"{str(folder)!r} holds no weights: model.safetensors, or its shards and their index")
    load_tokenizer(folder, gguf)


def quantisation(file: Path) -> str:
    """How many tensors of a GGUF file are of which type."""
    from gguf import GGUFReader

    found = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    return ", ".join(f"{count} {name}" for name, count in found.most_common())


@torch.no_grad()
def conversion(task: Task) -> None:
    """`save_hf_model.py` in float32 and bfloat16; the logits of a text against those of transformers' own class."""
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: ROWS * LENGTH]).view(ROWS, LENGTH)
    exact = None
    for dtype in ("float32", "bfloat16"):
        facts: dict[str, Any] = {"what": "conversion", "dtype": dtype}
        folder = task.work / f"coda-{dtype}"
        with timed(facts):
            convert(str(task.source), str(folder), dtype=dtype, overwrite=True, attention="block_causal", block_size=1)
        own = AutoModelForCausalLM.from_pretrained(task.source, dtype=getattr(torch, dtype)).eval()
        expected = own(input_ids=ids).logits
        ours = CoDALanguageModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        found = ours(input_ids=ids).logits[..., : expected.shape[-1]]
        facts |= compared(found, expected) | {"nats_a_token": nats(expected, ids), "ours": nats(found, ids)}
        if exact is None:
            exact = found
        facts["best_as_in_float32"] = compared(found, exact)["same_best"]
        say(**facts, positions=ids.numel())
        del own, ours


def compared(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest difference of two logits, of the largest one; share of places with the same best token; largest KL."""
    rows = [Agreement.of(*pair) for pair in zip(found, expected, strict=True)]  # one by one: in float64 they are large
    return {
        "difference": max(row.difference for row in rows),
        "same_best": sum(row.same_best for row in rows) / len(rows),
        "kl": max(row.divergence for row in rows),
    }


def nats(logits: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of a token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).item()


@torch.no_grad()
def greedy(task: Task) -> None:
    """64 tokens of transformers' own greedy decoding against those of blocks of one token, cached and not."""
    codec = Codec.load(str(task.source))
    own = AutoModelForCausalLM.from_pretrained(task.source, dtype=torch.float32).eval()
    ours = CoDALanguageModel.from_pretrained(task.converted("float32"), dtype=torch.float32).eval()
    is_chat = AutoTokenizer.from_pretrained(task.source).chat_template is not None
    ends = token_ids(ours.config.eos_token_id)
    for text in REQUESTS:
        ids = codec.encode_chat([{"role": "user", "content": text}]) if is_chat else codec.encode_text(f"# {text}\n")
        prompt, reference = torch.tensor([ids]), {"by": "transformers"}
        given = {"max_new_tokens": GREEDY_TOKENS, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[-1]}
        with timed(reference):
            wanted = written(own.generate(prompt, attention_mask=torch.ones_like(prompt), **given), prompt, ends)
        say(**reference, tokens=len(wanted), equal=len(wanted), request=text)
        for cache in ("exact", "none"):
            facts: dict[str, Any] = {"by": f"blocks of one, kv_cache={cache}"}
            settings = {"max_new_tokens": GREEDY_TOKENS, "steps": GREEDY_TOKENS, "temperature": 0.0}
            with timed(facts):
                rows = ours.diffusion_generate(prompt, kv_cache=cache, **settings)
            got = written(rows, prompt, ends)
            place = len(os.path.commonprefix([got, wanted]))
            facts |= {"tokens": len(got), "equal": place, "request": text}
            if got != wanted:
                ahead = margin(own, ids + wanted[:place])
                facts["note"] = f"they part where the best two tokens are {ahead:.2g} nats apart"
            say(**facts)


def written(rows: Tensor, prompt: Tensor, ends: list[int]) -> list[int]:
    """New tokens of the one row, its end among them."""
    new = rows[0, prompt.shape[1] :].tolist()
    return new[: next((at + 1 for at, token in enumerate(new) if token in ends), len(new))]


@torch.no_grad()
def margin(model: torch.nn.Module, ids: list[int]) -> float:
    """How many nats the best next token is ahead of the second one."""
    first, second = model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].topk(2).values.tolist()
    return first - second
