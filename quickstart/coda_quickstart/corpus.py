"""Real Python text: the source files of the standard library of the Python that runs this.

Files are taken without site-packages, test suites and character tables, deduplicated by content, and split by a fixed
hash of their path, so that the validation text is never trained on. From the training files come docstring -> function
pairs for fine-tuning; from the validation files, one-line infilling gaps. Not here: generated functions (problems.py).
"""

import ast
import hashlib
import logging
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "encodings"}
)  # encodings is tables of code points, hardly any code
VALIDATION_SHARE = 0.04


@dataclass(frozen=True)
class SourceFile:
    """One Python file."""

    path: str
    """Path below the standard library's folder, with forward slashes."""
    text: str

    @property
    def is_validation(self) -> bool:
        """Whether the file is held out from training, by a fixed hash of its path."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def standard_library(folder: Path | None = None) -> list[SourceFile]:
    """The source files below `folder`, sorted by path; undecodable, empty and repeated ones are left out.

    Args:
        folder: where to look; the running Python's own standard library when None.

    Raises:
        UserError: the folder holds no Python file.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    files: list[SourceFile] = []
    left_out = {"undecodable": 0, "empty": 0, "repeated": 0}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            left_out["undecodable"] += 1
            continue
        if not text.strip():
            left_out["empty"] += 1
        elif text in seen:
            left_out["repeated"] += 1
        else:
            seen.add(text)
            files.append(SourceFile(relative.as_posix(), text))
    if not files:
        raise UserError(f"the corpus folder must hold Python files, got none below {folder}")
    logger.info("%d files of %s; left out: %s", len(files), folder, left_out)
    return files


def documented_functions(files: list[SourceFile], max_characters: int) -> Iterator[tuple[str, str]]:
    """Short functions with a one-line docstring, as (signature and docstring, whole function without docstring).

    Args:
        files: where to look.
        max_characters: longest function to take, docstring included.
    """
    for file in files:
        try:
            tree = ast.parse(file.text)
        except SyntaxError:  # template files such as lib2to3's are no Python 3
            logger.info("%s is not Python 3 and gives no functions", file.path)
            continue
        lines = file.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            pair = _documented_function(node, lines) if isinstance(node, ast.FunctionDef) else None
            if pair and len(pair[0]) + len(pair[1]) <= max_characters:
                yield pair


def _documented_function(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node)
    if not docstring or "\n" in docstring or len(node.body) < 2 or node.decorator_list or node.name.startswith("_"):
        return None
    first, second = node.body[0], node.body[1]
    if first.end_lineno is None or node.end_lineno is None or first.lineno == node.lineno:
        return None
    head = textwrap.dedent("".join(lines[node.lineno - 1 : first.lineno - 1]))
    body = textwrap.dedent("".join(lines[second.lineno - 1 : node.end_lineno]))
    if not head.startswith("def ") or not body.strip():
        return None
    indented = textwrap.indent(body, "    ").rstrip("\n")
    return f'{head}    """{docstring}"""', f"{head}{indented}"


def one_line_gaps(files: list[SourceFile], num_gaps: int, seed: int, *, context_lines: int = 6) -> list[dict[str, str]]:
    """Single code lines cut out of `files`, with a few lines around them.

    Args:
        files: held-out files.
        num_gaps: how many gaps, drawn over all files.
        seed: names the draw.
        context_lines: lines kept before and after the gap.

    Returns:
        Rows of task_id, prefix, middle and suffix; the middle is the line without indentation and line break.
    """
    candidates = []
    for file in files:
        lines = file.text.splitlines(keepends=True)
        for number in range(context_lines, len(lines) - context_lines):
            line = lines[number].strip()
            if 8 <= len(line) <= 48 and not line.startswith(("#", '"', "'")) and "import" not in line:
                candidates.append((file.path, lines, number))
    rows = []
    for path, lines, number in random.Random(f"gaps {seed}").sample(candidates, min(num_gaps, len(candidates))):
        line = lines[number].rstrip()
        middle = line.strip()
        before = "".join(lines[number - context_lines : number]) + line[: len(line) - len(middle)]
        after = lines[number][len(line) :] + "".join(lines[number + 1 : number + 1 + context_lines])
        rows.append({"task_id": f"stdlib/{path}:{number + 1}", "prefix": before, "middle": middle, "suffix": after})
    return rows
