"""Benchmark files from their published homes: `python -m coda_eval fetch [SET ...]` puts them where tasks look.

Each file has a licence that allows it and a known hash: what arrives is only ever a whole file of that content. What
was begun goes on where it stopped. The other sets are refused, with where to get them.
"""

import argparse
import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coda_eval.data import DATA_VARIABLE
from CoDALanguageModel.errors import UserError, did_you_mean

CHUNK = 1 << 20
MAX_BYTES = 1 << 28
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class File:
    """A benchmark's file."""

    name: str
    """In the data folder, as `coda_eval.data` looks for it."""

    url: str
    licence: str
    sha256: str
    """Of the content, unpacked."""


def _infilling(name: str, sha256: str) -> File:
    name = f"HumanEval-{name}.jsonl.gz"
    url = f"https://github.com/openai/human-eval-infilling/raw/master/data/{name}"
    return File(name=name, url=url, licence="MIT", sha256=sha256)


FILES = {
    "humaneval": File(
        name="HumanEval.jsonl.gz",
        url="https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz",
        licence="MIT",
        sha256="1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",
    ),
    "humaneval_plus": File(
        name="HumanEvalPlus-OriginFmt.jsonl.gz",
        url="https://github.com/evalplus/humanevalplus_release/raw/v0.1.10/HumanEvalPlus-OriginFmt.jsonl.gz",
        licence="Apache-2.0",
        sha256="04228b8a570ff7c346c740b91f0c6a0b323f86a26e903db8477c6f2d10f38819",
    ),
    "mbpp": File(
        name="mbpp.jsonl",
        url="https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
        licence="CC-BY-4.0",
        sha256="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    ),
    "mbpp_plus": File(
        name="MbppPlus-OriginFmt.jsonl.gz",
        url="https://github.com/evalplus/mbppplus_release/raw/v0.2.0/MbppPlus-OriginFmt.jsonl.gz",
        licence="Apache-2.0",
        sha256="132d01c96df6b4b0fe0cbb8414092fe62c51b873b160d1ec8fc2ded28484865a",
    ),
    "single_line_infilling": _infilling(
        "SingleLineInfilling", "6fffc71ec2f1674372fcc177511f92312f1a27a9eacd8e43255c9f5ee9eca8c8"
    ),
    "multi_line_infilling": _infilling(
        "MultiLineInfilling", "5b49f312f0a781420a4ae54f5e73176009b9cfc52731e3a0b9be726b451032d1"
    ),
    "random_span_infilling": _infilling(
        "RandomSpanInfilling", "4f15be2d4a479b504072c64e79702df184010f13bdf75f8b67ce08e054c48e26"
    ),
    "random_span_light_infilling": _infilling(
        "RandomSpanInfillingLight", "cbb2b36f90311a3a7d844b6361852bb33e3ab11ab3bca2b7e85bfb9bf78c5891"
    ),
    "santacoder_fim": File(
        name="santacoder_fim.jsonl",
        url="https://github.com/arjunguha/santacoder_fim_benchmark/raw/main/benchmark.jsonl",
        licence="BSD-3-Clause, and not to be used as training data",
        sha256="906ea818e582a1da675cb5607fef6f3e4f51c77499b8f641aa32dfe9aa0693d8",
    ),
    "cruxeval": File(
        name="cruxeval.jsonl",
        url="https://github.com/facebookresearch/cruxeval/raw/main/data/cruxeval.jsonl",
        licence="MIT",
        sha256="8368b81047dc5014e4caf5a2f97604eff7644e0ecd7415e3ceeb184bbc2e0c96",
    ),
}
"""Every set that is fetched."""

ELSEWHERE = {
    "livecodebench": (
        "no hash of its files is known here; join the test*.jsonl that you want of "
        "https://huggingface.co/datasets/livecodebench/code_generation_lite as livecodebench.jsonl"
    ),
    "bigcodebench": (
        "no hash of its file is known here; write the rows of https://huggingface.co/datasets/bigcode/bigcodebench as "
        "JSON lines to BigCodeBench.jsonl"
    ),
    "safim": (
        "no hash of its files is known here; get *_completion*.jsonl.gz from "
        "https://huggingface.co/datasets/gonglinyuan/safim"
    ),
    "real_fim": (
        "no hash of its files is known here; get the folders add and edit from "
        "https://huggingface.co/datasets/gonglinyuan/real_fim_eval"
    ),
}
"""Why a set is not fetched, and where it is."""


def content_hash(path: Path) -> str:
    """SHA-256 of what a file holds, unpacked.

    Raises:
        OSError, EOFError, zlib.error: it is not what its name says.
    """
    found = hashlib.sha256()
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def fetch(file: File, folder: Path) -> bool:
    """Have a file in `folder`: whether it had to be fetched.

    Raises:
        UserError: its home cannot be reached or gives something else, or another file has its name.
    """
    target, part = folder / file.name, folder / f"part.{file.name}"
    if target.exists():
        if _is_right(target, file):
            return False
        raise UserError(f"{target} is there and is not the published file: remove it, or keep it and fetch no other")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error}") from error
    _download(file.url, part)
    if not _is_right(part, file):
        part.unlink()
        raise UserError(f"{file.url} gave another file than the one that is known (sha256 {file.sha256}): nothing kept")
    part.replace(target)
    return True


def _is_right(path: Path, file: File) -> bool:
    try:
        return content_hash(path) == file.sha256
    except (OSError, EOFError, zlib.error):
        return False


def _download(url: str, part: Path) -> None:
    """Write what a URL gives to a file, behind what it has already.

    Raises:
        UserError: it cannot be had.
    """
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
            with part.open("ab" if goes_on else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    if file.tell() > MAX_BYTES:
                        part.unlink()
                        raise UserError(f"{url} gave more than {MAX_BYTES} bytes, which no set has: nothing kept")
            left = answer.length
        if left:
            raise UserError(f"{url} broke off with {left} bytes to come: fetch again to go on")
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:  # nothing stands behind what is there: the hash says whether it is all
            return
        raise UserError(f"{url} cannot be had: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be had: {error}; fetch again to go on with what has come") from error


def main(argv: Sequence[str]) -> None:
    """Fetch the sets that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m coda_eval fetch", description="Get benchmark files.")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--data_dir", help=f"folder for the files; default: {DATA_VARIABLE}")
    args = parser.parse_args(argv)
    place = args.data_dir or os.environ.get(DATA_VARIABLE)
    if not place:
        raise UserError(f"where to? Set {DATA_VARIABLE} to a folder, or give --data_dir")
    for name in args.sets:
        if name in ELSEWHERE:
            raise UserError(f"{name} is not fetched: {ELSEWHERE[name]}")
        if name not in FILES:
            known = [*FILES, *ELSEWHERE]
            raise UserError(f"unknown set {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    folder, failed = Path(place).expanduser(), []
    for name in args.sets or FILES:
        file = FILES[name]
        try:
            done = "fetched" if fetch(file, folder) else "there already"
            print(f"{name}: {done}, {folder / file.name}; licence: {file.licence}")
        except UserError as error:
            failed.append(f"{name}: {error}")
    if failed:
        raise UserError("; ".join(failed))
