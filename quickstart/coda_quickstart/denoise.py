"""Records how one answer is denoised: the canvas after every forward pass, as text pieces."""

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
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model", trust_remote_code=False)
    model = CoDALanguageModel.from_pretrained(run_dir / "model").eval()
    codec = Codec(tokenizer)
    inputs = torch.tensor([codec.encode_chat([{"role": "user", "content": prompt}])])
    with torch.no_grad():
        output = model.diffusion_generate(
            inputs, output_history=True, return_dict_in_generate=True, seed=0, **generation
        )

    def pieces(canvas: torch.Tensor) -> list[str | None]:
        ids, mask = canvas[0].tolist(), model.config.mask_token_id
        texts = token_texts(codec, ids, mask, hidden=set())
        return [None if i == mask else text for i, text in zip(ids, texts, strict=True)][inputs.shape[1] :]

    return {"prompt": prompt, "steps": [pieces(canvas) for canvas in output.history]}
