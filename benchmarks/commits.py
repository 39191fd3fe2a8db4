"""Decoding of this checkout against another one: `python benchmarks/commits.py OTHER [--case NAME ...] [--rounds N]`.

Each checkout runs the cases of its own `benchmarks/generation.py` in a process of its own, with its own package. They
take turns, case by case, and contenders that both have are compared: by the clock, and by the processor time of the
whole case, which other work on the machine disturbs less. Results go to `RESULTS.md` and `commits.json`.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def work(run_dir: Path) -> None:
    """Run the cases that the standard input names, and write a line of JSON about each."""
    import generation

    print(json.dumps(sorted(generation.CASES)), flush=True)
    for line in sys.stdin:
        run = generation.CASES[line.strip()]
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            case = run(1, run_dir=run_dir) if line.strip() == "quickstart" else run(1)
        said = {name: row["median_s"] for name, row in case["rows"].items()}
        print(json.dumps({"seconds": said, "cpu": time.process_time() - started}), flush=True)


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

    def run(self, case: str) -> dict[str, Any]:
        """Run a case once."""
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return self.read()


def revision(folder: Path) -> str:
    """Commit of a checkout."""
    from gpu.report import said_by  # of this checkout: a worker runs this file with the modules of another one

    return said_by("git", "-C", str(folder), "describe", "--always", "--dirty") or str(folder)


def main() -> None:
    """Compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="a checkout of another commit (git worktree add FOLDER COMMIT)")
    parser.add_argument("--case", nargs="*", help="default: all that both have")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run_dir", type=Path, default=HERE.parent / "runs" / "quickstart", help="of quickstart.sh")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.run_dir)
        return
    other = options.other.resolve()
    if not (other / "benchmarks" / "generation.py").is_file():
        parser.error(f"OTHER must be a checkout with benchmarks/generation.py, got {options.other}")
    checkouts = {"other": Checkout(other, options.run_dir), "this": Checkout(HERE.parent, options.run_dir)}
    shared = sorted(set(checkouts["other"].cases) & set(checkouts["this"].cases))
    unknown = sorted(set(options.case or ()) - set(shared))
    if unknown:
        parser.error(f"--case must be some of {', '.join(shared)}, got {', '.join(unknown)}")
    lines = [
        "## Decoding against an earlier commit",
        "",
        f"`python benchmarks/commits.py OTHER`: {revision(HERE.parent)} against {revision(other)}, "
        f"{options.rounds} rounds in turn, medians.",
        "",
        "| case | contender | other, s | this, s | speed-up |",
        "| --- | --- | --- | --- | --- |",
    ]
    numbers: dict[str, Any] = {"this": revision(HERE.parent), "other": revision(other), "cases": {}}
    for case in options.case or shared:
        runs: dict[str, list[dict[str, Any]]] = {"other": [], "this": []}
        for _ in range(options.rounds):
            for name, checkout in checkouts.items():
                runs[name].append(checkout.run(case))
        numbers["cases"][case] = runs
        medians = {
            name: {who: statistics.median(run["seconds"][who] for run in said) for who in said[0]["seconds"]}
            for name, said in ((n, [r for r in rs if r["seconds"]]) for n, rs in runs.items())
        }
        rows = [
            (who, medians["other"][who], seconds) for who, seconds in medians["this"].items() if who in medians["other"]
        ]
        cpu = {name: statistics.median(run["cpu"] for run in said) for name, said in runs.items()}
        rows.append(("all of it, processor time", cpu["other"], cpu["this"]))
        for who, before, after in rows:
            lines.append(f"| {case} | {who} | {before:.2f} | {after:.2f} | {before / after:.2f}x |")
            print(lines[-1], flush=True)
        (HERE / "commits.json").write_text(json.dumps(numbers, indent=2) + "\n")
    from generation import write_results

    write_results("commits", "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
