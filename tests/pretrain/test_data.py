import errno
import re
from pathlib import Path

import pytest

from coda_pretrain.data.__main__ import build_parser, main


def test_the_command_line_prepares_shards_and_reports_counts(tmp_path, tokenizer_dir, capsys, caplog):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.py").write_text("x = 1\n" * 20)
    (tmp_path / "in" / "bad.py").write_bytes(b"\xff\n")
    arguments = ["--input", str(tmp_path / "in"), "--tokenizer", str(tokenizer_dir), "--num_workers", "1"]
    caplog.set_level("INFO")
    assert main([*arguments, "--output", str(tmp_path / "out"), "--max_bad_share", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"1 documents, \d+ tokens \(0 empty and 1 undecodable skipped, 0 files not readable\); \d+ tokens made in",
        printed,
    )
    assert f"train: {tmp_path / 'out' / 'manifest.json'}" in printed
    assert "bad.py: invalid or missing encoding declaration" in caplog.text


def test_each_input_gets_the_shards_that_it_gets_alone_in_a_folder_of_its_name(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "code [1]").mkdir()
    (tmp_path / "code [1]" / "a.py").write_text("x = 1\n" * 20)
    (tmp_path / "text.v1.jsonl").write_text('{"text": "one two"}\n' * 3)
    common = ["--tokenizer", str(tokenizer_dir), "--num_workers", "1"]
    inputs = [str(tmp_path / "code [1]"), str(tmp_path / "text.v1.jsonl")]
    assert main([*common, "--each", "--input", *inputs, "--output", str(tmp_path / "each")]) == 0
    assert len(re.findall(r"^train: ", capsys.readouterr().out, re.MULTILINE)) == 2
    for path, name in zip(inputs, ("code [1]", "text"), strict=True):
        assert main([*common, "--input", path, "--output", str(tmp_path / "alone" / name)]) == 0
        made = {file.name: file.read_bytes() for file in (tmp_path / "each" / name).iterdir()}
        assert made == {file.name: file.read_bytes() for file in (tmp_path / "alone" / name).iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hf_dataset", "x"], "--each needs --input"),
        (["--input", "no/*.py"], "'no/*.py' gives no name"),
        (["--input", "a/code.py", "b/code.jsonl"], "'a/code.py' and 'b/code.jsonl' into one folder, 'code'"),
    ],
)
def test_each_input_needs_a_name_of_its_own(tmp_path, tokenizer_dir, caplog, options, message):
    assert main(["--each", *options, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out")]) == 2
    assert message in caplog.text


def test_a_full_disk_stops_the_work_and_the_same_command_finishes_it(
    tmp_path, tokenizer_dir, caplog, capsys, monkeypatch
):
    (tmp_path / "in").mkdir()
    for number in range(8):
        (tmp_path / "in" / f"{number}.py").write_text(f"x = {number}\n" * 20)
    arguments = ["--input", str(tmp_path / "in"), "--tokenizer", str(tokenizer_dir), "--num_workers", "1"]
    arguments += ["--shard_tokens", "50", "--output"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    replace, calls = Path.replace, []

    def replace_until_full(path, target):
        calls.append(target)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_until_full)
        assert main([*arguments, str(tmp_path / "out")]) == 1
    assert "No space left on device; the same command continues from here" in caplog.text
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main([*arguments, str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out.splitlines()[-2]
    total, new = re.search(r"(\d+) tokens \(.*?(\d+) tokens made", report).groups()
    assert 0 < int(new) < int(total)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()


def test_a_mistake_of_the_user_is_one_line_and_status_2(tmp_path, tokenizer_dir, caplog):
    arguments = ["--input", str(tmp_path / "no"), "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "o")]
    assert main(arguments) == 2
    assert "error: --input" in caplog.text
    assert "no such file or folder" in caplog.text


def test_the_options_of_the_command_line_are_stable():
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert options == {
        *("-h", "--help", "--input", "--exclude", "--text_suffixes", "--hf_dataset", "--hf_config", "--hf_split"),
        *("--text_key", "--tokenizer", "--document_end", "--output", "--validation_fraction", "--shard_tokens"),
        *("--num_workers", "--max_bad_share", "--overwrite", "--download", "--each"),
    }


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--inptu", "x"])
    assert "--tokenizer, --output" in capsys.readouterr().err
