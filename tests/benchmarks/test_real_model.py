"""`benchmarks/real_model.py` on a random model in a GGUF file: each stage, what is kept, and what is refused."""

import functools
import importlib
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

WIDTH, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96
PROBLEMS = [("add", "a + b"), ("mul", "a * b"), ("sub", "a - b")]


@pytest.fixture(autouse=True)
def _benchmarks(repo, monkeypatch):
    for folder in (repo, repo / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))


def write_gguf(path, tokenizer):
    """A random Qwen2 in 8 bits, its head apart; gives its tensors as they read back."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import dequantize, quantize

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    known = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    special = {token["id"] for token in description["added_tokens"]}
    writer = GGUFWriter(path, "qwen2")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([known[id_] for id_ in range(len(known))])
    writer.add_token_types([TokenType.CONTROL if id_ in special else TokenType.NORMAL for id_ in range(len(known))])
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    generator = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(known), WIDTH), "output.weight": (len(known), WIDTH)}
    for layer in range(LAYERS):
        of_layer = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH)}
        of_layer |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
        of_layer |= {"ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        for name, size in (("attn_q", WIDTH), ("attn_k", kv), ("attn_v", kv)):
            writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(size, np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    read = {}
    for name, shape in shapes.items():
        kind, values = GGMLQuantizationType.Q8_0, generator.normal(0, 0.5, shape).astype(np.float32)
        if name == "output.weight":  # what is no text is written by transformers' own class alone
            values[sorted(special)] = 0
        values = quantize(values, kind)
        writer.add_tensor(name, values, raw_dtype=kind)
        read[name] = dequantize(values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def write_problems(folder):
    rows, gaps = [], []
    for number, (name, body) in enumerate(PROBLEMS):
        prompt, solution = f'def {name}(a, b):\n    """Give {body}."""\n', f"    return {body}\n"
        test = f"def check(candidate):\n    assert candidate(3, 2) == {eval(body, {'a': 3, 'b': 2})}\n"
        row = {"task_id": f"HumanEval/{number}", "prompt": prompt, "entry_point": name, "test": test}
        rows.append(row | {"canonical_solution": solution})
        gap = {"task_id": f"SingleLineInfilling/HumanEval/{number}/L0", "suffix": "", "canonical_solution": solution}
        gaps.append(row | gap)
    for file, content in (("HumanEval", rows), ("HumanEval-SingleLineInfilling", gaps)):
        (folder / f"{file}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content))


def test_every_stage_of_a_random_model_in_a_gguf_file(tmp_path, monkeypatch, chatml_tokenizer):
    import real_model
    from gpu import adaptation, section
    from gpu.section import Section
    from real import model, roads, serving, task
    from real.stages import STAGES

    from serving import thread

    given = tmp_path / "random.gguf"
    (tmp_path / "adapt").mkdir()
    weights = write_gguf(given, chatml_tokenizer)
    write_problems(tmp_path)
    monkeypatch.setenv("CODA_EVAL_DATA", str(tmp_path))
    monkeypatch.setattr(model, "convert", functools.partial(model.convert, check=False))
    monkeypatch.setattr(serving, "process", lambda checkout, folder, variables: thread(folder, variables))
    monkeypatch.setattr(serving, "ANSWER_TOKENS", 8)
    for name, value in (("NEW_TOKENS", 12), ("GAP_TOKENS", 12), ("CHUNK", 2)):
        monkeypatch.setattr(roads, name, value)
    said = []
    for module in (task, section, adaptation):
        monkeypatch.setattr(module, "emit", lambda facts: said.append(json.loads(json.dumps(facts))))
    whole = task.Task(given, tmp_path, None, real_model.hash_of(given))

    def measured(stage):
        said.clear()
        module, _, function = STAGES[stage].function.partition(":")
        getattr(importlib.import_module(f"real.{module}"), function)(whole, *STAGES[stage].arguments)
        return {row.get("_id", place): row for place, row in enumerate(said)}

    (source,) = measured("source").values()
    assert source["tensors"] == "16 Q8_0, 11 F32"
    from safetensors.torch import load_file

    read = load_file(tmp_path / "source" / "model.safetensors")
    assert torch.equal(read["lm_head.weight"], torch.from_numpy(weights["output.weight"]))
    assert torch.equal(read["model.layers.1.mlp.down_proj.weight"], torch.from_numpy(weights["blk.1.ffn_down.weight"]))
    exact, rounded = measured("conversion").values()
    assert exact["difference"] < 1e-5
    assert rounded["difference"] < 0.05
    assert exact["nats_a_token"] == pytest.approx(exact["ours"])
    rows = list(measured("greedy").values())
    assert len(rows) == 9
    assert [row for row in rows if row["equal"] != row["tokens"]] == []
    found = measured("humaneval")
    assert found["both"]["problems"] == found["both"]["equal_answers"] == found["both"]["equal_verdicts"] == 3
    assert found["hf"]["problems"] == 3
    assert found["coda"]["new_tokens"] > 3
    (gaps,) = measured("infilling").values()
    assert gaps["problems"] == 3
    assert [row["texts_as_alone"] for row in measured("serving").values()] == [8, 8]
    if not torch.cuda.is_available():
        assert "no GPU" in measured("adaptation")[0]["skipped"]
    said.clear()
    adaptation.adaptation(Section(torch.device("cpu"), True, whole.source, time.monotonic() + 600, tmp_path / "adapt"))
    assert not [row for row in said if "error" in row]
    assert [row["when"] for row in said if row.get("what") == "infilling"][1:] == ["before", "after"]
    monkeypatch.setattr(roads.run, "load_model", None)  # all answers are there
    assert measured("humaneval")["both"] == found["both"]


def test_a_broken_model_is_refused_by_the_first_stage(tmp_path, chatml_tokenizer):
    from real import model, task

    from CoDALanguageModel import UserError

    def refused(given):
        with pytest.raises(UserError) as error:
            model.source(task.Task(given, tmp_path / "work", None, "k"))
        return str(error.value)

    (tmp_path / "work").mkdir()
    write_gguf(tmp_path / "cut.gguf", chatml_tokenizer)
    whole = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    assert "cut.gguf' is not a whole GGUF file" in refused(tmp_path / "cut.gguf")
    (tmp_path / "page.gguf").write_text("<html>")
    assert "page.gguf' is not a GGUF file" in refused(tmp_path / "page.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    for kind, message in (
        ("gpt2", "model_type must be one of .*, got 'gpt2'"),
        ("sdar", "the model must be autoregressive, one of qwen3, "),
        ("llama", "folder' holds no weights: model.safetensors"),
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert re.search(message, refused(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "folder' holds no tokenizer" in refused(folder)
    assert not (tmp_path / "work" / "source").exists()


def test_a_stage_that_is_given_a_bad_model_says_so_in_a_line(repo, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    command = [sys.executable, repo / "benchmarks" / "real_model.py", tmp_path, "--worker", "source"]
    given = f"{time.monotonic() + 600}\n"
    done = subprocess.run([*command, "--work", tmp_path / "work"], input=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: model_type must be one of" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_a_stage_measured_stays_and_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    import real_model
    from gpu.__main__ import READY
    from gpu.report import RECORD
    from real.results import Results

    def program(body):
        head = f"import json, sys, time; print({READY!r}, flush=True); sys.stdin.readline()\n"
        return [sys.executable, "-c", f"{head}say = lambda **x: print({RECORD!r} + json.dumps(x), flush=True)\n{body}"]

    results = Results("tiny", tmp_path / "work", tmp_path / "out", "k")
    real_model.run("source", program("say(a=1)"), results, "x", 20.0)
    real_model.run("greedy", program("say(_id='k', b=1); say(c=1); raise ValueError('none')"), results, "x", 20.0)
    started = time.monotonic()
    real_model.run("serving", program("say(_id='k', d=1); say(_id='k', d=2); time.sleep(60)"), results, "x", 4.0)
    assert time.monotonic() - started < 30
    assert results.is_done("source", "x")
    assert not results.is_done("source", "y")
    kept = json.loads((tmp_path / "out" / "real_model.json").read_text())["tiny"]
    assert [(stage, rows["measurements"]) for stage, rows in kept.items()] == [
        ("source", [{"a": 1}]),
        ("greedy", [{"_id": "k", "b": 1}, {"c": 1}]),
        ("serving", [{"_id": "k", "d": 2}]),
    ]
    assert kept["greedy"]["outcome"] == "failed with status 1"
    assert kept["serving"]["outcome"].startswith("killed after")
    real_model.run("greedy", program("say(_id='k', b=2)"), results, "x", 20.0)
    assert results.stage("greedy")["measurements"] == [{"_id": "k", "b": 2}]
    real_model.run("adaptation", program("say(skipped='no GPU')"), results, "x", 20.0)
    assert not results.is_done("adaptation", "x")  # another machine may have one
    other = Results("other", tmp_path / "else", tmp_path / "out", "k")
    real_model.run("source", program("say(a=3)"), other, "x", 20.0)
    assert list(json.loads((tmp_path / "out" / "real_model.json").read_text())) == ["tiny", "other"]
    text = (tmp_path / "out" / "real_model.md").read_text()
    assert "## tiny" in text
    assert "- not measured, 1: no GPU" in text
    assert "ValueError" not in text
    assert not Results("tiny", tmp_path / "work", tmp_path / "out", "another model").stage("source")


def test_stages_depend_on_the_content_of_the_model_and_on_their_limit(tmp_path):
    import real_model

    (tmp_path / "a").write_bytes(b"1")
    before = real_model.hash_of(tmp_path / "a"), real_model.hash_of(tmp_path)
    (tmp_path / "a").write_bytes(b"2")
    after = real_model.hash_of(tmp_path / "a"), real_model.hash_of(tmp_path)
    assert not set(before) & set(after)
    assert real_model.stamp_of("greedy", "x", 3) == real_model.stamp_of("greedy", "x", None)
    assert real_model.stamp_of("mbpp", "x", 3) != real_model.stamp_of("mbpp", "x", None)
    assert real_model.stamp_of("mbpp", "x", 3) != real_model.stamp_of("humaneval", "x", 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stages", "source,speed"], "--stages must be some of source,.* got speed"),
        (["--time_limit", "greedy=2"], "--time_limit must be STAGE=SECONDS .* got 'greedy=2'"),
        (["--limit", "0"], "--limit must be a positive integer, got 0"),
        (["--stages", "greedy"], "--stages must hold source"),
        ([], "must be a .gguf file or a folder with a config.json"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, capsys, given, message):
    import real_model

    (tmp_path / "model").mkdir()
    if given:
        (tmp_path / "model" / "config.json").write_text("{}")
    places = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit):
        real_model.main([str(tmp_path / "model"), *given, *places])
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_without_its_package_says_what_to_install(tmp_path, capsys, monkeypatch):
    import real_model

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        real_model.main([str(tmp_path / "m.gguf"), "--output", str(tmp_path / "out")])
    assert "pip install 'gguf>=0.17'" in capsys.readouterr().err
