import glob
import os
import re

import pytest

from coda_pretrain.data.inputs import OWN_OUTPUT, SAME_FOLDER, UnreadableFileError, check_openable, find_files

TEXT_SUFFIXES = (".txt", ".py")


@pytest.fixture
def make(tmp_path):
    """A function that writes files with one letter below the temporary folder."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")

    return make


def names(paths, folder):
    return [path.removeprefix(f"{folder}/") for path in paths]


def test_files_are_found_in_folders_and_by_pattern_once_and_sorted(tmp_path, make):
    make("b.py", "sub/a.py", "sub/c.jsonl", "sub/skip.bin", "test/d.py", "Makefile")
    found = find_files([str(tmp_path), str(tmp_path / "**/*.py")], ["*/test/*"], TEXT_SUFFIXES)
    assert names(found.files, tmp_path) == ["b.py", "sub/a.py", "sub/c.jsonl"]
    passed_over = {f"{tmp_path}/sub/skip.bin": ".bin", f"{tmp_path}/Makefile": "no suffix"}
    assert (found.passed_over, found.excluded, found.unusable) == (passed_over, 2, {})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.py", ["a.py"]),
        ("**/*.py", ["a.py", "x/b.py", "x/y/c.py"]),
        ("x/**/*.py", ["x/b.py", "x/y/c.py"]),
        ("**/y", ["x/y/.e.py", "x/y/c.py"]),
        ("**/y/*.py", ["x/y/c.py"]),
        ("**/y/**", ["x/y/.e.py", "x/y/c.py"]),
        ("x/**", ["x/.d/f.py", "x/b.py", "x/y/.e.py", "x/y/c.py"]),
        ("*/?.py", ["x/b.py"]),
        ("x/[a-b].py", ["x/b.py"]),
    ],
)
def test_patterns_mean_what_they_mean_to_a_shell(tmp_path, make, monkeypatch, pattern, expected):
    make("a.py", "x/b.py", "x/y/c.py", "x/y/.e.py", "x/.d/f.py")
    assert names(find_files([str(tmp_path / pattern)], [], TEXT_SUFFIXES).files, tmp_path) == expected
    matched = [match for match in glob.glob(str(tmp_path / pattern), recursive=True)]
    walked = {path for match in matched for path in ([match] if os.path.isfile(match) else files_in(match))}
    assert {os.path.normpath(path) for path in walked} == {str(tmp_path / name) for name in expected}
    monkeypatch.chdir(tmp_path)
    assert find_files([pattern], [], TEXT_SUFFIXES).files == expected


def files_in(folder):
    return [os.path.join(current, name) for current, _, names in os.walk(folder) for name in names]


def test_inputs_that_give_nothing_are_named(tmp_path, make):
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder, and as a pattern it matches nothing"):
        find_files([str(tmp_path / "nowhere")], [], TEXT_SUFFIXES)
    with pytest.raises(ValueError, match=re.escape(f"--input {tmp_path}: holds no file with a suffix of .jsonl")):
        find_files([str(tmp_path)], [], TEXT_SUFFIXES)
    make("a.bin", "a.py")
    with pytest.raises(ValueError, match=r"a\.bin: the suffix must be one of .jsonl"):
        find_files([str(tmp_path / "a.bin")], [], TEXT_SUFFIXES)
    with pytest.raises(ValueError, match=r"holds no file that --exclude leaves over \(1 before\)"):
        find_files([str(tmp_path)], ["*.py"], TEXT_SUFFIXES)


def test_linked_folders_are_read_once_each_and_loops_end(tmp_path, make):
    make("in/own/a.py", "in/z/b.py", "far/c.py", "far/deep/d.py")
    folder = tmp_path / "in"
    (folder / "mounted").symlink_to(tmp_path / "far")
    (folder / "deep").symlink_to(tmp_path / "far" / "deep")
    (folder / "own" / "loop").symlink_to(folder)
    (folder / "a-link-to-z").symlink_to(folder / "z")
    (tmp_path / "far" / "back").symlink_to(folder)
    found = find_files([str(folder)], [], TEXT_SUFFIXES)
    assert names(found.files, folder) == ["deep/d.py", "mounted/c.py", "own/a.py", "z/b.py"]
    again = [path for path, reason in found.passed_over.items() if reason == SAME_FOLDER]
    assert sorted(names(again, folder)) == ["a-link-to-z", "mounted/back", "mounted/deep", "own/loop"]
    by_pattern = find_files([str(folder / "**/*.py"), str(folder)], [], TEXT_SUFFIXES)
    assert sorted(os.path.realpath(path) for path in by_pattern.files) == sorted(
        os.path.realpath(path) for path in found.files
    )


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, make, monkeypatch):
    make("in/a.py", "in/closed/b.py")
    folder = tmp_path / "in"
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "gone-folder").symlink_to("/nowhere/at/all")
    (folder / "self.py").symlink_to("self.py")
    os.mkfifo(folder / "pipe.jsonl")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    found = find_files([str(folder)], [], TEXT_SUFFIXES)
    assert found.unusable == {
        f"{folder}/gone-folder": "a link to /nowhere/at/all, which is not there",
        f"{folder}/closed": "a folder that cannot be listed: Permission denied",
    }
    reasons = {
        "gone.jsonl": "a link to nowhere, which is not there",
        "self.py": "a link that leads back to itself",
        "pipe.jsonl": "a FIFO, socket or device",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnreadableFileError, match=reason):
            check_openable(str(folder / name), "jsonl")


def test_the_output_is_never_input_also_not_through_a_link_or_a_pattern(tmp_path, make):
    make("in/a.jsonl", "far/shards/progress.jsonl", "far/b.jsonl")
    (tmp_path / "in" / "mounted").symlink_to(tmp_path / "far")
    output = str(tmp_path / "far" / "shards")
    with pytest.raises(ValueError, match="--output .* must not lie inside --input"):
        find_files([str(tmp_path)], [], TEXT_SUFFIXES, output)
    for pattern in ("in", "**/*.jsonl", "*"):
        found = find_files([str(tmp_path / pattern)], [], TEXT_SUFFIXES, output)
        assert {os.path.basename(path) for path in found.files} == {"a.jsonl", "b.jsonl"}
        assert OWN_OUTPUT in found.passed_over.values()
