"""Evaluation with its batch kept full against fixed batches: `python benchmarks/evaluation.py [--problems N]`.

Both contenders run interleaved in one process on the same weights, the quickstart's held-out problems as prompts. The
model has the quickstart's shape and random weights; a bias on the end token and a stop string make answers of ragged
lengths. Prints medians, their ratio, and whether the answers are the same.
"""

import argparse
import logging
import statistics
import tempfile
from itertools import chain
from pathlib import Path

from generation import measure, random_model
from lm_eval.api.instance import Instance

from coda_eval.harness import CoDAEvalModel
from coda_eval.hosted import on_device
from coda_eval.programs import Answer
from coda_quickstart.problems import held_out_programs
from coda_quickstart.tokenizer import train_tokenizer
from CoDALanguageModel.row import complete


class FixedBatches(CoDAEvalModel):
    """Batches that are given to the model and taken back whole, and read then: nobody joins, and no text ends a row."""

    def _answered(self, jobs):
        size = int(self.batch_size)
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            inputs, attends = on_device([job.ids for job in batch], self.tokenizer.pad_token_id, self.device)
            seeds, settings = [job.seed for job in batch], batch[0].settings
            rows = self.model.diffusion_generate(inputs, attention_mask=attends, seed=seeds, **settings)
            config = complete(self.model.generation_config.merged(settings), self.model.config)
            for job, row in zip(batch, rows.tolist(), strict=True):
                reading = self._reader(job, config).read(row[inputs.shape[1] :])
                answer = Answer(reading.text)
                answer.new_tokens = reading.num_tokens
                yield job, answer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--end_bias", type=float, default=5.0, help="added to the logit of the end token")
    parser.add_argument("--until", nargs="*", default=["e"], help="stop strings of the task")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    # A draw has at most one program of each held-out composition, of which there are 157.
    draws = (held_out_programs(100, seed) for seed in range(-(-options.problems // 100)))
    programs = list(chain.from_iterable(draws))[: options.problems]
    with tempfile.TemporaryDirectory() as folder:
        texts = [program.prompt + program.body for program in programs]
        tokenizer = train_tokenizer(texts, 4096, Path(folder), max_length=512)
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id")}
    model = random_model(
        vocab_size=4096,
        num_token_ids=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        bos_token_id=None,
        **ids,
    )
    settings = {"max_new_tokens": 128, "steps": 128, "block_length": 8, "temperature": 1.0, "seed": 0}
    settings |= {"logit_bias": {ids["eos_token_id"]: options.end_bias}, "batch_size": options.batch_size}
    contenders = {
        "fixed batches": FixedBatches(model, tokenizer=tokenizer, **settings),
        "kept full": CoDAEvalModel(model, tokenizer=tokenizer, **settings),
    }
    requests = [
        Instance(
            "generate_until", {"task_id": str(n)}, (program.prompt, {"until": options.until}), 0, ("problems", n, 1)
        )
        for n, program in enumerate(programs)
    ]
    rows = measure(
        {name: lambda one=one: one.generate_until(requests, True) for name, one in contenders.items()},
        options.repeats,
        warm_up=False,
    )
    fixed, full = (row["result"] for row in rows.values())
    lengths = [answer.new_tokens for answer in full]
    print(f"new tokens: mean {statistics.mean(lengths):.1f}, least {min(lengths)}, most {max(lengths)}")
    print(f"equal answers: {sum(a == b for a, b in zip(fixed, full, strict=True))} of {len(full)}")
    for name, row in rows.items():
        print(f"{name}: {row['median_s']:.2f} s, {row['speedup']:.2f}x")


if __name__ == "__main__":
    main()
