"""The server's fields and variables, and the chat client's flags, are the rows of the table."""

import importlib.util
from pathlib import Path

import pytest

import coda_serving
from coda_serving.errors import FIELDS_OF_BODIES
from coda_serving.protocol import ChatRequest, CompletionRequest
from coda_serving.settings import ServerSettings
from CoDALanguageModel.decoding_settings import SETTINGS, Setting

CLI = Path(__file__).resolve().parents[2] / "serving/fast-api/chat_cli.py"


def anew(path: Path, name: str):
    """A second copy of a module, made from the table as it is now."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def warmth(monkeypatch):
    row = Setting(name="warmth", kind=float, default=0.5, least=0, most=1, says="how warm it is")
    monkeypatch.setitem(SETTINGS, "warmth", row)


def test_every_setting_is_a_field_and_a_variable_or_says_why_not(monkeypatch):
    cli = anew(CLI, "chat_cli")
    flags = vars(cli.parse_arguments([]))
    for row in SETTINGS.values():
        if reason := row.withheld.get("server"):
            assert len(reason) > 5
            assert row.api not in ServerSettings.model_fields
            assert row.api not in ChatRequest.model_fields
            continue
        for names in (ChatRequest.model_fields, CompletionRequest.model_fields, ServerSettings.model_fields, flags):
            assert row.api in names, row.name
        assert row.api in FIELDS_OF_BODIES


def test_a_new_row_is_a_variable_a_field_and_a_flag(warmth, monkeypatch):
    package = Path(coda_serving.__file__).parent
    settings = anew(package / "settings.py", "coda_serving.settings_anew")
    monkeypatch.setitem(__import__("sys").modules, "coda_serving.settings", settings)
    protocol = anew(package / "protocol.py", "coda_serving.protocol_anew")
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv("WARMTH", "0.25")
    held = settings.load_settings()
    assert (held.warmth, held.options().warmth, held.decoding["warmth"]) == (0.25, 0.25, 0.25)
    request = protocol.ChatRequest(messages=[{"role": "user", "content": "hi"}], warmth=0.75)
    assert held.options(request.decoding).warmth == 0.75
    schema = protocol.ChatRequest.model_json_schema()["properties"]["warmth"]
    assert schema["description"] == "how warm it is"
    assert schema["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    monkeypatch.setenv("WARMTH", "2")
    with pytest.raises(ValueError, match="WARMTH: Input should be less than or equal to 1, got '2'"):
        settings.load_settings()
    assert anew(CLI, "chat_cli").parse_arguments(["--warmth", "0.5"]).warmth == 0.5


def test_flags_of_the_chat_client_read_numbers_words_none_and_json(capsys):
    cli = anew(CLI, "chat_cli")
    given = ["--steps", "4", "--threshold", "None", "--kv-cache", "dual", "--logit-bias", '{"5": 1}', "--top-k", "-1"]
    args = cli.parse_arguments(given)
    assert (args.steps, args.threshold, args.kv_cache, args.logit_bias, args.top_k) == (4, "none", "dual", {"5": 1}, -1)
    for flag, value in (("--steps", "x"), ("--suppress-tokens", "5;6")):
        with pytest.raises(SystemExit):
            cli.parse_arguments([flag, value])
        assert f"argument {flag}: invalid" in capsys.readouterr().err
