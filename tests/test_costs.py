"""Costs: read between their points, kept in JSON, refused when they break a rule."""

import json

import numpy as np
import pytest

from mlx_specstream.decode.costs import Costs, default_costs
from mlx_specstream.errors import BadArgument

GRID = Costs(
    rows=(1, 3, 7),
    contexts=(10, 30),
    pass_ms=((10.0, 12.0, 20.0), (14.0, 20.0, 44.0)),
    deferred_ms=((2.0, 2.0, 2.0), (3.0, -1.0, 3.0)),
    inline_ms=None,
    plain_ms=(9.0, 11.0),
    measured=True,
)


@pytest.mark.parametrize(
    ("nodes", "context", "ms"),
    [(1, 10, 10), (3, 30, 20), (2, 10, 11), (5, 10, 16), (3, 20, 16), (2, 20, 14), (1, 0, 10),
     (9, 10, 24), (9, 30, 56), (1, 50, 18), (9, 50, 88)],
)  # fmt: skip
def test_costs_are_linear_between_the_points(nodes, context, ms):
    assert GRID.pass_at(nodes, context) == pytest.approx(ms)
    assert GRID.pass_at(np.array([nodes, 1]), context)[0] == pytest.approx(ms)


def test_streams_and_plain_tokens_are_read_too():
    assert GRID.streams_at("deferred", 5, 20) == pytest.approx(1.5)
    assert GRID.streams_at("deferred", 3, 30) == 0.0  # a measured difference may be noise
    assert GRID.streams_at("inline", 3, 30) == np.inf
    assert GRID.plain_at(15) == pytest.approx(9.5)
    assert GRID.plain_at(50) == pytest.approx(13)


def test_costs_survive_json():
    for table in (GRID, default_costs("gpu", 28, 3)):
        assert Costs.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", [2, 3, 7]),
        ("rows", [1]),
        ("rows", [1, 7, 3]),
        ("rows", [1, 3.0, 7]),
        ("contexts", []),
        ("contexts", [-1, 30]),
        ("contexts", [True, 30]),
        ("pass_ms", [[10.0, 12.0, 20.0]]),
        ("pass_ms", [[10.0, 12.0], [14.0, 20.0]]),
        ("pass_ms", [[0.0, 12.0, 20.0], [14.0, 20.0, 44.0]]),
        ("pass_ms", None),
        ("deferred_ms", [[2.0, float("nan"), 2.0], [3.0, 3.0, 3.0]]),
        ("deferred_ms", "fast"),
        ("inline_ms", [[1.0, 2.0, "3"], [1.0, 2.0, 3.0]]),
        ("plain_ms", [9.0, -11.0]),
        ("plain_ms", [9.0, float("inf")]),
        ("measured", 1),
    ],
)
def test_costs_that_break_a_rule_are_refused_in_one_line(field, value):
    with pytest.raises(BadArgument, match=f"'{field}'") as caught:
        Costs.from_json({**GRID.to_json(), field: value})
    assert "\n" not in str(caught.value)
    assert "mlx-specstream tune" in str(caught.value)


@pytest.mark.parametrize("data", [None, [], {}, {**GRID.to_json(), "more": 1}])
def test_costs_of_another_form_are_refused(data):
    with pytest.raises(BadArgument, match="keys"):
        Costs.from_json(data)


def test_default_costs_say_what_was_published():
    gpu = default_costs("gpu", 32, 4)
    assert not gpu.measured
    assert gpu.plain_at(5) == 1.0
    assert gpu.pass_at(3, 0) < 1.2 < gpu.pass_at(4, 0) < 1.75  # two or three nearly free
    assert 1.7 < gpu.pass_at(8, 0) < 2.8
    assert 0.15 < gpu.streams_at("deferred", 4, 0) < 0.35
    assert gpu.streams_at("inline", 4, 0) > gpu.streams_at("deferred", 4, 0)
    cpu = default_costs("cpu", 8, 2)  # docs/log.md: 47.7 and 27.2 ms beside 18.0, 11 for streams
    assert cpu.pass_at(32, 0) == pytest.approx(47.7 / 18.0, rel=0.02)
    assert cpu.pass_at(8, 0) == pytest.approx(27.2 / 18.0, rel=0.02)
    assert cpu.streams_at("deferred", 8, 0) == pytest.approx(11 / 18.0, rel=0.15)
    assert default_costs("gpu", 32, 4, linear=True).pass_at(4, 0) > 3
    with pytest.raises(BadArgument, match="device"):
        default_costs("tpu", 32, 4)
