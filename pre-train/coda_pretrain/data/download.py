"""Data sets named on the Hugging Face Hub: described in `configs/data/*.yaml`, fetched into a folder of text.

Every step can be stopped and given again: files that are whole are kept. The result is what `--input` of
`python -m coda_pretrain data` reads. Not here: tokens (`prepare`).
"""

import gzip
import json
import logging
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import arriving

from ..places import copy_to_local, place_of
from ..plain_data import from_dict, to_plain
from .shards import replace_with_json

logger = logging.getLogger(__name__)

RECORD_NAME = "SOURCE.json"
DESCRIPTION_NAME = "DESCRIPTION.json"
REMARKS = ("note", "report_tokens")  # fields of a description that do not say what is fetched
CONTENT_ROWS = 2048  # documents fetched before they are written


@dataclass(frozen=True, kw_only=True)
class ContentsConfig:
    """Where the texts are, for a data set that only holds identifiers."""

    url: str
    """fsspec URL of one text, with the columns of a row in braces, e.g. `https://.../{blob_id}`."""

    rows_in: str | None = None
    """Column that holds a list of rows, where a row of the data set is a whole repository."""

    encoding_key: str | None = None
    """Column that names the encoding; UTF-8 without it."""

    gzipped: bool = False
    requests: int = 64
    """Texts fetched at once."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One data set: a file of `configs/data`."""

    name: str
    """Folder below `--output`; the recipes' `data.sources` use the same names."""

    repo: str
    """Name on the Hub."""

    revision: str = "main"
    files: tuple[str, ...] = ("*",)
    """Patterns of the repository's files to fetch; empty for none."""

    url_lists: tuple[str, ...] = ()
    """Files of the repository whose lines are URLs of the data."""

    urls: tuple[str, ...] = ()
    """Further files of the data set that are not in the repository."""

    unpack: bool = False
    """Unpack tar archives among the files."""

    load_configs: tuple[str, ...] = ()
    """Configurations to read with `datasets` and write as parquet, for file formats that `--input` cannot read."""

    load_split: str = "train"
    contents: ContentsConfig | None = None
    text_key: str = "text"
    """Field that holds the text, for `--text_key`."""

    report_tokens: float | None = None
    """Tokens that the CoDA report took from it."""

    note: str = ""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: the name is no plain folder name, or nothing is to be fetched.
        """
        if not self.name or "/" in self.name:
            raise UserError(f"name must be a plain folder name, got {self.name!r}")
        if not (self.files or self.url_lists or self.urls):
            raise UserError(f"{self.name}: files, url_lists and urls are all empty, so there is nothing to fetch")


def load_corpus(path: str) -> CorpusConfig:
    """Read one description.

    Raises:
        UserError: it is missing, no YAML, or does not fit `CorpusConfig`.
    """
    if not Path(path).is_file():
        raise UserError(f"--download {path}: no such file; pre-train/configs/data has the known ones")
    try:
        return from_dict(CorpusConfig, yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (UserError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--download {path}: {error}") from error


def download(corpus: CorpusConfig, output: Path, *, num_workers: int) -> Path:
    """Fetch a data set into `output / corpus.name` and give the folder that holds its text.

    Raises:
        OSError: the Hub or another server cannot be reached or refuses; what has arrived is kept.
        UserError: the data does not look as described, or the folder holds what another description fetched.
    """
    folder = output / corpus.name
    folder.mkdir(parents=True, exist_ok=True)
    _check_same_description(corpus, folder)
    if corpus.files or corpus.url_lists:
        _fetch_repository(corpus, folder / "repository", num_workers)
    urls = [*corpus.urls, *_listed_urls(corpus, folder / "repository")]
    repeated = sorted(name for name, count in Counter(map(_file_name, set(urls))).items() if count > 1)
    if repeated:
        raise UserError(f"{corpus.name}: several URLs end in {', '.join(repeated)}, and one file would hide another")
    fetched = folder / "files"
    for url in urls:
        fetch(url, fetched)
    text = folder / ("files" if urls else "repository")
    if corpus.unpack:
        text = folder / "unpacked"
        for archive in sorted(fetched.iterdir()):
            unpack(archive, text)
    if corpus.load_configs:
        text = folder / "parquet"
        for name in corpus.load_configs:
            to_parquet(folder / "repository", name, corpus.load_split, text)
    if corpus.contents is not None:
        text = folder / "contents"
        for file in sorted((folder / "repository").rglob("*.parquet")):
            relative = file.relative_to(folder / "repository")
            fetch_contents(file, text / relative, corpus.contents, corpus.text_key)
    record = {"name": corpus.name, "repo": corpus.repo, "revision": corpus.revision, "text": text.name, "urls": urls}
    replace_with_json(folder / RECORD_NAME, record)
    return text


def _check_same_description(corpus: CorpusConfig, folder: Path) -> None:
    """Files are kept by their names, so what another description has left would be taken for what this one names."""
    wanted = {name: value for name, value in to_plain(corpus).items() if name not in REMARKS}
    for name in (DESCRIPTION_NAME, RECORD_NAME):
        if (folder / name).is_file():
            known = json.loads((folder / name).read_text(encoding="utf-8"))
            keys = known.keys() & wanted.keys() - ({"urls"} if name == RECORD_NAME else set())  # it has listed ones too
            differing = sorted(key for key in keys if known[key] != wanted[key])
            if differing:
                raise UserError(
                    f"{folder} holds what another description of {corpus.name} has fetched (different: "
                    f"{', '.join(differing)}); give another --output or remove that folder"
                )
    replace_with_json(folder / DESCRIPTION_NAME, wanted)


def _fetch_repository(corpus: CorpusConfig, folder: Path, num_workers: int) -> None:
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            corpus.repo,
            repo_type="dataset",
            revision=corpus.revision,
            allow_patterns=[*corpus.files, *corpus.url_lists],
            local_dir=folder,
            max_workers=num_workers,
        )
    except OSError as error:  # what huggingface_hub raises without a connection, without access, without a repository
        raise OSError(
            f"{corpus.repo} could not be fetched from the Hub ({type(error).__name__}: {error}); it needs a "
            "connection (and HF_HUB_OFFLINE unset), and for a gated data set its terms accepted and `hf auth login`"
        ) from error
    if not any(folder.rglob("*")):
        raise UserError(f"{corpus.repo} has no file that matches {corpus.files}")


def _listed_urls(corpus: CorpusConfig, folder: Path) -> list[str]:
    lines = [line.strip() for name in corpus.url_lists for line in (folder / name).read_text().splitlines()]
    return [line for line in lines if line]


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def fetch(url: str, folder: Path) -> None:
    """Copy one file, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _file_name(url)
    if not target.is_file():
        logger.info("%s", url)
        copy_to_local(place_of(url), target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive into a folder of its name, unless it is there.

    Raises:
        UserError: it is broken.
    """
    target = folder / archive.name.split(".tar")[0]
    if target.is_dir():
        return
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tarfile.open(archive) as content:
            content.extractall(partial, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{archive} is not a whole tar archive ({error}); remove it to have it fetched again"
        ) from error
    partial.replace(target)


def to_parquet(folder: Path, config: str, split: str, output: Path) -> None:
    """Read one configuration of a downloaded data set with `datasets` and write it as parquet, unless it is there.

    Raises:
        UserError: `datasets` cannot read it.
    """
    target = output / f"{config}-{split}.parquet"
    if target.is_file():
        return
    import datasets  # seconds to import, and only some data sets need it

    output.mkdir(parents=True, exist_ok=True)
    try:
        loaded = datasets.load_dataset(str(folder), config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"datasets cannot read configuration {config!r} of {folder}: {error}") from error
    with arriving(target) as partial:
        loaded.to_parquet(str(partial))


def fetch_contents(file: Path, target: Path, config: ContentsConfig, text_key: str) -> None:
    """Fetch the text of each row of a parquet file and write it as parquet, unless it is there.

    A text that is gone or cannot be decoded is null there, and counted in the log.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("url", pa.string()), (text_key, pa.string())])
    rows = missing = 0
    with (
        arriving(target) as partial,
        ThreadPoolExecutor(config.requests) as pool,
        pq.ParquetWriter(partial, schema) as writer,
    ):
        for urls in _content_urls(file, config):
            texts = list(pool.map(lambda pair: _content(*pair, config.gzipped), urls))
            rows, missing = rows + len(texts), missing + texts.count(None)
            writer.write_table(pa.table([[url for url, _ in urls], texts], schema=schema))
    logger.info("%s: %d texts, %d gone or undecodable", target, rows - missing, missing)


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is not a whole parquet file: {error}") from error


def _content_urls(file: Path, config: ContentsConfig) -> Iterator[list[tuple[str, str]]]:
    with _parquet(file) as parquet:
        for batch in parquet.iter_batches(batch_size=CONTENT_ROWS if config.rows_in is None else 64):
            rows: list[dict[str, Any]] = batch.to_pylist()
            if config.rows_in is not None:
                rows = [inner for row in rows for inner in row[config.rows_in]]
            key = config.encoding_key
            for start in range(0, len(rows), CONTENT_ROWS):
                part = rows[start : start + CONTENT_ROWS]
                yield [(config.url.format(**row), (key and row[key]) or "utf-8") for row in part]


def _content(url: str, encoding: str, gzipped: bool) -> str | None:
    try:
        data = place_of(url).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return (gzip.decompress(data) if gzipped else data).decode(encoding)
    except (UnicodeError, LookupError, gzip.BadGzipFile, EOFError, zlib.error):
        return None


def describe(corpus: CorpusConfig, text: Path) -> str:
    """What to do with a downloaded data set."""
    suffixes = " --text_suffixes .txt" if corpus.unpack else ""
    return (
        f"{corpus.name}: {text}; next: python -m coda_pretrain data --input {text} --text_key {corpus.text_key}"
        f"{suffixes} --tokenizer TOKENIZER_DIR --output data/{corpus.name}"
    )
