"""The corpus: what is taken, what is left out, how it is split."""

import ast

import pytest

from coda_quickstart.corpus import SourceFile, documented_functions, one_line_gaps, standard_library

FUNCTION = '''
import os


class Queue:
    def size(self):
        """Number of items."""
        return len(self.items)


def folder(path,
           default=None):
    """The folder of a path."""
    head = os.path.split(path)[0]

    return head or default


def without_docstring(x):
    return x


def _private(x):
    """Hidden."""
    return x
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "copy.py").write_text("x = 1\n")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    for name in ("test", "site-packages", "encodings"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.py").write_text(f"y = '{name}'\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "c.py").write_text(FUNCTION)
    return tmp_path


def test_repeated_empty_undecodable_and_test_files_are_left_out(folder, caplog):
    caplog.set_level("INFO")
    assert [file.path for file in standard_library(folder)] == ["a.py", "package/c.py"]
    assert "'undecodable': 1, 'empty': 1, 'repeated': 1" in caplog.text


def test_a_folder_without_python_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must hold Python files, got none below"):
        standard_library(tmp_path)


def test_the_standard_library_is_split_by_path_into_two_parts():
    files = [SourceFile(f"folder/file{i}.py", "") for i in range(2000)]
    share = sum(file.is_validation for file in files) / len(files)
    assert 0.02 < share < 0.06
    assert [file.is_validation for file in files] == [SourceFile(file.path, "x").is_validation for file in files]


def test_pairs_are_public_documented_functions_that_parse(folder):
    pairs = list(documented_functions(standard_library(folder), max_characters=400))
    assert len(pairs) == 2
    prompts = {prompt.splitlines()[0] for prompt, _ in pairs}
    assert prompts == {"def size(self):", "def folder(path,"}
    for prompt, function in pairs:
        assert prompt.endswith('"""')
        assert '"""' not in function
        ast.parse(prompt)
        ast.parse(function)


def test_long_functions_are_left_out(folder):
    assert len(list(documented_functions(standard_library(folder), max_characters=120))) == 1


def test_gaps_join_to_the_text_they_were_cut_from():
    text = "".join(f"    value_{i} = compute({i})\n" for i in range(40))
    gaps = one_line_gaps([SourceFile("m.py", text)], num_gaps=5, seed=0)
    assert len(gaps) == 5
    for gap in gaps:
        assert gap["prefix"] + gap["middle"] + gap["suffix"] in text
        assert gap["middle"] == gap["middle"].strip()
        assert gap["prefix"].endswith("    ")
    assert gaps == one_line_gaps([SourceFile("m.py", text)], num_gaps=5, seed=0)
