"""Evaluation with its batch kept full against fixed batches: `python benchmarks/evaluation.py [--problems N]`.

Both contenders run interleaved in one process on the same weights, the quickstart's held-out problems as prompts. The
model has the quickstart's shape and random weights; a bias on the end token makes answers of ragged lengths. Prints
medians, their ratio, and whether the answers are the same.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

from generation import measure, random_model
from lm_eval.api.instance import Instance

from coda_eval.harness import CoDAEvalModel
from coda_quickstart.problems import held_out_programs
from coda_quickstart.tokenizer import train_tokenizer


class FixedBatches(CoDAEvalModel):
    """Nobody joins before the whole batch has ended."""

    def _answered(self, jobs):
        size = int(self.batch_size)
        for start in range(0, len(jobs), size):
            yield from super()._answered(jobs[start : start + size])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--end_bias", type=float, default=1.0, help="added to the logit of the end token")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    programs = held_out_programs(options.problems, seed=0)
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
        Instance("generate_until", {"task_id": str(n)}, (program.prompt, {"until": []}), 0, ("problems", n, 1))
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
