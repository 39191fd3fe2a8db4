"""`benchmarks/commits.py`: what is not measured keeps what stands in the report."""

import json


def test_a_case_without_its_model_is_left_out_and_others_go_on(repo, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import commits

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "generation.py").write_text(
        "rows = {'a': {'median_s': 2.0}}\n"
        "CASES = {'quickstart': lambda repeats, run_dir: None, 'timed': lambda repeats: {'rows': rows}}\n"
    )
    kept = {"other": "x", "this": "y", "runs": {"a": [{"other": {"s": 1.0}, "this": {"s": 1.0}}]}}
    here = tmp_path / "benchmarks"
    (here / "commits.json").write_text(json.dumps({"quickstart": kept}))
    monkeypatch.setattr(commits, "HERE", here)
    monkeypatch.setattr(commits, "report", lambda numbers: None)
    monkeypatch.setattr("sys.argv", ["commits.py", str(tmp_path), "--rounds", "1"])
    commits.main()
    numbers = json.loads((here / "commits.json").read_text())
    assert numbers["quickstart"] == kept
    assert numbers["timed"]["runs"] == {"a": [{"other": {"s": 2.0}, "this": {"s": 2.0}}]}
    assert "quickstart: not measured" in capsys.readouterr().out
