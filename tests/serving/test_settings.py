"""Each variable is read, checked, and named when it is wrong."""

from pathlib import Path

import pytest

from coda_serving.settings import DECODING, ServerSettings, is_loopback, load_settings
from CoDALanguageModel.errors import UserError

ENV_EXAMPLE = Path(__file__).resolve().parents[2] / "serving/fast-api/env.example"
DEFAULTS = {row.api: row.served_default for row in DECODING} | {
    "model_name": "org/model",
    "served_model_name": None,
    "host": "127.0.0.1",
    "port": 8000,
    "api_key": None,
    "api_keys_file": None,
    "cors_origins": (),
    "device": "auto",
    "dtype": "auto",
    "max_tokens": 256,
    "steps": 128,
    "alg": "entropy",
    "alg_temp": 0.1,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "block_length": 32,
    "seed": None,
    "allow_approximate": True,
    "max_queue": 64,
    "max_batch_size": 16,
    "max_batch_tokens": 32768,
    "batch_wait_ms": 10.0,
    "request_timeout_s": 600.0,
    "queue_timeout_s": 600.0,
    "step_timeout_s": 600.0,
    "max_body_bytes": 2 << 20,
    "client_timeout_s": 60.0,
    "heartbeat_s": 15.0,
    "drain_timeout_s": 30,
    "log_level": "info",
}


def test_defaults_are_the_documented_ones(monkeypatch):
    monkeypatch.setenv("MODEL_NAME", "org/model")
    assert load_settings().model_dump() == DEFAULTS


def test_the_example_file_holds_every_variable_with_its_default():
    settings = load_settings(str(ENV_EXAMPLE))
    assert settings.model_dump() == DEFAULTS | {"model_name": "Salesforce/CoDA-v0-Instruct"}
    named = {line.partition("=")[0] for line in ENV_EXAMPLE.read_text().splitlines() if line and line[0] != "#"}
    assert named == {name.upper() for name in ServerSettings.model_fields}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SERVED_MODEL_NAME", "coda", "coda"),
        ("HOST", "::1", "::1"),
        ("PORT", "9000", 9000),
        ("CORS_ORIGINS", "http://a, http://b", ("http://a", "http://b")),
        ("DEVICE", "CUDA:1", "cuda:1"),
        ("DTYPE", "bfloat16", "bfloat16"),
        ("ALG", "p2", "p2"),
        ("TOP_P", "0.9", 0.9),
        ("TOP_K", "5", 5),
        ("BLOCK_LENGTH", "none", None),
        ("SEED", "7", 7),
        ("KV_CACHE", "dual", "dual"),
        ("THRESHOLD", "None", None),
        ("LOGIT_BIAS", '{"5": -1.5}', {"5": -1.5}),
        ("SUPPRESS_TOKENS", "[5, 6]", [5, 6]),
        ("ALLOW_APPROXIMATE", "false", False),
        ("LOG_LEVEL", "DEBUG", "debug"),
        ("TOP_P", "", None),
    ],
)
def test_variables_are_read(monkeypatch, name, value, expected):
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv(name, value)
    assert getattr(load_settings(), name.lower()) == expected


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "0", "greater than or equal to 1"),
        ("PORT", "eighty", "valid integer"),
        ("STEPS", "0", "greater than or equal to 1"),
        ("MAX_TOKENS", "-3", "greater than or equal to 1"),
        ("TEMPERATURE", "-0.1", "greater than or equal to 0"),
        ("TEMPERATURE", "nan", "finite number"),
        ("TOP_P", "1.5", "less than or equal to 1"),
        ("TOP_K", "0", "greater than or equal to 1"),
        ("ALG", "greedy", "'entropy'"),
        ("ALG_TEMP", "-1", "greater than or equal to 0"),
        ("BLOCK_LENGTH", "0", "greater than or equal to 1"),
        ("THRESHOLD", "1.5", "less than or equal to 1"),
        ("KV_CACHE", "both", "'dual'"),
        ("SUPPRESS_TOKENS", "5;6", "must be JSON"),
        ("SEED", "-1", "greater than or equal to 0"),
        ("DEVICE", "tpu", "cuda"),
        ("DTYPE", "int8", "'bfloat16'"),
        ("MAX_QUEUE", "0", "greater than or equal to 1"),
        ("MAX_BATCH_SIZE", "0", "greater than or equal to 1"),
        ("MAX_BATCH_TOKENS", "0", "greater than or equal to 1"),
        ("BATCH_WAIT_MS", "-1", "greater than or equal to 0"),
        ("REQUEST_TIMEOUT_S", "0", "greater than 0"),
        ("QUEUE_TIMEOUT_S", "0", "greater than 0"),
        ("DRAIN_TIMEOUT_S", "-1", "greater than or equal to 0"),
        ("LOG_LEVEL", "loud", "'warning'"),
    ],
)
def test_a_bad_value_names_variable_allowed_and_got(monkeypatch, name, value, allowed):
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as caught:
        load_settings()
    assert allowed in str(caught.value)
    assert value.lower() in str(caught.value).lower()


def test_all_faults_are_told_at_once(monkeypatch):
    monkeypatch.setenv("STEPS", "0")
    monkeypatch.setenv("PORT", "x")
    with pytest.raises(ValueError, match="MODEL_NAME is not set") as caught:
        load_settings()
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_model_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_NAME", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="MODEL_NAME: there is no such folder, got '.*absent'"):
        load_settings()


def test_a_folder_that_is_no_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_NAME", str(tmp_path))
    with pytest.raises(ValueError, match="config.json"):
        load_settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_wider_bind_needs_a_key(monkeypatch, tmp_path, host):
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv("HOST", host)
    with pytest.raises(ValueError, match=f"HOST={host} .*API_KEY"):
        load_settings()
    monkeypatch.setenv("API_KEY", "secret")
    assert load_settings().host == host
    monkeypatch.delenv("API_KEY")
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    monkeypatch.setenv("API_KEYS_FILE", str(keys))
    assert load_settings().host == host


def test_loopback_addresses_are_known():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "10.0.0.1")] == [True] * 4 + [False]


def test_the_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv("API_KEY", "hush-hush")
    assert "hush-hush" not in f"{load_settings()} {load_settings()!r}"


def test_the_process_wins_over_the_file(monkeypatch, tmp_path):
    file = tmp_path / "my.env"
    file.write_text("MODEL_NAME=org/model\nSTEPS=7\nPORT=7000\n")
    monkeypatch.setenv("STEPS", "9")
    settings = load_settings(str(file))
    assert (settings.steps, settings.port) == (9, 7000)


def test_no_file_is_read_unless_named(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("STEPS=7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_NAME", "org/model")
    assert load_settings().steps == 128


def test_a_misspelt_variable_in_the_file_is_named(tmp_path):
    file = tmp_path / "my.env"
    file.write_text("MODEL_NAME=org/model\nTEMPRATURE=1\n")
    with pytest.raises(ValueError, match="unknown variable TEMPRATURE; did you mean TEMPERATURE"):
        load_settings(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PORT=8001\nSERVED_MODEL_NAME=caf\xe9\n", "ENV_FILE=.*my.env is not UTF-8: invalid .* at byte 31"),
        (b"# a key\n\nAPI_KEY='abc\n", "my.env: line 3 must be NAME=value, with quotes closed, got API_KEY$"),
        (b"API_KEY\n", "my.env: line 1 must be NAME=value, with quotes closed, got API_KEY$"),
        (b"PORT 8001\n", "my.env: line 1 must be NAME=value, .* got PORT 8001$"),
    ],
)
def test_a_line_that_says_nothing_is_refused_and_not_passed_over(tmp_path, content, message):
    file = tmp_path / "my.env"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_settings(str(file))


def test_a_file_may_have_a_byte_order_mark_and_comments_and_empty_values(tmp_path):
    file = tmp_path / "my.env"
    file.write_bytes(b"\xef\xbb\xbfMODEL_NAME=org/model  # ours\n\n# none\nAPI_KEY=\nexport PORT=8001\n")
    settings = load_settings(str(file))
    assert (settings.model_name, settings.api_key, settings.port) == ("org/model", None, 8001)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="ENV_FILE=.*absent.env is not a file"):
        load_settings(str(tmp_path / "absent.env"))


def test_the_served_name_is_the_last_part_of_the_path(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert ServerSettings(model_name=str(tmp_path) + "/").public_name == tmp_path.name
    assert ServerSettings(model_name="org/model").public_name == "model"


def test_clients_may_say_the_path_only_where_no_name_is_set():
    plain, named = ServerSettings(model_name="org/model"), ServerSettings(model_name="org/model", served_model_name="m")
    assert [plain.is_served(name) for name in ("model", "org/model", "m")] == [True, True, False]
    assert [named.is_served(name) for name in ("model", "org/model", "m")] == [False, False, True]
