"""Records how an answer or a gap is denoised: the canvas after every forward pass, as text pieces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.run_files import read_rows
from CoDALanguageModel.tools.recording import token_texts


def record_denoising(run_dir: Path, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Answer the first held-out problem and keep every canvas.

    Args:
        run_dir: holds model/ and benchmarks/.
        generation: decoding settings.

    Returns:
        prompt, and steps: one list per forward pass with the text of each new token, None where it is still masked.
    """
    prompt = read_rows(run_dir / "benchmarks" / "quickstart_problems.jsonl")[0]["prompt"]
    model, codec = _load(run_dir / "model")
    inputs = codec.encode_chat([{"role": "user", "content": prompt}])
    return {"prompt": prompt, "steps": _canvases(model, codec, inputs, len(inputs), None, **generation)}


def record_infilling(run_dir: Path, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the first gap in a held-out function by the mid-trained model, which knows no questions yet.

    Args:
        run_dir: holds midtrain_export/ and benchmarks/.
        generation: decoding settings; the gap says how many tokens and steps.

    Returns:
        prefix, middle (what stood there), suffix, answer, and steps as in `record_denoising`, of the gap alone.
    """
    row = read_rows(run_dir / "benchmarks" / "quickstart_infill.jsonl")[0]
    model, codec = _load(run_dir / "midtrain_export")
    before, gap, after = (
        codec.encode_text(row[name], joins=name != "prefix") for name in ("prefix", "middle", "suffix")
    )
    inputs = [*before, *[model.config.mask_token_id] * len(gap), *after]
    settings = {**generation, "max_new_tokens": 0, "steps": len(gap), "schedule": "even"}
    steps = _canvases(model, codec, inputs, len(before), len(before) + len(gap), **settings)
    answer = "".join(text or "" for text in steps[-1])
    return {**{name: row[name] for name in ("prefix", "middle", "suffix")}, "answer": answer, "steps": steps}


def _load(folder: Path) -> tuple[CoDALanguageModel, Codec]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return CoDALanguageModel.from_pretrained(folder).eval(), Codec(tokenizer)


def _canvases(
    model: CoDALanguageModel, codec: Codec, inputs: list[int], start: int, end: int | None, **generation: Any
) -> list[list[str | None]]:
    """The canvas from `start` to `end` after every forward pass: text of each token, None where it is still masked."""
    output = model.diffusion_generate(
        torch.tensor([inputs]), output_history=True, return_dict_in_generate=True, seed=0, **generation
    )
    mask = model.config.mask_token_id

    def pieces(ids: list[int]) -> list[str | None]:
        texts = token_texts(codec, ids, mask, hidden=set())
        return [None if i == mask else text for i, text in zip(ids, texts, strict=True)][start:end]

    return [pieces(canvas[0].tolist()) for canvas in output.history]
