"""A tiny CoDA folder, a small instruction set, and the environment of a training subprocess."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from CoDALanguageModel import DiffusionGenerationConfig

REPO = Path(__file__).resolve().parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        mask_token="<|mask|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, write_model) -> Path:
    tokenizer = byte_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    settings = DiffusionGenerationConfig(max_new_tokens=48, steps=48, alg="entropy", temperature=0.1)
    sizes = {"vocab_size": 264, "num_token_ids": 260, "tie_word_embeddings": True}
    return write_model(tmp_path_factory.mktemp("model"), tokenizer, settings=settings, eos_token_id=ends, **sizes)


@pytest.fixture(scope="session")
def block_dirs(model_dir, tmp_path_factory) -> dict[int, Path]:
    """The same weights as models that attend by blocks, of one token and of four, by the size of the blocks."""
    folders = {}
    for size in (1, 4):
        folders[size] = tmp_path_factory.mktemp(f"blocks_of_{size}")
        shutil.copytree(model_dir, folders[size], dirs_exist_ok=True)
        config = json.loads((model_dir / "config.json").read_text())
        config |= {"attention": "block_causal", "block_size": size, "block_origin": "answer" if size > 1 else "text"}
        (folders[size] / "config.json").write_text(json.dumps(config))
    return folders


def toy_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Requests for a one-line function; the answer follows from the request, so a small model can learn it."""
    return [
        {"instruction": f"add {n % 7} to {name}", "output": f"def f({name}):\n    return {name} + {n % 7}"}
        for n in range(first, first + count)
        for name in ["abxyz"[n % 5]]
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", toy_rows(64)), ("held_out", toy_rows(12, 64))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    odd = toy_rows(21)  # no multiple of a batch, answers of unlike lengths
    for n, row in enumerate(odd):
        row["output"] += "".join(f"\n# {n}" for _ in range(n % 4))
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    columns = {"prompt": "instruction", "response": "output"}
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("train", "held_out", "odd")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Offline, one thread, caches of its own, rooms importable without installation."""
    roots = [REPO, REPO / "post-train"]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "USE_TORCH_XLA": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
