"""The loop: what a step does, what a restart does, what is refused."""

from coda_pretrain.config import RunConfig
from coda_pretrain.metrics import read_rows
from coda_pretrain.plain_data import from_dict
from coda_pretrain.trainer import Trainer


def losses(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return [row["loss"] for row in read_rows(trainer.output_dir / "metrics.jsonl") if "loss" in row]


def test_first(run_config):
    print(losses(run_config))
