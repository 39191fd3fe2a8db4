"""What earlier versions wrote is read: a run of pre-training, its shards, and a model folder.

`before.tar.gz` was written by commit bc37bb3 on a CPU: six steps of a tiny model over a few short functions with a
checkpoint at the third (`run`, `run.yaml`, `shards`, `tokenizer`), the model folder that `save_hf_model.py` made of
that checkpoint, without its code (`model`), and what came out there (`expected.json`).
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from coda_pretrain.__main__ import main
from CoDALanguageModel import CoDALanguageModel

SETTINGS: dict[str, dict[str, Any]] = {
    "entropy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "alg": "maskgit_plus"},
    "cached": {"kv_cache": "dual", "block_length": 4},
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked folder."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(Path(__file__).with_name("before.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(before: Path) -> dict[str, Any]:
    """What that version printed."""
    return json.loads((before / "expected.json").read_text())


def test_a_run_of_before_goes_on_with_the_same_losses(before, expected, monkeypatch):
    monkeypatch.chdir(before)
    metrics = before / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))
    assert main(["--config", "run.yaml"]) == 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert list(losses) == ["1", "2", "3", "4", "5", "6"]
    assert losses == {step: pytest.approx(loss, rel=1e-4) for step, loss in expected["loss"].items()}


def test_a_model_folder_of_before_gives_the_same_tokens(before, expected):
    model = CoDALanguageModel.from_pretrained(before / "model").eval()
    ids = torch.tensor([list(range(40, 52)), list(range(60, 72))])
    for name, settings in SETTINGS.items():
        answers = model.diffusion_generate(ids, max_new_tokens=12, steps=12, seed=5, **settings)
        assert answers[:, 12:].tolist() == expected["tokens"][name], name
