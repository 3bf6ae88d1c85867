"""Who sees whom: masks and positions of rows against the sentences that define them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.model.rows import causal_rows, stream_rows, tree_rows, with_streams

#          0
#        1   2
#      3   4   5
PARENTS = [-1, 0, 0, 1, 1, 2]
DEPTH = np.array([0, 1, 1, 2, 2, 2])


def is_ancestor(node, of):
    while of >= 0:
        if of == node:
            return True
        of = PARENTS[of]
    return False


def tree(start):
    n = len(PARENTS)
    sees = np.array([[is_ancestor(k, i) for k in range(n)] for i in range(n)])
    return tree_rows(start, DEPTH, sees)


def sees(row, key, n, plan):
    """Eq. 1 and 2 for rows laid out stream-major behind n main rows."""
    j, node = divmod(row, n)
    key_j, key_node = divmod(key, n)
    if key_j == 0:
        return is_ancestor(key_node, node)
    if j == 0:
        return plan and key_node == node
    return key_node == node and key_j <= j


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("window", [None, 3, 5])
def test_mask_of_a_tree_with_streams(plan, window):
    n, g, prefix = 6, 4, 7
    rows = with_streams(tree(prefix), num_streams=g, at_host=False, main_sees_streams=plan)
    mask = np.array(rows.mask(prefix, window))
    assert mask.shape == (1, 1, n * (1 + g), prefix + n * (1 + g))
    where = [prefix + DEPTH[r % n] + r // n for r in range(n * (1 + g))]
    assert np.array(rows.positions)[0].tolist() == where
    for r in range(n * (1 + g)):
        for k in range(prefix + n * (1 + g)):
            at = k if k < prefix else where[k - prefix]
            wanted = k < prefix or sees(r, k - prefix, n, plan)
            wanted = wanted and (window is None or at > where[r] - window)
            assert mask[0, 0, r, k] == wanted, (r, k)
    assert np.array(rows.stream_of).tolist() == [j for j in range(1, g + 1) for _ in range(n)]


def test_streams_at_the_position_of_their_host():
    rows = with_streams(tree(3), num_streams=2, at_host=True, main_sees_streams=False)
    assert np.array(rows.positions)[0].tolist() == [*(3 + DEPTH)] * 3


def test_pruned_rows_are_the_same_rows():
    full, keep = tree(4), np.array([0, 2, 5])
    kept = full.take(mx.array(keep))
    assert kept.main == kept.count == 3
    assert np.array(kept.positions)[0].tolist() == (4 + DEPTH[keep]).tolist()
    assert np.array_equal(np.array(kept.sees)[0], np.array(full.sees)[0][np.ix_(keep, keep)])


@pytest.mark.parametrize("window", [None, 4])
def test_causal_rows(window):
    mask = np.array(causal_rows(5, 6).mask(5, window))[0, 0]
    for r in range(6):
        for k in range(11):
            assert mask[r, k] == (k <= 5 + r and (window is None or k > 5 + r - window))


@pytest.mark.parametrize("at_host", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_streams_of_many_hosts(at_host, window):
    """Training: each stream sees the prefix up to its host and its own streams up to itself."""
    hosts, g, prefix = [[1, 4, 8], [0, 2, 2]], 2, 9
    rows = stream_rows(hosts=mx.array(hosts), num_streams=g, at_host=at_host, prefix=prefix)
    mask = np.array(rows.mask(prefix, window))
    assert mask.shape == (2, 1, 6, 15)
    assert rows.main == 0
    for b in range(2):
        for r in range(6):
            j, p = r // 3 + 1, r % 3
            here = hosts[b][p] + (0 if at_host else j)
            assert np.array(rows.positions)[b, r] == here
            for k in range(15):
                if k < prefix:
                    wanted, at = k <= hosts[b][p], k
                else:
                    key_j, key_p = (k - prefix) // 3 + 1, (k - prefix) % 3
                    wanted = key_p == p and key_j <= j
                    at = hosts[b][key_p] + (0 if at_host else key_j)
                wanted = wanted and (window is None or at > here - window)
                assert mask[b, 0, r, k] == wanted, (b, r, k)


def test_streams_of_one_host_are_a_causal_chunk():
    """Deferred decoding: gamma ordinary rows behind the accepted node."""
    chunk = stream_rows(hosts=mx.array([[10]]), num_streams=3, at_host=False, prefix=None)
    plain = causal_rows(11, 3)
    assert np.array_equal(np.array(chunk.positions), np.array(plain.positions))
    assert np.array_equal(np.array(chunk.mask(11, None)), np.array(plain.mask(11, None)))
