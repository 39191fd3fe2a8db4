"""Records how one answer is denoised: the canvas after every forward pass, as text pieces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.run_files import read_rows


def record_denoising(run_dir: Path, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Answer the first held-out problem and keep every canvas.

    Args:
        run_dir: holds model/ and benchmarks/.
        generation: decoding settings.

    Returns:
        prompt, and steps: one list per forward pass with the text of each new token, None where it is still masked.
    """
    prompt = read_rows(run_dir / "benchmarks" / "quickstart_problems.jsonl")[0]["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    model = CoDALanguageModel.from_pretrained(run_dir / "model").eval()
    inputs = torch.tensor([Codec(tokenizer).encode_chat([{"role": "user", "content": prompt}])])
    with torch.no_grad():
        output = model.diffusion_generate(
            inputs, output_history=True, return_dict_in_generate=True, seed=0, **generation
        )

    def pieces(canvas: torch.Tensor) -> list[str | None]:
        ids = canvas[0, inputs.shape[1] :].tolist()
        return [None if i == model.config.mask_token_id else tokenizer.decode([i]) for i in ids]

    return {"prompt": prompt, "steps": [pieces(canvas) for canvas in output.history]}
