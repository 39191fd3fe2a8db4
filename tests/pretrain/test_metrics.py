import json
import logging

from coda_pretrain.metrics import MetricsFile, Reporter, read_rows


def test_a_resumed_file_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 10} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    file = MetricsFile(path, finished_steps=2)
    file.write({"step": 3, "loss": 9.0})
    file.close()
    assert read_rows(path) == [*rows[:2], {"step": 3, "loss": 9.0}]


def test_without_a_terminal_rows_become_log_lines_and_the_tracker_gets_them(tmp_path, caplog):
    class Tracker:
        rows, finished = [], False

        def log(self, row, step):
            self.rows.append((step, row))

        def finish(self):
            Tracker.finished = True

    tracker = Tracker()
    with (
        caplog.at_level(logging.INFO),
        Reporter(tmp_path / "metrics.jsonl", finished_steps=0, num_steps=8, tracker=tracker) as reporter,
    ):
        reporter.step(1)
        reporter.row({"step": 1, "loss": 2.5, "tokens_per_s": 1234.0})
    assert "step 1/8  loss 2.5  tokens/s 1234" in caplog.text
    assert tracker.rows == [(1, {"loss": 2.5, "tokens_per_s": 1234.0})]
    assert Tracker.finished
