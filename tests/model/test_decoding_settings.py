"""The table of settings: what is made from it, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from CoDALanguageModel import DiffusionGenerationConfig
from CoDALanguageModel.decoding_settings import (
    DOORS,
    SETTINGS,
    DecodingSettings,
    Setting,
    parse_settings,
)
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.tools.sample import parse
from CoDALanguageModel.tools.tables import with_tables

REPO = Path(__file__).resolve().parents[2]
TABLES_STAND_IN = ["README.md", "serving/README.md", "evaluation/README.md", "serving/fast-api/env.example"]
SHELL = ["--model", "m", "--prompt", "p"]


def test_a_new_row_is_a_setting_of_the_configuration_and_a_flag_of_the_shell(monkeypatch, capsys):
    row = Setting(name="warmth", kind=float, default=0.5, least=0, most=1, says="how warm it is")
    monkeypatch.setitem(SETTINGS, "warmth", row)
    assert DiffusionGenerationConfig().warmth == 0.5
    assert DiffusionGenerationConfig().merged({"warmth": 0.25}).warmth == 0.25
    assert DecodingSettings(warmth=0.25).warmth == 0.25
    with pytest.raises(ValueError, match=r"warmth must be in \[0, 1\], got 2"):
        DiffusionGenerationConfig(warmth=2)
    assert parse([*SHELL, "--warmth", "0.25"])[1] == parse_settings(["warmth=0.25"]) == {"warmth": 0.25}
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "how warm it is" in capsys.readouterr().out


def test_every_setting_is_a_flag_of_the_shell_or_says_why_not():
    for name, row in SETTINGS.items():
        assert set(row.withheld) <= set(DOORS)
        if reason := row.withheld.get("shell"):
            with pytest.raises(UserError, match=f"{name} cannot be set here: {reason}"):
                parse([*SHELL, f"--{name}", "1"])
        else:
            assert parse([*SHELL, f"--{name}", "1"])[1] == {name: "1" if row.kind is str else 1}


def test_every_default_holds():
    for row in SETTINGS.values():
        assert row.checked(row.default) == row.default
        assert row.checked(row.served_default) == row.served_default


@pytest.mark.parametrize("name", TABLES_STAND_IN)
def test_committed_tables_are_what_the_rows_give(name, monkeypatch):
    text = (REPO / name).read_text(encoding="utf-8")
    assert with_tables(text) == text, f"python -m CoDALanguageModel tables {name} writes it anew"
    monkeypatch.setitem(SETTINGS, "warmth", Setting(name="warmth", kind=int, default=1, least=0, says="how warm"))
    assert (with_tables(text) == text) == (name == "evaluation/README.md")  # which lists what is withheld only


def test_a_value_of_all_settings_is_checked_frozen_and_equal_by_value():
    one = DecodingSettings(steps=4, temperature=0, logit_bias={"5": 1.0})
    same = DecodingSettings(steps=4, temperature=0.0, logit_bias={"5": 1.0})
    assert one == same
    assert hash(one) == hash(same)
    assert one != DecodingSettings(steps=4)
    assert repr(DecodingSettings(steps=4, threshold=0.9)) == "DecodingSettings(steps=4, threshold=0.9)"
    with pytest.raises(AttributeError, match="frozen: steps"):
        one.steps = 5
    with pytest.raises(UserError, match="unknown generation setting 'stepz'; did you mean 'steps'"):
        DecodingSettings(stepz=4)
    with pytest.raises(UserError, match="suffix_window needs block_length"):
        DecodingSettings(suffix_window=4)
    assert DecodingSettings(temperature=1e-7).temperature == 0.0
    assert "eos_token_id" not in one.overrides()
    assert one.overrides()["do_sample"] is None
    assert DecodingSettings(kv_cache="dual", speculate=0, threshold=0.9).approximate == ["kv_cache", "threshold"]
    assert DecodingSettings(speculate=2, remask=None).approximate == []


def test_settings_and_errors_are_read_without_torch():
    code = "import sys, CoDALanguageModel.decoding_settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0
