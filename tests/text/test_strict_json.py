import json

import pytest

from jaxpost.text import strict_json


def nested(levels):
    return '{"a": ' * (levels // 2) + "[" * (levels - levels // 2) + "]" * (levels - levels // 2) + "}" * (levels // 2)


def test_nesting_is_refused_at_one_depth_on_every_python():
    for levels in (strict_json.DEEPEST - 1, strict_json.DEEPEST):
        text = f"[{nested(levels - 1)}, 1, {{}}]"
        assert strict_json.loads(text) == json.loads(text)
    for levels in (strict_json.DEEPEST + 1, 900, 100_000):
        with pytest.raises(RecursionError):
            strict_json.loads(nested(levels))


def test_many_brackets_side_by_side_are_not_deep():
    assert strict_json.loads(json.dumps([{"a": [i]} for i in range(1000)])) == [{"a": [i]} for i in range(1000)]
    assert strict_json.loads(json.dumps("[" * 1000)) == "[" * 1000
