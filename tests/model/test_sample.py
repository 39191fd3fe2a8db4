"""Facts of sampling from the shell: views, recordings, gaps and options."""

import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from CoDALanguageModel import CoDAConfig, DiffusionGenerationConfig
from CoDALanguageModel.cost import DecodingCost
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.tools.folder import load
from CoDALanguageModel.tools.recording import Recording, token_texts
from CoDALanguageModel.tools.sample import build_canvas, main, parse, read_gaps, run

MASK = 9


class Letters:
    """One character per token; 10 and 11 are the two halves of one character."""

    def decode(self, ids, after=()):
        return "".join({8: "\n", 10: "\ufffd", 11: "\ufffd"}.get(i, chr(97 + i)) for i in ids).replace(
            "\ufffd\ufffd", "\u00e9"
        )


@pytest.fixture
def recording():
    record = Recording(Letters(), [0, MASK, MASK, MASK], MASK, hidden={7})
    record.add([0, MASK, 8, MASK])
    record.add([0, 2, 8, 7])
    return record


def test_masks_are_shades_end_tokens_nothing_and_split_characters_whole():
    assert token_texts(Letters(), [0, MASK, 10, 11, 7, 1], MASK, {7}) == ["a", "\u2591", "", "\u00e9", "", "b"]


def test_the_view_is_the_text_of_the_canvas(recording):
    assert recording.view(0).plain == "a\u2591\u2591\u2591"
    assert recording.view().plain == "ac\n"


def test_steps_are_written_as_lines_as_a_moving_picture_and_as_gif(recording, tmp_path):
    for name in ("h.jsonl", "h.svg", "h.gif"):
        recording.save(tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert [row["masks_left"] for row in rows] == [3, 2, 0]
    groups = ElementTree.parse(tmp_path / "h.svg").getroot().findall("{http://www.w3.org/2000/svg}g")
    assert len(groups) == 3
    assert Image.open(tmp_path / "h.gif").n_frames == 3
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.svg, \.gif"):
        recording.save(tmp_path / "h.txt")


def test_gaps_are_read_with_their_lengths():
    assert read_gaps("a<gap>b<gap:3>", 16) == (["a", "b", ""], [16, 3])
    with pytest.raises(ValueError, match="holds no <gap>"):
        read_gaps("nothing", 16)
    for length in ("0", "1000001", "9" * 5000):
        with pytest.raises(UserError, match=r"the length of a gap must be in \[1, 1000000\], got <gap:"):
            read_gaps(f"a<gap:{length}>", 16)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"a\xff<gap>", [], "is not UTF-8: invalid start byte at byte 1"),
        (b"a<gap>", ["--gap_length", "0"], "--gap_length must be an integer >= 1, got 0"),
        (b"a<gap:20><gap:30>", [], "gaps of 50 tokens do not fit in the context of 40"),
    ],
)
def test_a_file_whose_gaps_cannot_be_laid_out_is_refused(chatml_tokenizer, tmp_path, content, more, message):
    (tmp_path / "text").write_bytes(content)
    options, _ = parse(["--model", "m", "--infill", str(tmp_path / "text"), *more])
    with pytest.raises(UserError, match=message):
        build_canvas(options, Codec(chatml_tokenizer), SimpleNamespace(config=CoDAConfig(max_position_embeddings=40)))


@pytest.fixture
def answering(chatml_tokenizer):
    """A model whose answer to anything is a text."""
    names = ("mask_token_id", "pad_token_id", "eos_token_id")
    config = CoDAConfig(bos_token_id=None, **{name: getattr(chatml_tokenizer, name) for name in names})
    ids = Codec(chatml_tokenizer).encode_text("one\n\ntwo")

    def answer(inputs, **settings):
        return SimpleNamespace(sequences=torch.tensor([[*inputs[0].tolist(), *ids]]), cost=DecodingCost())

    generation = DiffusionGenerationConfig(max_new_tokens=len(ids))
    return SimpleNamespace(config=config, generation_config=generation, diffusion_generate=answer)


def test_an_answer_ends_before_its_stop_string(answering, chatml_tokenizer, capsys):
    for more, text in (([], "one\n\ntwo"), (["--stop_strings", '["x", "\\n\\n"]'], "one")):
        options, settings = parse(["--model", "m", "--prompt", "p", "--quiet", *more])
        run(options, settings, chatml_tokenizer, answering)
        assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("start", ["", "x ="])
def test_a_file_with_gaps_comes_back_filled_and_unchanged_around_them(chatml_tokenizer, tmp_path, capsys, start):
    names = ("mask_token_id", "pad_token_id", "eos_token_id")
    config = CoDAConfig(bos_token_id=None, **{name: getattr(chatml_tokenizer, name) for name in names})
    codec, seen = Codec(chatml_tokenizer), []
    end = chatml_tokenizer.eos_token_id
    answers = [[*codec.encode_text(" y"), end, *codec.encode_text("z")], codec.encode_text("w")]

    def fill(inputs, **settings):
        seen.append(inputs[0].tolist())
        filled = iter([token for answer in answers for token in answer])
        row = [next(filled) if token == config.mask_token_id else token for token in seen[0]]
        cost = DecodingCost(forwards=2, row_forwards=2, answer_tokens=len(row))
        return SimpleNamespace(sequences=torch.tensor([row]), cost=cost)

    model = SimpleNamespace(config=config, generation_config=DiffusionGenerationConfig(), diffusion_generate=fill)
    file = tmp_path / "text"
    file.write_text(f"{start}<gap:{len(answers[0])}><|mask|>\r\n<gap:{len(answers[1])}>", newline="")
    options, settings = parse(["--model", "m", "--infill", str(file), "--quiet"])
    run(options, settings, chatml_tokenizer, model)
    printed = capsys.readouterr()
    assert printed.out == f"{start} y<|mask|>\r\nw\n"
    kept = len(codec.encode_text(" y")) + len(codec.encode_text("w"))  # what stands behind the end is no answer
    assert f"answer_tokens {kept}, row_forwards 2, tokens_per_forward {kept / 2:.3g}" in " ".join(printed.err.split())
    before = codec.encode_text(start) or [config.document_start_id]
    assert seen[0][: len(before) + 1] == [*before, config.mask_token_id]
    assert seen[0].count(config.mask_token_id) == sum(map(len, answers))


def test_every_decoding_setting_is_an_option_and_others_are_refused():
    options, settings = parse(["--model", "m", "--prompt", "p", "--steps", "4", "--kv_cache=dual"])
    assert (options.prompt, settings) == ("p", {"steps": 4, "kv_cache": "dual"})
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        parse(["--model", "m", "--prompt", "p", "--stepz", "4"])


def test_a_file_for_the_steps_that_could_not_be_written_is_refused_before_a_model_is_loaded():
    with pytest.raises(SystemExit, match=r"error: --history must end in \.jsonl, \.svg, \.gif, got 'h\.txt'"):
        main(["--model", "no model", "--prompt", "p", "--history", "runs/h.txt"])


def test_an_unknown_option_is_named_rather_than_its_neighbours():
    with pytest.raises(ValueError, match="unknown generation setting 'chat'"):
        parse(["--model", "M", "--prompt", "P", "--chat", "--steps", "4"])


def test_weights_that_are_not_finite_and_devices_that_are_not_there_are_refused_by_name(
    make_model, chatml_tokenizer, tmp_path
):
    model = make_model()
    model.save_pretrained(tmp_path)
    chatml_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--device cuda:99: "):
        load(str(tmp_path), dtype="float32", device="cuda:99")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"--model {tmp_path}: in float32: weights are not finite: model\.norm\.weight$"
    ):
        load(str(tmp_path), dtype="float32")


def test_a_model_that_overflows_in_its_precision_is_told_of_and_no_fault_of_the_program(
    write_model, chatml_tokenizer, tmp_path
):
    write_model(tmp_path, chatml_tokenizer, vocab_size=304, initializer_range=300.0)
    asked = ["--model", str(tmp_path), "--prompt", "x", "--max_new_tokens", "2", "--steps", "2", "--quiet"]
    with pytest.raises(SystemExit, match="^error: the model gave scores that are not finite: .*float16"):
        main([*asked, "--dtype", "float16"])
