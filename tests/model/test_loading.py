import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import CoDALanguageModel as package
from CoDALanguageModel import CoDAConfig, CoDALanguageModel, DiffusionGenerationConfig
from CoDALanguageModel.config_fields import ROPE_NEEDS
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.weight_files import check_weights, read_tokenizer, refuse_not_finite, weight_files

REPOSITORY = Path(__file__).parents[2]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LEGACY = {
    "sampling_eps": 0.001,
    "mask_block_sizes": [2, 4, 8],
    "prefix_probability": 0.01,
    "attention_kernel": "splash",
}


def write_published(folder, model, *, without=(), **changes):
    """The model as the published checkpoint is written: two shards, an index, a config with training keys."""
    weights = {key: value.clone() for key, value in model.state_dict().items() if key not in without}
    names = sorted(weights)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**model.config.to_dict(), **LEGACY}
    del config["tie_word_embeddings"]
    config["auto_map"] = {
        "AutoConfig": "model_config.CoDAConfig",
        "AutoModel": "modeling_coda.CoDALanguageModel",
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def is_tied(model):
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["no tie key", "tie key true"])
def test_a_head_that_differs_from_the_embedding_survives_loading_whatever_the_config_says(
    changes, model, tmp_path, tokens
):
    write_published(tmp_path, model, **changes)
    loaded = CoDALanguageModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert not is_tied(loaded)
    assert loaded.config.tie_word_embeddings is False
    loaded.save_pretrained(tmp_path / "again")  # and it stays so
    again = CoDALanguageModel.from_pretrained(tmp_path / "again")
    assert same_weights(again, model)
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


@pytest.mark.parametrize("tie", [None, True, False])
def test_an_absent_head_is_the_embedding(tie, make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    write_published(tmp_path, model, without=[HEAD], **({} if tie is None else {"tie_word_embeddings": tie}))
    loaded = CoDALanguageModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert is_tied(loaded)


def test_a_tied_checkpoint_that_holds_both_weights_stays_tied(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    write_published(tmp_path, model, tie_word_embeddings=True)
    loaded = CoDALanguageModel.from_pretrained(tmp_path)
    assert is_tied(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert HEAD not in load_file(tmp_path / "again/model.safetensors")
    assert is_tied(CoDALanguageModel.from_pretrained(tmp_path / "again"))


def test_an_equal_head_stays_untied_where_the_config_does_not_tie(make_model, tmp_path):
    write_published(tmp_path, make_model(tie_word_embeddings=True), tie_word_embeddings=False)
    assert not is_tied(CoDALanguageModel.from_pretrained(tmp_path))


def test_a_tied_model_trains_as_one_weight_after_loading(make_model, tmp_path, tokens):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = CoDALanguageModel.from_pretrained(tmp_path)
    ids = tokens(1, 4)
    loaded(ids, labels=ids).loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"1 missing keys: \['model.norm.weight'\]"),
        (lambda w: w.update(extra=torch.zeros(2)), r"1 unexpected keys: \['extra'\]"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(7)}),
            r"1 mismatched keys: .*model.norm.weight \(7,\) instead of \(32,\)",
        ),
        (lambda w: w.pop(EMBEDDING), r"1 missing keys: \['model.embed_tokens.weight'\]"),
        (lambda w: [w.pop(EMBEDDING), w.pop(HEAD)], "embed_tokens.weight"),
    ],
    ids=["missing", "unexpected", "misshapen", "no embedding", "neither embedding nor head"],
)
def test_weights_that_do_not_fit_are_an_error_that_names_them_and_the_folder(change, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        CoDALanguageModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3441185608\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", LFS_POINTER, "model.safetensors' is a Git LFS pointer, not the file itself"),
        ("model.safetensors", lambda whole: whole[: len(whole) * 2 // 3], "is not a whole safetensors file, download"),
        ("model.safetensors", b"", "is not a whole safetensors file, download it again"),
        ("config.json", b'{"quantization_config": {"quant_method": "awq"}}', "quantised weights are not supported"),
        ("config.json", LFS_POINTER, "config.json' is a Git LFS pointer"),
        ("config.json", b"[]", "config.json' must hold a JSON object, got list"),
    ],
)
def test_broken_files_are_an_error_that_names_them_before_anything_is_loaded(file, content, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        CoDALanguageModel.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_8_bits_are_refused_and_not_taken_for_numbers(model, tmp_path):
    model.save_pretrained(tmp_path)
    for dtype, name in [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]:
        change_weights(tmp_path, lambda w, dtype=dtype: w.update({HEAD: torch.ones(72, 32).to(dtype)}))
        with pytest.raises(ValueError, match=f"quantised weights are not supported: {HEAD} in .* is {name}"):
            CoDALanguageModel.from_pretrained(tmp_path)


def test_broken_shards_and_pytorch_files_are_named(model, tmp_path):
    write_published(tmp_path, model)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors' is missing, which its index names"):
        check_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(ValueError, match="model.safetensors.index.json' is not valid JSON"):
        check_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    check_weights(tmp_path)
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin' is not a whole PyTorch file"):
            check_weights(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check_weights(tmp_path)


def test_weights_that_are_not_finite_are_named(make_model):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^here: weights are not finite: model\.norm\.weight, lm_head\.weight$"):
        refuse_not_finite(model.named_parameters(), "here")
    refuse_not_finite(model.to("meta").named_parameters(), "another process has them")


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing/at/all"):
        with pytest.raises(ValueError, match="no model folder at .*nothing"):
            CoDALanguageModel.from_pretrained(path)


def test_weights_that_are_given_need_no_folder(model, tokens):
    loaded = CoDALanguageModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    for given in ({}, {"config": model.config}, {"state_dict": model.state_dict()}):
        with pytest.raises(ValueError, match="reads no folder: give config and state_dict"):
            CoDALanguageModel.from_pretrained(None, **given)


def test_weights_that_are_given_say_whether_the_head_is_the_embedding(make_model):
    for ties in (False, True):
        weights = make_model(seed=1).state_dict()
        config = make_model(tie_word_embeddings=ties).config
        loaded = CoDALanguageModel.from_pretrained(None, config=config, state_dict=weights)
        assert not is_tied(loaded)
        assert not loaded.config.tie_word_embeddings
        del weights["lm_head.weight"]
        config = make_model(tie_word_embeddings=ties).config
        loaded = CoDALanguageModel.from_pretrained(None, config=config, state_dict=weights)
        assert is_tied(loaded)
        assert loaded.config.tie_word_embeddings


def test_loading_information_is_returned_when_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = CoDALanguageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert same_weights(loaded, model)
    assert not info["missing_keys"]


def test_arguments_of_the_configuration_and_of_loading_pass_through(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = CoDALanguageModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", attention_dropout=0.25
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.attention_dropout == 0.25
    config = CoDAConfig.from_pretrained(tmp_path, rms_norm_eps=0.5)
    assert CoDALanguageModel.from_pretrained(tmp_path, config=config).model.norm.variance_epsilon == 0.5


def test_token_ids_and_decoding_settings_survive_saving_and_loading(make_model, tmp_path):
    model = make_model(eos_token_id=[65, 64])
    model.generation_config = DiffusionGenerationConfig(steps=7, temperature=0.1, top_p=0.9, block_length=4)
    model.save_pretrained(tmp_path)
    loaded = CoDALanguageModel.from_pretrained(tmp_path)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    ids = [getattr(loaded.config, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")]
    assert ids == [64, [65, 64], 66, 67]


# ---- the folder alone, without this repository

ISOLATED = """
import importlib.abc, json, os, sys
folder, again, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

class Blocker(importlib.abc.MetaPathFinder):  # an editable installation may make the repository importable
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "CoDALanguageModel":
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
try:
    import CoDALanguageModel
    raise SystemExit("the repository can be imported: this test proves nothing")
except ModuleNotFoundError:
    pass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline
torch.set_num_threads(1)
report = {}
settings = {"max_new_tokens": 6, "steps": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3}
for auto in (AutoModel, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    report[auto.__name__] = model.generate(torch.tensor(prompt), **settings).tolist()
report["class"] = type(model).__module__.split(".")[0]
report["default_steps"] = model.generation_config.steps
model.save_pretrained(again)
report["files"] = sorted(os.listdir(again))
third = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
report["again"] = third.diffusion_generate(torch.tensor(prompt), **settings).tolist()
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
report["fresh"] = list(fresh(torch.tensor(prompt)).logits.shape)
masked = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
report["masked"] = [type(masked).__name__, bool(torch.equal(masked.lm_head.weight, model.lm_head.weight))]
print(json.dumps(report))
"""


def test_a_saved_folder_loads_and_generates_in_a_process_without_this_repository(model, tmp_path, tokens, monkeypatch):
    folder, prompt = tmp_path / "saved", tokens(2, 5)
    model.save_pretrained(folder)
    # What programs here need and a folder of weights does not.
    programs = {"__init__", "__main__", "agreement", "answers", "conversion", "families", "intervals", "noise"}
    programs |= {"canvas_view", "fill_tokens", "objectives", "prompts", "sample"}
    code_files = {file.stem for file in (REPOSITORY / "CoDALanguageModel").glob("*.py")} - programs
    assert {file.stem for file in folder.glob("*.py")} == code_files
    # The copy lies elsewhere, so that no path in it can lead back.
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, tmp_path / "moved", tmp_path / "again", json.dumps(prompt.tolist())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    want = model.generate(prompt, max_new_tokens=6, steps=6, temperature=0.8, top_p=0.9, seed=3).tolist()
    assert report["AutoModel"] == report["AutoModelForCausalLM"] == report["again"] == want
    assert report["class"] == "transformers_modules"
    assert report["fresh"] == [2, 5, 72]
    assert report["masked"] == ["CoDAForMaskedLM", True]
    assert report["files"] == sorted(file.name for file in folder.iterdir())


TOKENIZER_ALONE = """
import builtins, sys
from transformers import AutoTokenizer

asked = []

def no_answer(question):
    asked.append(question)
    raise EOFError

builtins.input = no_answer
for said in ({"trust_remote_code": False}, {}):
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **said)
    ids = tokenizer("def")["input_ids"]
    print(len(asked), ids, [name for name in sys.modules if name.startswith(("transformers_modules", "CoDA"))])
"""


def test_the_tokenizer_of_a_folder_needs_none_of_its_code_and_asks_for_none_when_told(
    make_model, chatml_tokenizer, tmp_path
):
    make_model(vocab_size=303).save_pretrained(tmp_path)
    chatml_tokenizer.save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-I", "-c", TOKENIZER_ALONE, tmp_path], capture_output=True, text=True, timeout=120
    )
    ids = chatml_tokenizer("def")["input_ids"]
    # Untold it reads the configuration first and asks whether that code may run; see `auto_map` of `CoDAConfig`.
    assert result.stdout.splitlines() == [f"0 {ids} []", f"1 {ids} []"], result.stderr


def test_every_name_of_the_package_is_listed_and_comes_from_its_module():
    for name in package.__all__:
        thing = getattr(package, name)
        assert (thing.__name__, thing.__module__.partition(".")[0]) == (name, "CoDALanguageModel")
    assert set(dir(package)) >= set(package.__all__)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": "\xff"}'])
def test_settings_that_cannot_be_read_are_not_taken_for_none(make_model, tmp_path, content):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(UserError, match="generation_config.json' (is not valid JSON|must hold a JSON object)"):
        CoDALanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", "32", "hidden_size must be an integer, got '32'"),
        ("num_token_ids", "68", r"num_token_ids must be in \[1, vocab_size=72\], got 68"),
        ("eos_token_id", "x", r"eos_token_id must be in \[0, vocab_size=72\), got 'x'"),
        ("eos_token_id", 1.5, r"eos_token_id must be in \[0, vocab_size=72\), got 1.5"),
        ("pad_token_id", True, r"pad_token_id must be in \[0, vocab_size=72\), got True"),
        ("head_dim", True, "head_dim must be an integer or null, got True"),
        ("hidden_act", None, "hidden_act must be the name of an activation, got None"),
        ("hidden_act", ["silu"], r"hidden_act must be the name of an activation, got \['silu'\]"),
        ("hidden_act", "sillu", "hidden_act must be one of gelu, .*silu.*, got 'sillu'; did you mean 'silu'"),
        ("dtype", "float31", "dtype must be one of float64, float32, bfloat16, float16 or null, got 'float31'"),
        ("dtype", 3, "dtype must be one of .*, got 3"),
        ("dtype", [], r"dtype must be one of .*, got \[\]"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps must be a number > 0, got '1e-6'"),
        ("rms_norm_eps", 10**400, "rms_norm_eps must be a number > 0, got 1000"),
        ("attention_dropout", 1, r"attention_dropout must be a number in \[0, 1\), got 1"),
        ("qk_norm", "yes", "qk_norm must be true or false, got 'yes'"),
        ("rope_parameters", 3, "rope_parameters must be an object or null, got 3"),
        ("rope_parameters", [], r"rope_parameters must be an object or null, got \[\]"),
        ("rope_parameters", {"rope_type": "x"}, "rope_parameters.rope_type must be one of default, .*, got 'x'"),
        ("rope_parameters", {"rope_type": ["x"]}, r"rope_parameters.rope_type must be one of .*, got \['x'\]"),
        ("rope_parameters", {"rope_type": "linear"}, "rope_parameters with rope_type 'linear' must hold factor, got"),
        ("rope_parameters", {"type": "dynamic", "factor": "2"}, "rope_parameters.factor must be a number > 0 or null"),
        ("rope_parameters", {"rope_theta": "1e6"}, "rope_parameters.rope_theta must be a number > 0, got '1e6'"),
        ("rope_parameters", {"full_attention": {}}, "must say the same for all layers, .* for 'full_attention'"),
        ("rope_scaling", "linear", "rope_scaling must be an object or null, got 'linear'"),
        ("rope_theta", [1], r"rope_theta must be a number > 0 or null, got \[1\]"),
        ("layer_types", ["sliding_attention", "full_attention"], "layer_types must be 'full_attention' alone, or left"),
        ("architectures", 3, "architectures must be a list of names or null, got 3"),
        ("model_type", "qwen3", "model_type must be 'CoDA', got 'qwen3': save_hf_model.py makes"),
        ("model_type", [], r"model_type must be 'CoDA', got \[\]"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(make_model, tmp_path, name, value, message):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=message) as caught:
        CoDALanguageModel.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_fields_that_may_be_null_or_left_out_are_not_missed(make_model, tmp_path, tokens):
    make_model(head_dim=8, num_key_value_heads=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    nothing = dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta", "dtype", "head_dim", "layer_types"))
    (tmp_path / "config.json").write_text(json.dumps(config | nothing | {"num_key_value_heads": None}))
    loaded = CoDALanguageModel.from_pretrained(tmp_path).eval()
    assert loaded.config.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000.0}
    assert torch.isfinite(loaded(tokens(1, 5)).logits).all()


def test_every_kind_of_rotary_positions_that_is_allowed_is_computed(make_model, tokens):
    own = {"linear": {}, "dynamic": {}, "yarn": {"attention_factor": None}, "default": {}}
    own |= {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
    own |= {"longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}
    assert own.keys() == ROPE_NEEDS.keys()
    for kind, values in own.items():
        rope = {"rope_type": kind, "rope_theta": 1e4, **({} if kind == "default" else {"factor": 2.0}), **values}
        assert torch.isfinite(make_model(rope_parameters=rope)(tokens(1, 5)).logits).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "tokenizer.json' must hold a JSON object, got list"),
        ("", "tokenizer.json' is not valid JSON"),
        ("hello", "tokenizer.json' is not valid JSON"),
        ("[" * 100_000, "tokenizer.json' is not valid JSON"),
        ("{}", "no tokenizer can be loaded: KeyError: 'added_tokens'"),
        ('{"added_tokens": 3}', "no tokenizer can be loaded: TypeError: 'int' object is not iterable"),
        ('{"added_tokens": [], "model": 3}', "no tokenizer can be loaded: .*ModelUntagged"),
    ],
)
def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path, chatml_tokenizer, content, message):
    chatml_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_beside_a_broken_configuration_is_told_by_the_field(make_model, chatml_tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    chatml_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("rope_parameters", 3), ("dtype", "nope"), ("hidden_act", 3)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=f"^{name} must be .*, got {value!r}"):
            read_tokenizer(tmp_path)


def test_tokens_that_are_added_can_come_out_and_rows_that_pad_cannot(make_model, tmp_path, tokens):
    model = make_model(eos_token_id=None)
    model.generation_config.num_token_ids = 68  # as a folder's file says
    model.resize_token_embeddings(78, pad_to_multiple_of=16)
    model.save_pretrained(tmp_path)
    model = CoDALanguageModel.from_pretrained(tmp_path)
    assert (model.config.vocab_size, model.config.num_token_ids) == (80, 78)
    text = model.diffusion_generate(tokens(1, 4), max_new_tokens=4, steps=4, logit_bias={77: 1000.0})
    assert text[0, 4:].tolist() == [77] * 4


def test_a_tokenizer_is_read_without_a_word_about_the_type_of_its_model(make_model, chatml_tokenizer, tmp_path):
    make_model(vocab_size=303).save_pretrained(tmp_path)
    chatml_tokenizer.save_pretrained(tmp_path)
    program = f"from CoDALanguageModel.weight_files import read_tokenizer; read_tokenizer({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, "instantiate a model" in result.stderr) == (0, False), result.stderr


def test_a_folder_whose_small_files_are_no_objects_is_refused_before_a_loader_falls_over_it(tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(UserError, match=f"{name}' must hold a JSON object, got list"):
            read_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(UserError, match="has no weight_map"):
        weight_files(tmp_path)
