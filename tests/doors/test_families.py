"""save_hf_model.py on folders of published families: fake checkpoints in the layout that each family has."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import save_hf_model
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.answers import AnswerReader
from CoDALanguageModel.families import family_of, find_mask_token
from CoDALanguageModel.prompts import Codec
from save_hf_model import convert, main

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, ROWS = 2, 32, 48, 4, 2, 16, 128, 288
END, START_TURN, END_TURN, MASK = 256, 257, 258, 259  # ids: 256 bytes, then these
TOKENS = {END: "<|endoftext|>", START_TURN: "<|im_start|>", END_TURN: "<|im_end|>"}

QWEN_CONFIG = {
    "attention_dropout": 0.0,
    "bos_token_id": END,
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": CONTEXT,
    "max_window_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}
QWEN3_CONFIG = QWEN_CONFIG | {"head_dim": HEAD_DIM, "attention_bias": False}


@dataclasses.dataclass
class Fake:
    """A small checkpoint as a family publishes it, and what has to come of it."""

    config: dict
    """Of config.json."""

    mask: str
    """Text of the mask token."""

    expected: dict
    """Fields of the configuration that is made."""

    flags: dict = dataclasses.field(default_factory=dict)
    """What the folder does not say."""

    names_mask: bool = False
    """Whether the tokenizer says which token is the mask."""

    has_mask: bool = True
    """Whether the tokenizer defines it at all."""

    generation: dict = dataclasses.field(default_factory=dict)
    """Of generation_config.json."""

    layout: str = "qwen"
    """Weight names: qwen's or llada's."""

    slow: bool = False
    """Whether the tokenizer lies there as vocab.json and merges.txt, with code of its own."""

    biases: bool = False
    qk_norm: bool = False
    tied: bool = False
    head_dim: int = WIDTH // HEADS
    kv_heads: int = KV_HEADS
    eps: float = 1e-6
    theta: float = 1000000.0


FULL = {"attention": "full", "block_size": None, "block_origin": "text"}
FAKES = {
    "Dream": Fake(
        QWEN_CONFIG
        | {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK, "pad_token_id": END}
        | {"use_mrope": False},
        "<|mask|>",
        FULL | {"logits_shift": True, "eos_token_id": [END_TURN, END], "pad_token_id": END},
        generation={"eos_token_id": END, "pad_token_id": END, "mask_token_id": MASK, "alg": "origin", "steps": 512},
        slow=True,
        biases=True,
    ),
    "a2d-qwen3 mdlm": Fake(
        QWEN3_CONFIG
        | {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "eos_token_id": END_TURN}
        | {"tie_word_embeddings": True},
        "<|mask|>",
        FULL | {"logits_shift": False},
        {"attention": "full"},
        names_mask=True,
        qk_norm=True,
        tied=True,
        head_dim=HEAD_DIM,
    ),
    "a2d-qwen2 bd3lm": Fake(
        QWEN_CONFIG
        | {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], "tie_word_embeddings": True},
        "<|mask|>",
        {"attention": "block_causal", "block_size": 32, "block_origin": "answer", "logits_shift": False},
        {"attention": "block_causal"},
        names_mask=True,
        biases=True,
        tied=True,
    ),
    "a2d-llama bd3lm": Fake(
        QWEN_CONFIG | {"model_type": "a2d-llama", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5},
        "<|mask|>",
        {"attention": "block_causal", "block_size": 16, "block_origin": "answer", "logits_shift": False},
        {"attention": "block_causal", "block_size": 16},
        eps=1e-5,
    ),
    "sdar": Fake(
        QWEN3_CONFIG
        | {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4, "mask_token_id": MASK}
        | {"fuse_cross_entropy": True},
        "<|MASK|>",
        {"attention": "block_causal", "block_size": 4, "block_origin": "text", "logits_shift": False},
        generation={"eos_token_id": [END_TURN, END], "top_k": 0, "do_sample": True},
        has_mask=False,
        qk_norm=True,
        head_dim=HEAD_DIM,
    ),
    "sdar b8": Fake(  # its config omits the size of a block
        QWEN3_CONFIG | {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "tie_word_embeddings": True},
        "<|MASK|>",
        {"attention": "block_causal", "block_size": 8, "block_origin": "text", "logits_shift": False},
        {"block_size": 8},
        qk_norm=True,
        head_dim=HEAD_DIM,  # and ties what is not tied
    ),
    "Fast_dLLM_Qwen": Fake(
        QWEN_CONFIG
        | {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 32}
        | {"eos_token_id": END_TURN, "pad_token_id": END_TURN, "tie_word_embeddings": True},
        "|<MASK>|",
        {"attention": "block_causal", "block_size": 32, "block_origin": "text", "logits_shift": True}
        | {"eos_token_id": [END_TURN, END], "pad_token_id": END},
        generation={"eos_token_id": [END_TURN, END]},
        biases=True,
        tied=True,
    ),
    "Efficient-DLM": Fake(
        QWEN3_CONFIG | {"model_type": "qwen3", "dlm_type": "llada", "block_size": 16, "mask_token_id": MASK},
        "<|fim_pad|>",
        {"attention": "block_causal", "block_size": 16, "block_origin": "answer", "logits_shift": False},
        qk_norm=True,
        head_dim=HEAD_DIM,
    ),
    "llada": Fake(
        {
            "activation_type": "silu",
            "alibi": False,
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "bias_for_layer_norm": False,
            "block_type": "llama",
            "d_model": WIDTH,
            "embedding_size": ROWS,
            "eos_token_id": END,
            "include_bias": False,
            "include_qkv_bias": False,
            "init_std": 0.02,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": MASK,
            "max_sequence_length": CONTEXT,
            "mlp_hidden_size": INNER,
            "model_type": "llada",
            "multi_query_attention": None,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "n_layers": LAYERS,
            "pad_token_id": END,
            "precision": "amp_bf16",
            "rms_norm_eps": 1e-5,
            "rope": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "vocab_size": ROWS,
            "weight_tying": False,
        },
        "<|mdm_mask|>",
        FULL | {"logits_shift": False, "tie_word_embeddings": False},
        layout="llada",
        kv_heads=HEADS,
        eps=1e-5,
        theta=500000.0,
    ),
}

QWEN_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "last norm": "model.norm.weight",
    "head": "lm_head.weight",
    "norm 1": "model.layers.{}.input_layernorm.weight",
    "norm 2": "model.layers.{}.post_attention_layernorm.weight",
    **{part: f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkvo"},
    **{f"{part} norm": f"model.layers.{{}}.self_attn.{part}_norm.weight" for part in "qk"},
    **{part: f"model.layers.{{}}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
LLADA_NAMES = {
    "embedding": "model.transformer.wte.weight",
    "last norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
    "norm 1": "model.transformer.blocks.{}.attn_norm.weight",
    "norm 2": "model.transformer.blocks.{}.ff_norm.weight",
    **{part: f"model.transformer.blocks.{{}}.{part}_proj.weight" for part in "qkv"},
    "o": "model.transformer.blocks.{}.attn_out.weight",
    "gate": "model.transformer.blocks.{}.ff_proj.weight",
    "up": "model.transformer.blocks.{}.up_proj.weight",
    "down": "model.transformer.blocks.{}.ff_out.weight",
}
NAMES = {"qwen": QWEN_NAMES, "llada": LLADA_NAMES}


def make_weights(fake):
    """Random weights under the names of the family's files."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "norm 1": (WIDTH,),
        "norm 2": (WIDTH,),
        "q": (HEADS * fake.head_dim, WIDTH),
        "k": (fake.kv_heads * fake.head_dim, WIDTH),
        "v": (fake.kv_heads * fake.head_dim, WIDTH),
        "o": (WIDTH, HEADS * fake.head_dim),
        "gate": (INNER, WIDTH),
        "up": (INNER, WIDTH),
        "down": (WIDTH, INNER),
    }
    if fake.qk_norm:
        shapes |= {"q norm": (fake.head_dim,), "k norm": (fake.head_dim,)}
    names = NAMES[fake.layout]
    shapes_by_name = {names[part].format(i): shape for i in range(LAYERS) for part, shape in shapes.items()}
    shapes_by_name |= {names["embedding"]: (ROWS, WIDTH), names["last norm"]: (WIDTH,)}
    if not fake.tied:
        shapes_by_name[names["head"]] = (ROWS, WIDTH)
    if fake.biases:
        projections = [(names[part].format(i), shapes[part][:1]) for i in range(LAYERS) for part in "qkv"]
        shapes_by_name |= {name.replace("weight", "bias"): shape for name, shape in projections}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes_by_name.items()}


def make_tokenizer(fake, folder):
    """A tokenizer of 256 bytes and the control tokens, in the files that the family has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = TOKENS | ({MASK: fake.mask} if fake.has_mask else {})
    if fake.slow:
        (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(alphabet)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        entries = {str(i): {"content": text, "special": True} for i, text in tokens.items()}
        config = {
            "added_tokens_decoder": entries,
            "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]},
            "eos_token": TOKENS[END],
            "pad_token": TOKENS[END],
            "tokenizer_class": "OwnTokenizer",
        }
    else:
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in tokens.values()])
        named = {"mask_token": fake.mask} if fake.names_mask else {}
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=TOKENS[END], pad_token=TOKENS[END], **named
        ).save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_fake(folder, fake, *, weights=None, without=(), **changes):
    """Save a fake checkpoint with code beside it that must not run; give its weights."""
    folder.mkdir(parents=True)
    own = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    config = {k: v for k, v in (fake.config | {"auto_map": own} | changes).items() if k not in without}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text("raise SystemExit('code of the folder ran')\n")
    if fake.generation:
        (folder / "generation_config.json").write_text(json.dumps(fake.generation))
    weights = make_weights(fake) if weights is None else weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer(fake, folder)
    return weights


def rms(x, weight, eps):
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


def rotated(x, theta):
    """Rotary positions in the half-split form; x is (B, H, T, D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def dense_logits(fake, weights, ids, allowed):
    """The family's network written out, with the (T, T) pairs that may attend; reads the names of its files."""
    names = NAMES[fake.layout]

    def get(part, layer=0):
        return weights[names[part].format(layer)]

    def project(x, part, layer):
        bias = weights.get(names[part].format(layer).replace("weight", "bias"))
        return x @ get(part, layer).T + (0 if bias is None else bias)

    x = get("embedding")[ids]
    for layer in range(LAYERS):
        normed = rms(x, get("norm 1", layer), fake.eps)
        q, k, v = (
            project(normed, part, layer).unflatten(-1, (-1, fake.head_dim)).transpose(1, 2) for part in ("q", "k", "v")
        )
        if fake.qk_norm:
            q, k = rms(q, get("q norm", layer), fake.eps), rms(k, get("k norm", layer), fake.eps)
        q, k = rotated(q, fake.theta), rotated(k, fake.theta)
        k, v = (each.repeat_interleave(HEADS // fake.kv_heads, dim=1) for each in (k, v))
        scores = (q @ k.transpose(-1, -2) / fake.head_dim**0.5).masked_fill(~allowed, -torch.inf)
        x = x + project((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), "o", layer)
        normed = rms(x, get("norm 2", layer), fake.eps)
        gated = torch.nn.functional.silu(project(normed, "gate", layer)) * project(normed, "up", layer)
        x = x + project(gated, "down", layer)
    head = get("embedding") if fake.tied else get("head")
    return rms(x, get("last norm"), fake.eps) @ head.T


def pairs(fake, length):
    """Which position may attend to which, one pair after another."""
    size = fake.expected["block_size"] or length
    return torch.tensor([[key // size <= query // size for key in range(length)] for query in range(length)])


def some_ids(length=70):
    ids = torch.arange(2 * length).view(2, length) * 37 % 256
    ids[:, ::3] = MASK
    return ids


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    """Give a function that makes a family's folder once: the fake, its weights, and the path."""
    made = {}

    def make(name):
        if name not in made:
            fake, folder = FAKES[name], tmp_path_factory.mktemp("family")
            weights = write_fake(folder / "source", fake)
            convert(str(folder / "source"), str(folder / "made"), check=False, **fake.flags)
            made[name] = fake, weights, folder / "made"
        return made[name]

    return make


@pytest.fixture(params=FAKES)
def made(request, made_of):
    return made_of(request.param)


def test_a_family_has_its_logits_attention_and_contract(made):
    fake, weights, folder = made
    model = CoDALanguageModel.from_pretrained(folder).eval()
    found = {name: getattr(model.config, name) for name in fake.expected}
    assert found == fake.expected
    assert model.config.mask_token_id == MASK
    ids = some_ids()
    with torch.no_grad():
        logits = model(ids).logits
    expected = dense_logits(fake, weights, ids, pairs(fake, ids.shape[1]))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_its_tokenizer_names_the_mask_and_ends_that_the_model_has(made):
    fake, _, folder = made
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (fake.mask, MASK)
    assert tokenizer.eos_token_id == END_TURN
    assert tokenizer.pad_token_id == END
    assert tokenizer("def f(): pass")["input_ids"] == [
        sorted(pre_tokenizers.ByteLevel.alphabet()).index(c) for c in "def\u0120f():\u0120pass"
    ]
    model = CoDALanguageModel.from_pretrained(folder)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [END_TURN, END]
    is_dream = fake.config["model_type"] == "Dream"  # whose sampler CoDA's is; the others share tokens out evenly
    assert model.generation_config.schedule == ("published" if is_dream else "even")


ALONE = """
import json, sys
sys.modules["CoDALanguageModel"] = None  # an import of the repository's package fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids = load_file(sys.argv[1])["ids"]
logits = {}
for name, folder in json.loads(sys.argv[3]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits[name] = model(input_ids=ids).logits
save_file(logits, sys.argv[2])
"""


def test_every_family_loads_in_a_process_without_this_repository(made_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ids = some_ids()
    save_file({"ids": ids}, tmp_path / "ids")
    folders = json.dumps({name: str(made_of(name)[2]) for name in FAKES})
    command = [sys.executable, "-I", "-c", ALONE, tmp_path / "ids", tmp_path / "logits", folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, logits in load_file(tmp_path / "logits").items():
        fake, weights, _ = made_of(name)
        expected = dense_logits(fake, weights, ids, pairs(fake, ids.shape[1]))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_the_command_makes_a_checked_folder_in_half_precision(tmp_path, capsys, caplog):
    fake = FAKES["sdar b8"]
    write_fake(tmp_path / "source", fake, torch_dtype="bfloat16")
    arguments = ["--checkpoint_dir", str(tmp_path / "source"), "--output_dir", str(tmp_path / "made")]
    with caplog.at_level("INFO"):
        assert main(arguments) == 1
        assert "block_size must be given with --block_size" in capsys.readouterr().err
        assert main([*arguments, "--block_size", "8"]) == 0, capsys.readouterr().err
    assert "same as the source under the attention of SDAR: max difference" in caplog.text
    assert "loaded alone, same logits: max difference" in caplog.text
    assert {w.dtype for w in load_file(tmp_path / "made/model.safetensors").values()} == {torch.bfloat16}


def test_a_folder_that_names_no_number_format_keeps_that_of_its_weights(tmp_path):
    fake = FAKES["llada"]
    weights = {name: weight.bfloat16() for name, weight in make_weights(fake).items()}
    write_fake(tmp_path / "source", fake, weights=weights, attn_implementation="flash_attention_2")
    assert convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False).dtype == torch.bfloat16


def test_an_adapter_trains_on_a_family_as_on_every_model(made_of):
    fake, _, folder = made_of("Fast_dLLM_Qwen")
    model = CoDALanguageModel.from_pretrained(folder)
    ids = some_ids(40) % MASK
    base = model(ids, labels=ids).loss.item()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert adapted(input_ids=ids, labels=ids).loss.item() == pytest.approx(base)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < base - 0.1


def test_a_published_mask_is_added_in_its_place_and_never_another_token_of_its_id(tmp_path):
    fake = dataclasses.replace(FAKES["Fast_dLLM_Qwen"], has_mask=False)
    make_tokenizer(fake, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    family = family_of(fake.config)
    following = dataclasses.replace(family, mask_token_id=MASK)
    assert find_mask_token(following, fake.config, tokenizer, ROWS, None) == "|<MASK>|"
    for taken_or_far in (END_TURN, MASK + 1):
        other = dataclasses.replace(family, mask_token_id=taken_or_far)
        with pytest.raises(ValueError, match=f"has the id {taken_or_far}, as it is published: the tokenizer must"):
            find_mask_token(other, fake.config, tokenizer, ROWS, None)


@pytest.mark.parametrize("name", FAKES)
def test_the_server_gives_the_answers_of_the_model(name, made_of, ask_server):
    folder = made_of(name)[2]
    model, codec = CoDALanguageModel.from_pretrained(folder).eval(), Codec.load(str(folder))
    no_bytes = [*range(94, 256)]  # which are no whole characters
    shared = {"steps": 12, "suppress_tokens": no_bytes}
    prompts = ["x", "def add(a, b):\n    return a + b"]
    asked = [{"prompt": text, "max_tokens": 20, "temperature": 0, "alg_temp": "none", **shared} for text in prompts]
    for text, response in zip(prompts, ask_server(folder, asked), strict=True):
        ids = codec.encode_text(text)
        output = model.diffusion_generate(
            torch.tensor([ids]), max_new_tokens=20, temperature=0.0, alg_temp=None, **shared
        )
        ends = frozenset({END_TURN, END})
        reader = AnswerReader(decode=codec.decode, mask_token_id=MASK, eos_token_ids=ends, prompt_ids=ids)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == reader.read(output[0, len(ids) :].tolist()).text
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
    (response,) = ask_server(folder, [chat], "/v1/chat/completions")
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("wrong", [{"attention": "full", "block_size": None}, {"block_size": 8}])
def test_a_model_that_attends_otherwise_than_its_family_is_not_written(wrong, tmp_path, monkeypatch):
    write_fake(tmp_path / "source", FAKES["sdar"])
    build = save_hf_model.build_model
    monkeypatch.setattr(save_hf_model, "build_model", lambda source, tokenizer, s: build(source, tokenizer, s | wrong))
    with pytest.raises(ValueError, match="differ from the source's under the attention of SDAR; nothing written"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)


REFUSED = {
    # the family, what its config.json says otherwise (None: nothing), what is asked for, the error
    "no attention": ("a2d-qwen3 mdlm", {}, {}, "attention must be given with --attention, full or block_causal"),
    "blocks of full": ("Dream", {}, {"block_size": 4}, "go with --attention block_causal alone, got block_size 4"),
    "other attention": (
        "Dream",
        {},
        {"attention": "block_causal"},
        "--attention must be full, as the Dream family has",
    ),
    "full of blocks": (
        "sdar",
        {},
        {"attention": "full"},
        "--attention must be block_causal, as the SDAR family has, got",
    ),
    "no block size": ("sdar", {"block_size": None}, {}, "--block_size, .* its config.json has no block_size"),
    "no bd_size": ("Fast_dLLM_Qwen", {"bd_size": None}, {}, "--block_size, .* its config.json has no bd_size"),
    "other block size": (
        "sdar",
        {},
        {"block_size": 8},
        "--block_size must be 4, as block_size in config.json says, got 8",
    ),
    "bad block size": ("sdar", {"block_size": "4"}, {}, r"block_size must be in \[1, max_position_embeddings=128\]"),
    "other origin": (
        "sdar",
        {},
        {"block_origin": "answer"},
        "--block_origin must be text, as the SDAR family has, got",
    ),
    "Dream of blocks": ("Dream", {"block_size": 32}, {}, "block_size in config.json must be absent for a Dream model"),
    "dlm_type": (
        "Efficient-DLM",
        {"dlm_type": "x"},
        {},
        "dlm_type in config.json must be one of llada, dream, got 'x'",
    ),
    "layer norm": (
        "llada",
        {"layer_norm_type": "default"},
        {},
        "layer_norm_type in config.json must be 'rms' for a LLa",
    ),
    "biases": (
        "llada",
        {"include_bias": True},
        {},
        "include_bias in config.json must be False, absent for a LLaDA",
    ),
    "experts": ("llada", {"num_experts": 64}, {}, "num_experts must be absent .* got 64: experts have no place here"),
    "images": ("Dream", {"vision_config": {"a": 1}}, {}, "vision_config must be absent .* images have no place here"),
    "windows": (
        "sdar",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {},
        "windows must be",
    ),
    "rope": (
        "sdar",
        {"rope_scaling": {"type": "mrope"}},
        {},
        "rope_scaling.type must be one of default, linear, .*, got 'mrope'",
    ),
    "no rope": ("sdar", {"rope_scaling": [1]}, {}, r"rope_scaling must be an object or null, got \[1\]"),
    "activation": ("sdar", {"hidden_act": "nope"}, {}, "hidden_act must be one of gelu, .*, got 'nope'"),
    "no activation": ("Dream", {"hidden_act": 3}, {}, "hidden_act must be the name of an activation, got 3"),
    "no precision": ("Dream", {"torch_dtype": "nope"}, {}, "torch_dtype must be one of float64, .*, got 'nope'"),
    "no number": ("llada", {"n_heads": "x"}, {}, "num_attention_heads must be an integer, got 'x'"),
    "no theta": ("sdar", {"rope_theta": None}, {}, "config.json of a SDAR model must hold rope_theta"),
    "no width": ("llada", {"d_model": None}, {}, "config.json of a LLaDA model must hold d_model"),
    "quantised": ("sdar", {"quantization_config": {"quant_method": "gptq"}}, {}, "says quant_method 'gptq'"),
    "other mask": (
        "Dream",
        {},
        {"mask_token": "<|im_end|>"},
        r"--mask_token must be '<\|mask\|>' \(id 259\), as config",
    ),
    "mask without row": (
        "sdar",
        {"mask_token_id": 400},
        {},
        "the mask token has the id 400, as config.json says: .* 288",
    ),
    "mask gone": (
        "Fast_dLLM_Qwen",
        {},
        {"tokenizer_dir": "bare"},
        "has the id 151665, as it is published: the tokenizer",
    ),
    "mask unknown": (
        "a2d-llama bd3lm",
        {},
        {"tokenizer_dir": "bare", "attention": "full"},
        "--mask_token must name the",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_or_is_not_known_is_refused_by_name(case, tmp_path, monkeypatch):
    name, changes, asked, message = REFUSED[case]
    fake = FAKES[name]
    write_fake(tmp_path / "source", fake, without=[key for key, value in changes.items() if value is None], **changes)
    if "tokenizer_dir" in asked:
        (tmp_path / "bare").mkdir()
        make_tokenizer(dataclasses.replace(fake, has_mask=False, names_mask=False), tmp_path / "bare")
        asked = asked | {"tokenizer_dir": str(tmp_path / "bare")}
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))
    with pytest.raises(ValueError, match=message) as caught:
        convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False, **asked)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("sdar", "Dream", "4 missing keys: .*k_norm.weight.* 6 unexpected keys: .*k_proj.bias"),
        ("Dream", "sdar", "6 missing keys: .*k_proj.bias.* 4 unexpected keys: .*k_norm.weight"),
        ("llada", "a2d-llama bd3lm", "mismatched keys: .*k_proj.weight"),
        ("sdar", "llada", "missing keys: .*unexpected keys: .*model.transformer.blocks"),
    ],
)
def test_weights_of_another_family_are_refused_by_name(name, other, message, tmp_path):
    write_fake(tmp_path / "source", FAKES[name], weights=make_weights(FAKES[other]))
    with pytest.raises(ValueError, match=f"source' do not fit its config.json: .*{message}"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False, **FAKES[name].flags)
