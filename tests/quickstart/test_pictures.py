"""The pictures tell the truth about the strategies and the order of commits."""

import xml.etree.ElementTree

from coda_quickstart import pictures


def test_strategies_mask_what_they_may(tokenizer):
    examples = {name.split(":")[0]: (texts, states) for name, texts, states in pictures.masking_examples(tokenizer)}
    assert list(examples) == ["plain", "S1", "S2", "S3"]
    for texts, states in examples.values():
        assert "".join(texts) == pictures.LINE_OF_CODE
        assert len(texts) == len(states)
        assert "masked" in states
        assert "kept" in states
    prefix, padding = examples["S1"][1], examples["S2"][1]
    assert prefix.index("masked") >= prefix.count("prefix") > 0
    assert set(padding[-padding.count("padding") :]) == {"padding"}


def test_spans_are_masked_in_runs(tokenizer):
    states = pictures.masking_examples(tokenizer)[3][2]
    runs = "".join("M" if state == "masked" else " " for state in states).split()
    assert all(len(run) >= 4 for run in runs[:-1])


def test_the_text_picture_has_the_tokens_and_the_masks(tokenizer):
    text = pictures.masking_text(tokenizer)
    assert "[M]" in text
    assert "[P]" in text
    assert "|" in text


def test_the_first_and_last_steps_are_shown():
    assert pictures.shown_steps(3) == [0, 1, 2]
    assert pictures.shown_steps(48)[-1] == 47
    assert len(pictures.shown_steps(48)) == 9


def test_commit_order_is_the_step_of_each_token():
    steps = [[None, "b", None], ["a", "b", None], ["a", "b", "c"]]
    assert pictures.commit_order(steps) == [1, 0, 2]


def test_the_denoising_picture_escapes_code_and_marks_open_tokens():
    page = pictures.denoising_html([["<", None], ["<", "b"]])
    assert "&lt;" in page
    assert page.count("t open") == 1
    assert page.count("done new") == 2
    assert pictures.denoising_text([["<", None], ["<", "\n"]]) == "  1  <_\n  2  <\\n"


def test_loss_curves_are_one_svg_with_all_titles():
    points = [(1, 3.0), (2, 2.0)]
    svg = pictures.loss_curves_svg([("Pre-training", points, []), ("Mid-training", points, [(2, 2.5)])])
    root = xml.etree.ElementTree.fromstring(svg[svg.index("<svg") :])
    assert root.tag.endswith("svg")
    assert "Pre-training" in svg
    assert "Mid-training" in svg
