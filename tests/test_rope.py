"""One position per row: the table of cosines and sines turns as the stock rope does."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import rope_utils
from reference import assert_close
from tiny_models import LLAMA3_ROPE, attached

from mlx_specstream.model import seams as seams_file
from mlx_specstream.model.rope import has_table, rope_rows, rope_table, signature, turn
from mlx_specstream.model.rows import Rows, causal_rows
from mlx_specstream.model.seams import Pass

BATCH, HEADS, ROWS, WIDTH = 2, 3, 7, 24
POSITIONS = [[0, 1, 1, 5, 130, 4095, 2], [9, 9, 8, 300, 0, 17, 2047]]


def llama3(**changes):
    scaling = {**LLAMA3_ROPE, **changes}
    return rope_utils.Llama3RoPE(WIDTH, 512, False, 10000.0, scaling)


TABLED = {
    "plain": lambda: nn.RoPE(WIDTH),
    "base": lambda: nn.RoPE(WIDTH, base=500.0),
    "traditional": lambda: nn.RoPE(WIDTH, traditional=True),
    "partial": lambda: nn.RoPE(WIDTH - 8),
    "partial traditional": lambda: nn.RoPE(10, traditional=True),
    "scaled": lambda: nn.RoPE(WIDTH, scale=0.25),
    "all": lambda: nn.RoPE(WIDTH - 2, traditional=True, base=77.0, scale=1.7),
    "llama3": llama3,
}
OTHERS = {
    "yarn": lambda: rope_utils.YarnRoPE(WIDTH, scaling_factor=8.0, mscale=0.7),
    "su": lambda: rope_utils.SuScaledRoPE(
        WIDTH, original_max_position_embeddings=16, long_factor=[1.5] * (WIDTH // 2)
    ),
    "proportional": lambda: rope_utils.ProportionalRoPE(WIDTH, WIDTH - 8),
}


def some_rows(seed=0, dtype=mx.float32):
    x = np.random.default_rng(seed).normal(size=(BATCH, HEADS, ROWS, WIDTH))
    return mx.array(x.astype(np.float32)).astype(dtype)


def row_by_row(rope, x, positions):
    """The stock rope on one row at a time, at one plain number."""
    rows = [
        [rope(x[b : b + 1, :, r : r + 1], offset=positions[b][r]) for r in range(x.shape[2])]
        for b in range(x.shape[0])
    ]
    return mx.concatenate([mx.concatenate(row, axis=2) for row in rows], axis=0)


@pytest.mark.parametrize("name", TABLED)
def test_the_table_turns_as_the_stock_rope(name):
    rope, x = TABLED[name](), some_rows()
    want = row_by_row(rope, x, POSITIONS)
    cos, sin = rope_table(rope, rope.dims, rope.traditional, mx.array(POSITIONS))
    assert cos.shape == sin.shape == (BATCH, 1, ROWS, rope.dims // 2)
    assert_close(turn(x, (cos, sin), rope.dims, rope.traditional), want, 1e-6, name)
    assert_close(cos**2 + sin**2, np.ones(cos.shape), 1e-5)
    moved = mx.array(POSITIONS) + 1
    other = turn(
        x, rope_table(rope, rope.dims, rope.traditional, moved), rope.dims, rope.traditional
    )
    with pytest.raises(AssertionError):
        assert_close(other, want, 1e-2)


def test_one_line_of_positions_is_for_the_whole_batch():
    rope, x = TABLED["partial"](), some_rows(1)
    table = rope_table(rope, rope.dims, False, mx.array(POSITIONS[1:]))
    assert_close(turn(x, table, rope.dims, False), row_by_row(rope, x, POSITIONS[1:] * 2), 1e-6)


@pytest.mark.parametrize("name", [*TABLED, *OTHERS])
def test_rows_of_the_stock_rope(name):
    """What every other rope, and every other type of number, goes through."""
    rope = {**TABLED, **OTHERS}[name]()
    for dtype, tolerance in ((mx.float32, 1e-6), (mx.float16, 2e-3)):
        x = some_rows(2, dtype)
        got = rope_rows(rope, x + 0, mx.array(POSITIONS))
        assert got.dtype == dtype
        assert_close(got, row_by_row(rope, x, POSITIONS), tolerance, name)


def test_which_ropes_have_a_table():
    x = some_rows()
    assert all(has_table(make(), x) for make in TABLED.values())
    assert not any(has_table(make(), x) for make in OTHERS.values())
    for dtype in (mx.float16, mx.bfloat16):
        assert not has_table(nn.RoPE(WIDTH), x.astype(dtype))


def test_no_table_on_a_gpu(monkeypatch):
    """There the stock rope is one kernel."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert not has_table(nn.RoPE(WIDTH), some_rows())


def test_ropes_share_a_table_only_if_they_turn_alike():
    makes = [*TABLED.values(), *OTHERS.values(), lambda: llama3(factor=5.0)]
    names = [signature(make()) for make in makes]
    assert names == [signature(make()) for make in makes]
    assert len(set(names)) == len(makes)


@pytest.fixture
def tables(monkeypatch):
    """The positions of every table that passes make."""
    made = []

    def counted(rope, dims, traditional, positions):
        made.append(positions.tolist())
        return rope_table(rope, dims, traditional, positions)

    monkeypatch.setattr(seams_file, "rope_table", counted)
    return made


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama", 1),
        ("llama:traditional-rope", 1),
        ("llama:linear-rope", 1),
        ("llama:llama3-rope", 1),
        ("phi", 1),
        ("gemma3_text", 2),  # two kinds of layers, two bases
        ("qwen3:yarn", 0),
        ("phi3", 0),
        ("smollm3", 1),  # every second layer has no rope
    ],
)
def test_a_pass_makes_one_table_for_each_kind_of_rope(tables, name, count):
    seams = attached(name)
    tokens = mx.array([[5, 17, 3, 40, 2]])
    want = seams.model(tokens)
    got = seams.forward(Pass(causal_rows(0, 5)), tokens)
    assert_close(got, want, 1e-5, "logits of a causal pass")
    assert tables == [[[0, 1, 2, 3, 4]]] * count


def test_other_rows_need_another_table(tables):
    """Two passes, and streams that come in at the cut of one, do not share what they made."""
    seams = attached()
    tokens = mx.array([[5, 17, 3]])
    for start in (0, 4):
        rows = causal_rows(start, 3)
        assert isinstance(rows, Rows)
        mx.eval(seams.forward(Pass(rows, at_cut=seams.add_streams), tokens))
    main, later = [0, 1, 2], [4, 5, 6]
    g = seams.streams.config.num_streams
    wanted = []
    for host in (main, later):
        wanted += [[host], [host + [p + j for j in range(1, g + 1) for p in host]]]
    assert tables == wanted


def test_sixteen_bits_go_the_stock_way(tables):
    seams = attached()
    seams.model.set_dtype(mx.bfloat16)
    tokens = mx.array([[5, 17, 3, 40]])
    got = seams.forward(Pass(causal_rows(0, 4)), tokens)
    assert_close(got, seams.model(tokens), 0.03)
    assert tables == []
