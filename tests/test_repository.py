"""Rules that hold for the repository as a whole: imports, files, shell scripts, requirements and documentation."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
ROOMS = {
    "CoDALanguageModel": REPO / "CoDALanguageModel",
    "coda_pretrain": REPO / "pre-train/coda_pretrain",
    "coda_posttrain": REPO / "post-train/coda_posttrain",
    "coda_eval": REPO / "evaluation/coda_eval",
    "coda_serving": REPO / "serving/coda_serving",
    "coda_quickstart": REPO / "quickstart/coda_quickstart",
}
EXTRAS = {
    "coda_pretrain": {"pretrain", "xla", "datatrove", "wandb"},
    "coda_posttrain": {"posttrain", "deepspeed"},
    "coda_eval": {"eval"},
    "coda_serving": {"serving"},
    "coda_quickstart": {"quickstart"},
}
SELF = "tests/test_repository.py"


def repository_files() -> list[str]:
    """Paths of all files that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    return sorted({name for name in listed.split("\0") if name and (REPO / name).is_file()})


FILES = repository_files()
SHELL_SCRIPTS = [name for name in FILES if name.endswith(".sh") or name == ".ci/run"]
READMES = [name for name in FILES if Path(name).name == "README.md"]


def imports(file: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import statement of a file, also of those inside functions."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    found = [(n.level, n.module or "") for n in nodes if isinstance(n, ast.ImportFrom)]
    return found + [(0, alias.name) for n in nodes if isinstance(n, ast.Import) for alias in n.names]


def imported_roots(file: Path) -> set[str]:
    return {name.split(".")[0] for level, name in imports(file) if level == 0}


def project() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def pins(constraints: str) -> dict[str, str]:
    """Distribution name -> pinned version."""
    lines = [line.strip() for line in (REPO / constraints).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


# -- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_only_know_the_model(room):
    allowed = {room, "CoDALanguageModel"}
    files = list(ROOMS[room].rglob("*.py"))
    assert files, f"{ROOMS[room]} has no Python files"
    for file in files:
        foreign = (imported_roots(file) & (ROOMS.keys() | {"save_hf_model", "tests"})) - allowed
        assert not foreign, f"{file} imports {foreign}: rooms talk through folders on disk, not imports"


CHAPTERS = {
    "plain_data": set(),
    "places": set(),
    "data": {"places", "plain_data"},
    "noise": {"data", "plain_data"},
    "devices": {"plain_data"},
    "config": {"data", "noise", "devices", "plain_data"},
    "checkpoints": {"config", "devices", "places", "plain_data"},
    "watch": {"config", "data", "noise", "devices", "plain_data"},
    "train": {"checkpoints", "watch", "config", "data", "noise", "devices", "places", "plain_data"},
    "plan": {"train", "watch", "config", "data", "noise", "devices", "plain_data"},
}
"""Pre-training's files and folders in the order of the story, and which of the earlier ones each may import."""


def test_the_chapters_of_pre_training_only_know_earlier_ones():
    root, earlier = ROOMS["coda_pretrain"], set()
    found = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__", "export", "pipeline"} == CHAPTERS.keys(), "the last two are old names"
    for chapter, allowed in CHAPTERS.items():
        assert allowed <= earlier, f"{chapter} may not know {allowed - earlier}, which come later"
        earlier.add(chapter)
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if path.parts[0].removesuffix(".py") not in CHAPTERS:
            continue
        for level, name in imports(file):
            if level == len(path.parts):  # from the package's root
                chapter = name.split(".")[0]
                assert chapter in CHAPTERS[path.parts[0].removesuffix(".py")], f"{path} imports {chapter}"
            assert level or not name.startswith("coda_pretrain"), f"{path} imports {name} absolutely"


@pytest.mark.parametrize("room", ROOMS)
def test_modules_do_not_import_each_other_in_circles(room):
    root = ROOMS[room]
    arrows = {}
    for file in root.rglob("*.py"):
        package = file.relative_to(root).with_suffix("").parts[:-1]
        arrows[".".join((*package, file.stem))] = {
            ".".join((*package[: len(package) - level + 1], name)) if level else name.removeprefix(f"{room}.")
            for level, name in imports(file)
        }
    list(TopologicalSorter(arrows).static_order())  # raises CycleError with the circle


def test_the_model_room_is_flat_and_imports_only_torch_and_transformers():
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "numpy", "safetensors"}
    room = ROOMS["CoDALanguageModel"]
    for file in room.glob("*.py"):
        is_program = file.name in ("__main__.py", "sample.py", "agreement.py")  # the last two are old names
        for level, name in imports(file):
            is_flat_sibling = level == 1 and ("." not in name or is_program)
            assert is_flat_sibling or (level == 0 and name.split(".")[0] in allowed), f"{file} imports {name!r}"
    # Programs for the shell show and record the canvas; they do not travel with the weights.
    for file in (room / "tools").glob("*.py"):
        for level, name in imports(file):
            assert level or name.split(".")[0] in allowed | {"rich", "PIL"}, f"{file} imports {name!r}"


@pytest.mark.parametrize("room", EXTRAS)
def test_rooms_declare_what_they_import(room):
    declared = list(project()["dependencies"])
    for extra in EXTRAS[room]:
        declared += project()["optional-dependencies"][extra]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    distributions = packages_distributions()
    known = set(sys.stdlib_module_names) | ROOMS.keys()
    for file in ROOMS[room].rglob("*.py"):
        beside = {sibling.stem for sibling in file.parent.glob("*.py")}
        for module in imported_roots(file) - known - beside:
            owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert owners & names, f"{file} imports {module} ({owners}), which no extra of {room} requires"


def test_evaluation_scripts_do_not_shadow_the_lm_eval_package():
    assert not (REPO / "evaluation/lm_eval/__init__.py").exists()


# -- requirements ----------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_to_a_version_it_allows():
    pinned = {"ray": pins("constraints-newest.txt")["ray"]} | pins("constraints.txt")
    lines = project()["dependencies"] + sum(project()["optional-dependencies"].values(), [])
    for requirement in map(Requirement, lines):
        if requirement.name == "coda-lm":
            continue
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no version in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow the pin {pinned[name]}"


def test_all_is_the_union_of_the_rooms():
    extras = project()["optional-dependencies"]

    def parts(extra):
        named = [Requirement(line) for line in extras[extra]]
        return {extra}.union(*(parts(e) for r in named if r.name == "coda-lm" for e in r.extras))

    assert parts("loop") >= {"tools", "pretrain", "posttrain", "eval", "serving", "quickstart"}
    assert parts("all") >= parts("loop") | {"xla", "gguf", "dev"}
    assert parts("all") <= extras.keys()
    assert not parts("loop") & {"xla", "dev"}


def test_what_the_newest_versions_are_not_tested_with_loads_none_of_them():
    left_out = re.findall(r"--ignore=(\S+\.py)", (REPO / "test.sh").read_text())
    assert left_out
    code = "import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file)\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, *left_out]
    done = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
    owners = packages_distributions()
    loaded = {canonicalize_name(name) for module in done.stdout.split() for name in owners.get(module, ())}
    assert loaded & pins("constraints-newest.txt").keys() == {"pytest"}


# -- files -----------------------------------------------------------------------------------------------------------


class AnyTagLoader(yaml.SafeLoader):
    """A safe loader that reads past tags of other programs, such as lm-eval's `!function`."""


AnyTagLoader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith((".yaml", ".yml"))])
def test_yaml_files_parse(name):
    assert yaml.load((REPO / name).read_text(), AnyTagLoader) is not None


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".json")])
def test_json_files_parse(name):
    json.loads((REPO / name).read_text())


def test_sources_are_ascii():
    for name in FILES:
        if name.endswith((".py", ".sh", ".yaml", ".toml", ".txt")) or name == ".ci/run":
            text = (REPO / name).read_text()
            assert text.isascii(), f"{name}: {sorted({c for c in text if not c.isascii()})}"


def test_no_file_is_larger_than_one_megabyte():
    large = {name: size for name in FILES if (size := (REPO / name).stat().st_size) > 1_000_000}
    assert not large


def test_no_file_names_a_place_of_one_machine_or_is_unfinished():
    unfinished = ["TO" + "DO", "FIX" + "ME", "XX" + "X:"]
    places = ["--extra-index-url", "--index-url", re.escape(f"{Path.home()}/")]
    if len(REPO.parts) > 2 and REPO.parent != Path(tempfile.gettempdir()):  # programs may name the latter
        places.append(re.escape(f"{REPO.parent}/"))
    pattern = re.compile("|".join(rf"\b{word}" for word in unfinished) + "|" + "|".join(places))
    for name in FILES:
        if name == SELF or name.endswith((".png", ".gz", "Dockerfile")):  # a container's home is its own
            continue
        found = pattern.search((REPO / name).read_text())
        assert not found, f"{name}: {found.group()!r}"


# -- shell scripts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_scripts_parse_and_are_executable(name):
    subprocess.run(["bash", "-n", name], cwd=REPO, check=True)
    text = (REPO / name).read_text()
    if re.search(r"^# shellcheck shell=", text, re.MULTILINE):  # a file that other scripts source
        return
    assert os.access(REPO / name, os.X_OK), f"{name} is not executable"
    assert text.startswith("#!/"), f"{name} has no interpreter line"


# -- documentation ---------------------------------------------------------------------------------------------------

TOP_LEVEL = {name.split("/")[0] for name in FILES}


def commands(text: str) -> list[list[str]]:
    """The words of every command line in the shell code blocks of a Markdown text."""
    found = []
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
            except ValueError:  # the first line of a here-document or of a string over several lines
                found.append(line.split())
    return [words for words in found if words]


def named_paths(text: str) -> set[str]:
    """Words in code that start with a top-level name of the repository, such as `post-train/README.md`."""
    words = [word for words in commands(text) for word in words]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words += [word for span in re.findall(r"`([^`\n]+)`", prose) for word in span.split()]
    links = re.findall(r"\]\(([^)#:\s]+)\)", prose)
    words = [word.removeprefix("./").rstrip(".,;:") for word in words]
    paths = {word for word in words if re.fullmatch(r"[\w.@/-]+", word) and word.split("/")[0] in TOP_LEVEL}
    return paths | set(links)


def test_readmes_exist():
    assert "README.md" in READMES


@pytest.mark.parametrize("name", READMES)
def test_paths_in_readmes_exist(name):
    folder = (REPO / name).parent
    missing = [p for p in named_paths((REPO / name).read_text()) if not ((REPO / p).exists() or (folder / p).exists())]
    assert not missing, f"{name} names {missing}"


def module_sources(module: str) -> str:
    """Text of the package that a module belongs to, and of lm-eval's own command line where it is passed on."""
    roots = [ROOMS[module.split(".")[0]]]
    if module.startswith("coda_eval"):
        roots.append(Path(importlib.util.find_spec("lm_eval").origin).parent / "_cli")
    return "".join(file.read_text() for root in roots for file in root.rglob("*.py"))


@pytest.mark.parametrize("name", READMES)
def test_commands_in_readmes_exist(name):
    for words in commands((REPO / name).read_text()):
        program = next((i for i, word in enumerate(words) if word.split("/")[-1] in ("python", "bash")), None)
        if program is None or program + 1 == len(words):
            continue
        target, arguments = words[program + 1], words[program + 2 :]
        if target == "-m" and arguments[0].split(".")[0] in ROOMS:
            module, arguments = arguments[0], arguments[1:]
            spec = importlib.util.find_spec(module)
            assert spec, f"{name}: python -m {module} does not exist"
            if spec.submodule_search_locations:
                assert importlib.util.find_spec(f"{module}.__main__"), f"{name}: {module} cannot be run"
            source = module_sources(module)
        elif target.endswith((".py", ".sh")):
            script = next((f for f in (REPO / target, (REPO / name).parent / target) if f.is_file()), None)
            assert script, f"{name}: {target} does not exist"
            source = script.read_text()
            for module in re.findall(r"-m (coda_\w+)", source):  # a script that passes its arguments on
                source += module_sources(module)
        else:
            continue
        for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
            spellings = {flag, flag.replace("-", "_").replace("__", "--", 1)}
            assert any(spelling in source for spelling in spellings), f"{name}: {target} knows no {flag}"
