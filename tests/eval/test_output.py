"""Files that `--output` names are written whole, or it is said why not."""

import pytest

from coda_eval.output import markdown_table, write_output
from CoDALanguageModel.errors import UserError


def test_a_file_is_written_with_its_folder(tmp_path):
    write_output(tmp_path / "a" / "b.md", "caf\u00e9 \udce9")
    assert (tmp_path / "a" / "b.md").read_text(encoding="utf-8") == "caf\u00e9 \\udce9"


@pytest.mark.parametrize("name", ["folder.md", "file/x.md", f"{'x' * 300}.md"])
def test_what_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--output '{tmp_path / name}' cannot be written: "):
        write_output(tmp_path / name, "x")
    assert {path.name for path in tmp_path.iterdir()} == {"folder.md", "file"}


@pytest.mark.parametrize("name", ["records.jsonl", "journal_rank0.jsonl", "command.json", "hashes.json"])
def test_what_a_run_keeps_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("answers")
    with pytest.raises(UserError, match="is a file that a run keeps: name another"):
        write_output(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "answers"


def test_what_a_cell_holds_is_text_in_its_row():
    text = markdown_table(["a", "b"], [["x|y\nz\u2028w", "<b>"]])
    assert text.splitlines()[2:] == ["| x\\|y z w | &lt;b> |"]
