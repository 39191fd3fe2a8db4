"""What a prompt of other models' control tokens means."""

import pytest

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.fill_tokens import FILL_TOKENS, file_text, read_fill_prompt

SPELLINGS = [
    "<|fim_prefix|>a = <|fim_suffix|>\nb<|fim_middle|>",
    "<fim_prefix>a = <fim_suffix>\nb<fim_middle>",
    "<fim-prefix>a = <fim-suffix>\nb<fim-middle>",
    "<\uff5cfim\u2581begin\uff5c>a = <\uff5cfim\u2581hole\uff5c>\nb<\uff5cfim\u2581end\uff5c>",
    "<PRE> a =  <SUF>\nb <MID>",
    "<|fim_suffix|>\nb<|fim_prefix|>a = <|fim_middle|>",
    "<fim_prefix><fim_suffix>\nb<fim_middle>a = ",
    "<|fim_prefix|>a <|fim_suffix|>\nb<|fim_middle|>= ",
]


@pytest.mark.parametrize("prompt", SPELLINGS, ids=range(len(SPELLINGS)))
def test_all_spellings_and_orders_mean_the_same_gap(prompt):
    assert read_fill_prompt(prompt) == ("a = ", "\nb")


def test_every_kind_of_the_table_is_read():
    for kind in FILL_TOKENS:
        prefix, suffix, middle = kind[:3]
        assert read_fill_prompt(f"{prefix}{kind.lead}x{suffix}y{middle}") == ("x", "y")


@pytest.mark.parametrize("text", ["", "def f():", "<|fim_prefix|>a", "<|fim_prefix|>a<fim_suffix>b<|fim_middle|>"])
def test_a_text_without_all_three_tokens_of_a_kind_is_a_text(text):
    assert read_fill_prompt(text) is None


def test_files_before_the_gap_become_plain_text():
    prompt = (
        "<|repo_name|>demo\n<|file_sep|>a.py\nx = 1\n<|file_sep|>b.py\n"
        "<|fim_prefix|>import a\n<|fim_suffix|>\nend<|fim_middle|>"
    )
    before = "--- demo ---\n--- a.py ---\nx = 1\n--- b.py ---\nimport a\n"
    assert read_fill_prompt(prompt) == (before, "\nend")
    assert file_text("a.py", "x") == "--- a.py ---\nx\n"


@pytest.mark.parametrize(
    "prompt",
    [
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>c<|fim_middle|>",
        "<|fim_middle|><|fim_prefix|>a<|fim_suffix|>b",
        "<|fim_prefix|>'<|fim_suffix|>'<|fim_suffix|>b<|fim_middle|>",
    ],
)
def test_tokens_of_which_it_is_not_sure_that_they_are_tokens_are_refused(prompt):
    with pytest.raises(UserError, match="once each and the last of them last"):
        read_fill_prompt(prompt)
