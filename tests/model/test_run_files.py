import json
import logging
import multiprocessing
import subprocess
import sys

import pytest

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import arriving, claimed, read_rows, write_whole


def test_a_torn_last_line_is_left_out_and_told_and_any_other_is_refused(tmp_path, caplog):
    path, rows = tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2, "text": "a\u2028b"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"step": 3, "lo')
    with caplog.at_level(logging.WARNING):
        assert read_rows(path) == rows
    assert "metrics.jsonl ends in a line that was not written completely" in caplog.text
    no_line_break, in_a_character, no_text = b'{"step": 3}', b'{"step": "\xe2\x80', b"\0\0\n"
    for torn in (no_line_break, in_a_character, no_text):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
        assert read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is not JSON"):
        read_rows(path)


def test_a_file_is_its_old_self_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "state.json"
    write_whole(target, "old")

    def killed_while_writing():
        with arriving(target) as partial:
            partial.write_text("ne")
            assert target.read_text() == "old"
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_while_writing()
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert target.read_text() == "old"
    write_whole(target, "new")
    assert target.read_text() == "new"


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    for _ in range(2):
        with (
            claimed(tmp_path),
            pytest.raises(UserError, match=f"another run writes to {tmp_path}, or"),
            claimed(tmp_path),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_a_forked_worker_does_not_keep_the_folder_and_a_program_that_was_given_it_does(tmp_path):
    context = multiprocessing.get_context("fork")
    with claimed(tmp_path) as descriptor:
        ended = context.Event()
        worker = context.Process(target=ended.wait, daemon=True)
        worker.start()
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
        with pytest.raises(UserError, match="another run"), claimed(tmp_path):
            pass  # what a worker lets go is still this process's
    with pytest.raises(UserError, match="or a process of one that was killed"), claimed(tmp_path):
        pass
    program.communicate(b"\n")
    with claimed(tmp_path):
        assert worker.is_alive()
    ended.set()
    worker.join()
    assert worker.exitcode == 0
