"""The generator: its functions run, its asserts hold, and held-out compositions stay out of every training file."""

import dataclasses

import pytest

from coda_quickstart import problems
from coda_quickstart.grammar import AGGREGATES, FILTERS, MAPS

TRAINING = problems.training_programs(4000, seed=0)
HELD_OUT = problems.held_out_programs(120, seed=0)
RESERVED = problems.held_out_programs(120, seed=0, name="reserved")


def run_check(function_text, row):
    namespace = {}
    exec(function_text, namespace)
    exec(row["test"], namespace)
    namespace["check"](namespace[row["entry_point"]])


def test_asserts_hold_for_the_canonical_solution_and_for_the_taught_answer():
    for index, program in enumerate(HELD_OUT):
        row = problems.problem_row(program, index, seed=0)
        run_check(row["prompt"] + row["canonical_solution"], row)
        run_check(program.answer, row)


def test_evaluation_runs_the_asserts():
    from coda_eval.programs import PROGRAMS

    for index, program in enumerate(HELD_OUT[:3]):
        row = {**problems.problem_row(program, index, seed=0), "timeout_s": 1.0}
        built = PROGRAMS["quickstart_problems"](row, program.answer)
        with pytest.raises(AssertionError):
            exec(f"def solve(value):\n    return object()\n{built.tests}", {})


def test_each_problem_has_eight_asserts_without_repeating_its_solution():
    row = problems.problem_row(HELD_OUT[0], 0, seed=0)
    assert row["test"].count("assert candidate(") == 8
    assert HELD_OUT[0].expression not in row["test"]


def test_asserts_tell_a_composition_from_its_neighbours():
    caught = total = 0
    for index, program in enumerate(HELD_OUT[:40]):
        row = problems.problem_row(program, index, seed=0)
        element = program.source.element
        maps = [m for m in MAPS if m.element == element and m.result == program.map.result and m != program.map]
        filters = [f for f in FILTERS if f.element == element and f != program.filter]
        for name, others in (("map", maps), ("filter", filters)):
            for other in others:
                changed = {name: other}
                neighbour = dataclasses.replace(program, **changed)
                total += 1
                try:
                    run_check(neighbour.answer, row)
                except AssertionError:
                    caught += 1
    # Some neighbours mean the same for some sources (numbers from 1 to n are all positive), so not every one differs.
    assert total > 400
    assert caught / total > 0.85


def test_held_out_compositions_never_occur_in_training():
    held_out = {program.composition for program in HELD_OUT}
    trained = {program.composition for program in TRAINING}
    assert len(held_out) == len(HELD_OUT)
    assert not held_out & trained
    assert {problems.held_out_set(composition) for composition in held_out} == {"quickstart"}
    assert {problems.held_out_set(composition) for composition in trained} == {None}


def test_the_reserved_set_shares_no_composition_with_the_first_one_training_or_validation():
    reserved = {program.composition for program in RESERVED}
    assert len(reserved) == 120
    validation = problems.validation_programs(96, 0, HELD_OUT)
    for others in (HELD_OUT, TRAINING, validation):
        assert not reserved & {program.composition for program in others}
        assert not {program.expression for program in RESERVED} & {program.expression for program in others}
    assert not {program.composition for program in HELD_OUT} & {program.composition for program in validation}


def test_every_primitive_of_a_held_out_problem_occurs_in_training():
    trained = {name for program in TRAINING for name in program.composition}
    assert {name for program in HELD_OUT + RESERVED for name in program.composition} <= trained


def test_names_of_primitives_are_unique():
    for primitives in (FILTERS, MAPS, AGGREGATES):
        assert len({primitive.name for primitive in primitives}) == len(primitives)


def test_expressions_of_held_out_compositions_are_nowhere_in_training():
    """The same code cannot arise from two compositions: the held-out rule holds for the text, not only for names."""
    trained = {program.expression for program in TRAINING}
    assert not trained & {program.expression for program in HELD_OUT}


def test_the_same_seed_gives_the_same_programs_and_another_seed_others():
    assert problems.training_programs(50, seed=0) == TRAINING[:50]
    assert problems.training_programs(50, seed=1) != TRAINING[:50]
    assert problems.held_out_programs(20, seed=3) == problems.held_out_programs(20, seed=3)
    assert problems.problem_row(HELD_OUT[3], 3, seed=0) == problems.problem_row(HELD_OUT[3], 3, seed=0)


def test_training_prompts_are_distinct():
    assert len({program.prompt for program in TRAINING}) == len(TRAINING)


def test_a_gap_joins_to_the_whole_function():
    def always(*pieces):
        return True

    for index, program in enumerate(HELD_OUT):
        row = problems.infill_row(program, index, 0, always)
        assert row["prefix"] + row["middle"] + row["suffix"] == program.prompt + program.body
        assert row["middle"].strip()


def test_no_gap_where_no_piece_splits_cleanly():
    assert problems.infill_row(HELD_OUT[0], 0, 0, lambda *pieces: False) is None


def test_too_many_held_out_problems_is_an_error_that_names_the_limit():
    with pytest.raises(ValueError, match=r"num_programs must be in \[0, \d+\], got 100000"):
        problems.held_out_programs(100000, seed=0)
    with pytest.raises(ValueError, match="num_programs must be at least 0, got -1"):
        problems.training_programs(-1, seed=0)
    with pytest.raises(ValueError, match="2000 distinct programs were asked for, and chance found"):
        problems.validation_programs(2000, 0, HELD_OUT)
    everything = problems.held_out_programs(157, seed=0)
    with pytest.raises(ValueError, match="157 problems leave no held-out composition for validation"):
        problems.validation_programs(1, 0, everything)
