"""Decoding of this checkout against another one: `python benchmarks/commits.py OTHER [--case NAME ...] [--rounds N]`.

Each checkout runs the cases of its own `benchmarks/generation.py` in a process of its own, with its own package. They
take turns, one run of one contender at a time, since a machine may be half as fast a minute later; and every round has
new processes, the one or the other started first, since the same code is faster or slower by 5 % as long as a process
lives (where its memory lies). What is compared is the two runs of a round. `published` is the same code in both and
shows what the machine does to a comparison. Results go to `RESULTS.md` and `commits.json`; a case that is not run keeps
the result that it has there.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Measured(Exception):
    """A case has timed its contenders."""


def say(what: Any) -> None:
    """Answer the process that asks."""
    print(json.dumps(what), file=sys.__stdout__, flush=True)


def on_demand(contenders: dict[str, Callable[[], Any]], *_: Any, **__: Any) -> None:
    """In place of `generation.measure`: run the contenders that the standard input names, until an empty line."""
    say(list(contenders))
    for line in sys.stdin:
        if not line.strip():
            raise Measured
        started, used = time.perf_counter(), time.process_time()
        contenders[line.strip()]()
        say({"s": time.perf_counter() - started, "cpu_s": time.process_time() - used})


def work(run_dir: Path) -> None:
    """Run the cases that the standard input names."""
    import generation

    generation.measure = on_demand
    say(sorted(generation.CASES))
    for line in sys.stdin:
        run = generation.CASES[line.strip()]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Measured):
            case = run(1, run_dir=run_dir) if line.strip() == "quickstart" else run(1)
            rows = case["rows"] if case else {}  # it does its own timing; without its model there is none
            say({name: {"s": row["median_s"]} for name, row in rows.items()})


class Checkout:
    """A process that runs cases of a checkout."""

    def __init__(self, folder: Path, run_dir: Path):
        rooms = [folder, folder / "benchmarks", *(folder / room for room in ("evaluation", "quickstart"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, rooms))}
        command = [sys.executable, "-P", __file__, "--worker", "--run_dir", str(run_dir), str(folder)]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.cases = self.read()

    def read(self) -> Any:
        """The next thing that it says."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args[-1]} ended with status {self.process.wait()}")
        return json.loads(line)

    def tell(self, what: str) -> None:
        """Name a case or one of its contenders; an empty line ends a case."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """No more cases."""
        self.process.stdin.close()
        self.process.wait()

    def ask(self, what: str) -> Any:
        """Name something, and wait for the answer."""
        self.tell(what)
        return self.read()


def turns(
    checkouts: dict[str, Checkout], case: str, wanted: list[str] | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of a case's contenders, all or the wanted ones: of each checkout, in the order in which they run."""
    answers = {name: checkout.ask(case) for name, checkout in checkouts.items()}
    shared = [who for who in answers["this"] if who in answers["other"] and (not wanted or who in wanted)]
    if isinstance(answers["this"], dict):
        return {who: {name: answer[who] for name, answer in answers.items()} for who in shared}
    runs = {}
    for who in shared:
        for _ in ("to warm up", "to measure"):
            runs[who] = {name: checkout.ask(who) for name, checkout in checkouts.items()}
    for checkout in checkouts.values():
        checkout.tell("")
    return runs


def rows_of(case: str, measured: dict[str, Any]) -> list[str]:
    """The rows of a case in the table."""
    rows = []
    for who, rounds in measured["runs"].items():
        before, after = ([one[name]["s"] for one in rounds] for name in ("other", "this"))
        ratios = [a / b for a, b in zip(before, after, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        used = [one["other"]["cpu_s"] / one["this"]["cpu_s"] for one in rounds if "cpu_s" in one["this"]]
        commits = f"{measured['other']}, {measured['this']}"
        cells = [case, who, f"{statistics.median(before):.2f}", f"{statistics.median(after):.2f}"]
        cells += [f"{middle:.2f}x", f"{low:.2f} to {high:.2f}", f"{statistics.median(used):.2f}x" if used else ""]
        rows.append(f"| {' | '.join([*cells, str(len(rounds)), commits])} |")
    return rows


def revision(folder: Path) -> str:
    """Commit of a checkout."""
    from gpu.report import said_by  # of this checkout: a worker runs this file with the modules of another one

    return said_by("git", "-C", str(folder), "describe", "--always", "--dirty") or str(folder)


def report(numbers: dict[str, Any]) -> None:
    """Write the table of all cases that were ever measured."""
    from generation import write_results

    lines = [
        "## Decoding against an earlier commit",
        "",
        "`python benchmarks/commits.py OTHER`: medians by the clock, the median and the middle half of the rounds' "
        "ratios, and the median of those of processor time.",
        "",
        "| case | contender | other, s | this, s | speed-up | middle half | by processor time | rounds | other, this |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row for case, measured in sorted(numbers.items()) for row in rows_of(case, measured)]
    write_results("commits", "\n".join([*lines, ""]))


def main() -> None:
    """Compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="a checkout of another commit (git worktree add FOLDER COMMIT)")
    parser.add_argument("--case", nargs="*", help="default: all that both have")
    parser.add_argument("--contender", nargs="*", help="default: all that both have")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run_dir", type=Path, default=HERE.parent / "runs" / "quickstart", help="of quickstart.sh")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.run_dir)
        return
    other = options.other.resolve()
    if not (other / "benchmarks" / "generation.py").is_file():
        parser.error(f"OTHER must be a checkout with benchmarks/generation.py, got {options.other}")
    folders = {"other": other, "this": HERE.parent}
    commits = {name: revision(folder) for name, folder in folders.items()}
    results = HERE / "commits.json"
    numbers: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    for at in range(options.rounds):
        checkouts = {name: Checkout(folders[name], options.run_dir) for name in sorted(folders, reverse=at % 2 == 1)}
        shared = sorted(set.intersection(*(set(checkout.cases) for checkout in checkouts.values())))
        unknown = sorted(set(options.case or ()) - set(shared))
        if unknown:
            parser.error(f"--case must be some of {', '.join(shared)}, got {', '.join(unknown)}")
        for case in options.case or shared:
            found = turns(checkouts, case, options.contender)
            if not found:
                print(
                    f"{case}: not measured, {options.run_dir} holds no model, or both have no such contender",
                    flush=True,
                )
                continue
            if not at:
                numbers[case] = {**commits, "runs": {}}
            for who, one in found.items():
                numbers[case]["runs"].setdefault(who, []).append(one)
            print(f"\nround {at + 1} of {options.rounds}", *rows_of(case, numbers[case]), sep="\n", flush=True)
            results.write_text(json.dumps(numbers, indent=2) + "\n")
        for checkout in checkouts.values():
            checkout.end()
        report(numbers)


if __name__ == "__main__":
    main()
