"""Which schemas only endless JSON would fulfil."""

import pytest

from mlx_redrafter.constraints.endless import endless

LEAF = {"type": "object", "properties": {"next": {"$ref": "#/$defs/b"}}, "required": ["next"]}
BACK = {"$ref": "#/$defs/a"}
AROUND = {"$defs": {"a": LEAF, "b": BACK}, **BACK}


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"$ref": "#"}, "#"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, ""),
        ({"allOf": [{"$ref": "#"}, {"type": "null"}]}, "#"),
        (AROUND, "#/$defs/a"),
        (AROUND | {"$defs": {"a": LEAF | {"required": []}, "b": BACK}}, ""),
        (AROUND | {"$defs": {"a": LEAF | {"type": ["object", "string"]}, "b": BACK}}, ""),
        ({"type": "array", "items": {"$ref": "#"}}, ""),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#"),
        ({"type": "array", "prefixItems": [{"$ref": "#"}, {}], "minItems": 0}, ""),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2}, "#"),
        ({"enum": [1], "properties": {"a": {"$ref": "#"}}}, ""),
        ({"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}}, "#"),
        ({"type": "object", "required": ["a"], "patternProperties": {"^a": {"$ref": "#"}}}, "#"),
        ({"type": "object", "required": ["b"], "patternProperties": {"^a": {"$ref": "#"}}}, ""),
        (
            {"$id": "x:y", "type": "object", "required": ["a"], "properties": {"a": {"$ref": "x:y"}}},
            "x:y",
        ),
        ({"$defs": {"a": {"$ref": "#/%24defs/a"}}, "$ref": "#/%24defs/a"}, "#/%24defs/a"),
    ],
)
def test_endless(schema, where):
    """If this fails, a schema without an end is taken, or one with an end refused."""
    assert endless(schema) == where


def test_long_ways_are_short():
    """If this fails, a schema of many references holds a server up."""
    steps = {f"n{i}": {"allOf": [{"$ref": f"#/$defs/n{i * 7919 % 5000 + 1}"}]} for i in range(5000)}
    assert endless({"$defs": steps | {"n5000": {"type": "null"}}, "$ref": "#/$defs/n0"}) in (
        "",
        "#/$defs/n0",
        "#/$defs/n1",
    )
