"""Schemas as languages: all that comes out is valid, and what is not kept is refused by its name."""

import json
import random
import time

import jsonschema
import numpy as np
import pytest

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.json_schema import of_schema
from CoDALanguageModel.regular import automaton

VALIDATOR = jsonschema.Draft202012Validator
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
SCHEMAS = [
    True,
    {},
    {"description": "anything"},
    {"type": "object"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": '^[A-Z]{2}\\d+"?$'},
    {"type": "string", "pattern": "a\\\\b"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "time"},
    {"type": ["string", "null", "integer"], "minLength": 3, "maximum": 4},
    {"type": "object", "properties": {"a": {"type": "number"}, "b": {}, "c": {"enum": ["\n", 1]}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"const": {"x": [1, "\u00e9"]}}}},
    {"type": "object", "properties": {}},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
    {"properties": {"a": {"type": "null"}, "b": False}},
    {"$ref": "#/$defs/n", "$defs": {"n": NODE}},
    {"type": "array", "items": {"$ref": "#"}},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": 1}, "x": {"type": "null"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": 2}}, "required": ["k"]},
        ]
    },
    {"allOf": [{"type": "null"}], "title": "nothing"},
    {"enum": [1, 2.5, None, "x", True], "type": ["integer", "string"]},
]


def sample(machine, rng, soft=40):
    """A random text of the language, and the shortest way to its end once it is `soft` bytes long."""
    dead = len(machine.table) - 1
    distance = np.where(machine.accepts, 0, 10**6)
    while not np.array_equal(distance, nearer := np.minimum(distance, distance[machine.table].min(axis=1) + 1)):
        distance = nearer
    text, state = bytearray(), 0
    while not machine.accepts[state] or (len(text) < soft and rng.random() < 0.8):
        byte = [b for b in range(256) if machine.table[state, machine.byte_class[b]] != dead]
        if not byte:
            break
        if len(text) >= soft:
            byte = [min(byte, key=lambda b: distance[machine.table[state, machine.byte_class[b]]])]
        text.append(rng.choice(byte))
        state = int(machine.table[state, machine.byte_class[text[-1]]])
    return text.decode()


def accepts(machine, text):
    state = 0
    for byte in text.encode():
        state = int(machine.table[state, machine.byte_class[byte]])
    return bool(machine.accepts[state])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_all_that_comes_out_is_valid(schema):
    machine, rng = automaton(of_schema(schema)), random.Random(0)
    for _ in range(60):
        VALIDATOR(schema, format_checker=VALIDATOR.FORMAT_CHECKER).validate(json.loads(sample(machine, rng)))


def test_json_is_taken_as_python_writes_it():
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {"type": "array"},
            "c": {"type": "object"},
            "d": {"type": "number"},
        },
    }
    machine = automaton(of_schema(schema))
    value = {"a": 'x"\\\n\x01\u00e9', "b": [1, {"z": None}], "c": {"y": [True]}, "d": -1.5e-7}
    for text in (json.dumps(value), json.dumps(value, separators=(",", ":")), json.dumps(value, ensure_ascii=False)):
        assert accepts(machine, text)
    for text in (json.dumps(value, indent=1), '{"d":1,"a":""}', '{"e":1}', '{"d":01}', "{} ", '{"a":"\n"}'):
        assert not accepts(machine, text)


def test_bounds_of_numbers_are_those_of_the_schema():
    rng = random.Random(1)
    for _ in range(60):
        schema = {"type": rng.choice(["integer", "number"])}
        for names in (["minimum", "exclusiveMinimum"], ["maximum", "exclusiveMaximum"]):
            if rng.random() < 0.7:
                schema[rng.choice(names)] = rng.randrange(-130, 130)
        valid = jsonschema.Draft202012Validator(schema).is_valid
        try:
            machine = automaton(of_schema(schema))
        except UserError:
            assert not any(map(valid, range(-300, 300)))
            continue
        for number in range(-300, 300, 1):
            assert accepts(machine, str(number)) == valid(number), (schema, number)
        for _ in range(5):
            assert valid(json.loads(sample(machine, rng, soft=6)))


def _nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "at #: keyword 'not' is not supported"),
        ({"type": "object", "patternProperties": {}}, "keyword 'patternProperties' is not supported"),
        ({"properties": {"a": {"type": "integer", "multipleOf": 3}}}, "at #/properties/a: keyword 'multipleOf'"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
        ({"type": "string", "pattern": "(?=a)"}, "at #/pattern: a look at what stands ahead"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern beside minLength and maxLength"),
        ({"type": "string", "format": "uri"}, "at #/format: it must be one of date, time"),
        ({"type": "strin"}, "at #/type: it must be one or some of object"),
        ({"type": [None, "string"]}, "at #/type: it must be one or some of object"),
        ({"type": "integer", "minItems": 3}, "minItems says nothing about the type 'integer'"),
        ({"type": "integer", "minimum": 0.5}, "at #/minimum: it must be a whole number"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no number is within"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "maxLength 2 is less than minLength 3"),
        ({"type": "string", "maxLength": -1}, "maxLength: it must be an integer >= 0"),
        ({"properties": {"a": True}, "required": ["b"]}, "required 'b' is none of the properties"),
        ({"properties": 3}, "properties must be an object"),
        ({"properties": {"a": {}}, "required": [["a"]]}, "required a list of names"),
        ({"type": "string", "format": [1]}, "at #/format: it must be one of"),
        ({"oneOf": [{"required": 3, "type": "object"}, {}]}, "at #/oneOf/0: properties must be an object"),
        ({"enum": ["\ud800"]}, "is no value of JSON"),
        ({"const": float("inf")}, "inf is no value of JSON"),
        ({"properties": {"a": False}, "required": ["a"]}, "a schema must be an object or true, got False"),
        ({"enum": []}, "enum: it must be a list of at least one value"),
        ({"enum": ["a"], "type": "integer"}, "no value of enum is of the type 'integer'"),
        ({"anyOf": []}, "anyOf: it must be a list"),
        ({"allOf": [{}, {}]}, "allOf of more than one schema"),
        ({"anyOf": [{}], "type": "object"}, "type beside anyOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "a value may be of both 0 and 1, which oneOf forbids"),
        ({"$ref": "https://example.org/x"}, "references within the schema"),
        ({"$ref": "#/$defs/x"}, "there is no '#/\\$defs/x'"),
        ({"$ref": "#"}, "a reference leads back to itself"),
        ({"properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "a reference leads back to itself"),
        ({"anyOf": [{"$ref": "#/anyOf/" + "1" * 5000}]}, "there is no '#/anyOf/1"),
        (
            {  # what `oneOf` must tell apart holds a part that has not been read
                "properties": {"a": {"oneOf": [{"$ref": "#"}] * 2}, "b": {"type": "object", "required": 3}},
                "type": "object",
                "required": ["b"],
            },
            "required a list of names",
        ),
        (3, "a schema must be an object or true, got 3"),
    ],
)
def test_what_is_not_kept_is_refused_by_its_name_and_place(schema, message):
    with pytest.raises(UserError, match=message):
        of_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        _nested(500),
        {"type": "string", "maxLength": 100_000},
        {"type": "array", "items": {"type": "object"}, "minItems": 5000},
        {"$defs": {"n": {"properties": {k: {"$ref": "#/$defs/n"} for k in map(str, range(40))}}}, "$ref": "#/$defs/n"},
        {"oneOf": [{"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]} for i in range(400)]},
        {"enum": [f"{i:0100}" for i in range(5000)]},
    ],
    ids=["deep", "long", "many", "recursive", "alternatives", "values"],
)
def test_a_schema_that_blows_up_is_refused_soon(schema):
    start_s = time.perf_counter()
    with pytest.raises(UserError, match=r"nested deeper|more than"):
        automaton(of_schema(schema))
    assert time.perf_counter() - start_s < 10
