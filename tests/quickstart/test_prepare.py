"""The data stage: its files fit the rooms that read them, and no held-out text is in what is trained on."""

import json

import pytest

from coda_quickstart.prepare import DataSettings, load_settings, prepare
from coda_quickstart.problems import held_out_programs, validation_programs

SMALL = {
    "vocab_size": 700,
    "context_tokens": 256,
    "training_programs": 300,
    "plain_functions": 30,
    "corpus_pairs": 5,
    "max_pair_characters": 400,
    "validation_programs": 12,
    "problems": 20,
    "reserved_problems": 10,
    "composition_gaps": 15,
    "stdlib_gaps": 4,
}
MODULE = '''
def size_{i}(items):
    """Number of items, {i}."""
    return len(items) + {i}
''' + "".join(f"value_{n} = {n} + 1\n" for n in range(30))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        (corpus / f"module_{i}.py").write_text(MODULE.replace("{i}", str(i)))
    folder = tmp_path_factory.mktemp("run")
    prepare(DataSettings(**SMALL), folder, corpus)
    return folder


def test_counts_are_those_asked_for(run_dir):
    summary = json.loads((run_dir / "data" / "summary.json").read_text())
    assert summary["corpus_files"] + summary["validation_files"] == 120
    assert summary["validation_files"] > 0
    assert len(rows(run_dir / "data" / "instructions" / "train.jsonl")) == 335
    assert len(rows(run_dir / "data" / "instructions" / "validation.jsonl")) == 12
    problems = [row["task_id"].split("/")[0] for row in rows(run_dir / "benchmarks" / "quickstart_problems.jsonl")]
    assert problems == 20 * ["quickstart"] + 10 * ["reserved"]
    assert len(rows(run_dir / "benchmarks" / "quickstart_infill.jsonl")) == 15 + 10 + 4


def test_no_held_out_function_is_in_any_training_file(run_dir):
    texts = [row["text"] for name in ("corpus", "functions") for row in rows(run_dir / "data" / f"{name}.jsonl")]
    texts += [row["output"] for row in rows(run_dir / "data" / "instructions" / "train.jsonl")]
    trained = "\n".join(texts) + "\n"
    held_out = held_out_programs(SMALL["problems"], 0) + held_out_programs(SMALL["reserved_problems"], 0, "reserved")
    held_out += validation_programs(SMALL["validation_programs"], 0, held_out[: SMALL["problems"]])
    assert not [program.body for program in held_out if program.body in trained]
    assert [row for row in rows(run_dir / "data" / "instructions" / "train.jsonl") if row["output"] in trained]


def test_validation_files_are_not_in_the_corpus(run_dir):
    training = {row["text"] for row in rows(run_dir / "data" / "corpus.jsonl")}
    validation = {row["text"] for row in rows(run_dir / "data" / "validation.jsonl")}
    assert validation
    assert not training & validation
    lines = {row["middle"] for row in rows(run_dir / "benchmarks" / "quickstart_infill.jsonl")}
    assert lines


def test_a_question_is_worded_the_same_in_training_and_in_the_benchmark(run_dir):
    instructions = [row["instruction"] for row in rows(run_dir / "data" / "instructions" / "train.jsonl")]
    trained = next(text for text in instructions if text.startswith("def solve("))
    asked = rows(run_dir / "benchmarks" / "quickstart_problems.jsonl")[0]["prompt"]
    assert trained.endswith('"""\n')
    assert asked.endswith('"""\n')


def test_gaps_of_compositions_split_into_the_tokens_of_the_whole(run_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    gaps = [row for row in rows(run_dir / "benchmarks" / "quickstart_infill.jsonl") if "composition" in row["task_id"]]
    assert len(gaps) == 15 + 10
    for row in gaps:
        pieces = (row["prefix"], row["middle"], row["suffix"])
        apart = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
        assert apart == tokenizer("".join(pieces))["input_ids"]


def test_the_data_set_description_names_files_that_exist(run_dir):
    folder = run_dir / "data" / "instructions"
    for entry in json.loads((folder / "dataset_info.json").read_text()).values():
        assert (folder / entry["file_name"]).is_file()
        assert set(entry["columns"].values()) <= rows(folder / entry["file_name"])[0].keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocab_sise: 5", "unknown key vocab_sise in .*; did you mean 'vocab_size'"),
        ("vocab_size: 5", "lacks context_tokens"),
        ("[1]", "must hold key: value lines"),
        (json.dumps({**SMALL, "problems": -1}), "problems must be a whole number >= 0, got -1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, message):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(path)


def test_a_missing_settings_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="--config .*none.yaml: no such file"):
        load_settings(tmp_path / "none.yaml")
