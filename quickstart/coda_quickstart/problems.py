"""Short functions made from the grammar: training rows, held-out problems with asserts, held-out infilling gaps.

A composition is the unordered set of a program's filter, map and aggregate. A fixed hash decides once and for all
which compositions are held out, and for which of two sets, so no sampling order, seed or count can move one into the
training data or into the other set. Sources and wordings vary on all sides. Not here: the primitives (grammar.py) and
data cut from real code (corpus.py).
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coda_quickstart.grammar import AGGREGATES, FILTERS, MAPS, SOURCES, Aggregate, Filter, Map, Source
from CoDALanguageModel.errors import UserError

HELD_OUT = {"quickstart": (0.0, 0.12), "reserved": (0.12, 0.22)}
"""Sets of held-out problems, and the part of all hashes that each takes. Settings are chosen while looking at the
first; the second was made later and is only reported."""

FUNCTION_NAME = "solve"
DRAWS_PER_PROGRAM = 20
VARIABLES = {"number": "x", "word": "w"}
WORD_POOL = (
    "level noon radar otto rotor ana stats Anna apple orange tiny lion stone RIVER Salt trail eel ion tone iris nest "
    "letter senior noise 7 42 2048 1331 555 a Lent EAST 90210 raisin toe listens in on rose oil tea sir ESSAY less "
    "north orient street ten tin a1 isotope elation trio solo art era ace nine Nile ease loan also into tartan"
).split()


@dataclass(frozen=True)
class Program:
    """One function of the grammar, down to its names and wording."""

    source: Source
    filter: Filter
    map: Map
    aggregate: Aggregate
    docstring: str

    @property
    def parameter(self) -> str:
        """Name of the function's parameter."""
        return self.source.parameter

    @property
    def composition(self) -> frozenset[str]:
        """The unordered set of primitives that the held-out rule looks at."""
        return composition_of(self.filter, self.map, self.aggregate)

    @property
    def expression(self) -> str:
        """The Python expression that the function returns."""
        variable = VARIABLES[self.source.element]
        mapped = self.map.code.format(x=variable)
        condition = self.filter.code.format(x=variable)
        iterable = self.source.code.format(p=self.parameter)
        return self.aggregate.code.format(g=f"{mapped} for {variable} in {iterable} if {condition}")

    @property
    def prompt(self) -> str:
        """Signature and docstring, ending in a newline."""
        return f'def {FUNCTION_NAME}({self.parameter}):\n    """{self.docstring}"""\n'

    @property
    def body(self) -> str:
        """What completes the prompt, ending in a newline."""
        return f"    return {self.expression}\n"

    @property
    def answer(self) -> str:
        """The whole function without its docstring: what the model learns to answer."""
        return f"def {FUNCTION_NAME}({self.parameter}):\n{self.body}".rstrip("\n")


def composition_of(filter_: Filter, map_: Map, aggregate: Aggregate) -> frozenset[str]:
    """The unordered set of the three primitives' names."""
    return frozenset((f"filter {filter_.name}", f"map {map_.name}", f"aggregate {aggregate.name}"))


def held_out_set(composition: frozenset[str]) -> str | None:
    """Which of the `HELD_OUT` sets a composition belongs to, by hash; None for what is trained on."""
    digest = hashlib.sha256(", ".join(sorted(composition)).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next((name for name, (start, end) in HELD_OUT.items() if start <= place < end), None)


Entry = tuple[str, Filter, Map, Aggregate]


def all_compositions(held_out: str | None) -> list[Entry]:
    """Every combination that fits by type and belongs to a set, as (element type, filter, map, aggregate), in order.

    Args:
        held_out: a set of `HELD_OUT`, or None for what is trained on.
    """
    fitting = [
        (filter_.element, filter_, map_, aggregate)
        for filter_ in FILTERS
        for map_ in MAPS
        if map_.element == filter_.element
        for aggregate in AGGREGATES
        if aggregate.accepts in ("any", map_.result)
    ]
    return [entry for entry in fitting if held_out_set(composition_of(*entry[1:])) == held_out]


def training_programs(num_programs: int, seed: int) -> list[Program]:
    """Distinct programs whose compositions are not held out.

    Args:
        num_programs: how many to draw.
        seed: names the draw; the same seed gives the same list.

    Raises:
        UserError: `num_programs` is negative, or more than there are.
    """
    return _distinct_programs(num_programs, random.Random(f"training programs {seed}"), all_compositions(None))


def validation_programs(num_programs: int, seed: int, problems: Sequence[Program]) -> list[Program]:
    """Distinct programs of those compositions of the first held-out set that none of its problems has.

    Args:
        num_programs: how many to draw.
        seed: names the draw.
        problems: drawn from that set.

    Raises:
        UserError: `num_programs` is negative or more than there are, or the problems leave no composition.
    """
    asked = {program.composition for program in problems}
    left = [entry for entry in all_compositions("quickstart") if composition_of(*entry[1:]) not in asked]
    if num_programs and not left:
        raise UserError(f"{len(problems)} problems leave no held-out composition for validation; ask for fewer")
    return _distinct_programs(num_programs, random.Random(f"validation programs {seed}"), left)


def held_out_programs(num_programs: int, seed: int, name: str = "quickstart") -> list[Program]:
    """Programs of held-out compositions, each composition at most once.

    Args:
        num_programs: how many to draw.
        seed: names the draw.
        name: one of the `HELD_OUT` sets.

    Raises:
        UserError: more programs are asked for than there are held-out compositions.
    """
    rng = random.Random(f"held-out programs {seed}")
    compositions = all_compositions(name)
    if not 0 <= num_programs <= len(compositions):
        raise UserError(f"num_programs must be in [0, {len(compositions)}], got {num_programs}")
    return [_draw_program(rng, *entry) for entry in rng.sample(compositions, num_programs)]


def _distinct_programs(num_programs: int, rng: random.Random, compositions: Sequence[Entry]) -> list[Program]:
    if num_programs < 0:
        raise UserError(f"num_programs must be at least 0, got {num_programs}")
    programs: dict[str, Program] = {}
    for _ in range(DRAWS_PER_PROGRAM * num_programs):
        program = _draw_program(rng, *rng.choice(compositions))
        programs.setdefault(program.prompt, program)
        if len(programs) == num_programs:
            return list(programs.values())
    if num_programs:
        raise UserError(f"{num_programs} distinct programs were asked for, and chance found {len(programs)}")
    return []


def _draw_program(rng: random.Random, element: str, filter_: Filter, map_: Map, aggregate: Aggregate) -> Program:
    source = rng.choice([source for source in SOURCES if source.element == element])
    noun = source.noun.format(p=source.parameter)
    if filter_.before and (not filter_.after or rng.random() < 0.5):
        kept = f"the {rng.choice(filter_.before)} {noun}"
    else:
        kept = f"the {noun} {rng.choice(filter_.after)}"
    mapped = rng.choice(map_.nouns)
    docstring = f"Return {rng.choice(aggregate.nouns)} {mapped} {kept}."
    return Program(source, filter_, map_, aggregate, docstring)


def problem_row(program: Program, index: int, seed: int, name: str = "quickstart") -> dict[str, str]:
    """The program as a problem in HumanEval's format, with eight asserts.

    Args:
        program: what is asked for.
        index: its number in its set.
        seed: names the arguments of the asserts together with `index`.
        name: of its set, which begins the task's id.

    Returns:
        task_id, prompt, entry_point, test (defines `check(candidate)`) and canonical_solution.
    """
    rng = random.Random(f"arguments {seed} {index}")
    function = _compile(program)
    lines = ["def check(candidate):"]
    for argument in _arguments(rng, program.source):
        expected = _literal(function(argument))
        lines.append(f"    assert candidate({argument!r}) == {expected}")
    return {
        "task_id": f"{name}/{index}",
        "prompt": program.prompt,
        "entry_point": FUNCTION_NAME,
        "test": "\n".join(lines) + "\n",
        "canonical_solution": program.body,
    }


def infill_row(
    program: Program, index: int, seed: int, splits_cleanly: Callable[[str, str, str], bool], name: str = "quickstart"
) -> dict[str, str] | None:
    """A gap in the program's return line: its filter, its mapped element, its iterable or the whole expression.

    Args:
        program: the function to cut.
        index: names the gap together with `seed`.
        seed: see `index`.
        splits_cleanly: whether prefix, middle and suffix tokenized apart give the tokens of the whole.
        name: of the held-out set that the program comes from.

    Returns:
        task_id, prefix, middle and suffix, whose concatenation is the whole function; None when no gap splits cleanly.
    """
    variable = VARIABLES[program.source.element]
    text = program.prompt + program.body
    condition = program.filter.code.format(x=variable)
    mapped = program.map.code.format(x=variable)
    iterable = program.source.code.format(p=program.parameter)
    gaps = [
        (text.rindex(f" if {condition}"), f" if {condition}"),
        (text.rindex(f"{mapped} for {variable} in "), mapped),
        (text.rindex(f" {iterable} if {condition}"), f" {iterable}"),
        (text.rindex(f" {program.expression}"), f" {program.expression}"),
    ]
    random.Random(f"gap {seed} {index}").shuffle(gaps)
    for start, middle in gaps:
        prefix, suffix = text[:start], text[start + len(middle) :]
        if splits_cleanly(prefix, middle, suffix):
            task = "composition" if name == "quickstart" else f"{name}_composition"
            return {"task_id": f"{task}/{index}", "prefix": prefix, "middle": middle, "suffix": suffix}
    return None


def instruction_row(program: Program) -> dict[str, str]:
    """The program as an Alpaca row: the prompt is the instruction, the whole function the output."""
    return {"instruction": program.prompt, "input": "", "output": program.answer}


def _compile(program: Program) -> Any:
    namespace: dict[str, Any] = {}
    exec(program.prompt + program.body, namespace)  # our own text, built from the grammar above
    return namespace[FUNCTION_NAME]


def _literal(value: Any) -> str:
    """Python text of `value`; sets are written in sorted order so that the same value gives the same text."""
    if isinstance(value, set):
        return "{" + ", ".join(map(repr, sorted(value))) + "}" if value else "set()"
    return repr(value)


def _arguments(rng: random.Random, source: Source) -> list[Any]:
    if source.name == "list":
        return [[rng.randint(-12, 24) for _ in range(rng.randint(6, 12))] for _ in range(7)] + [[]]
    if source.name == "range":
        return [*rng.sample(range(3, 40), 7), 0]
    if source.name == "digits":
        return [rng.randint(10**4, 10**9) for _ in range(7)] + [0]
    words = [[rng.choice(WORD_POOL) for _ in range(rng.randint(6, 14))] for _ in range(7)]
    return [*words, []] if source.name == "strings" else [*map(" ".join, words), ""]
