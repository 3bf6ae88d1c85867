"""Token trees: shapes, counts, drafting against brute force, pruning, acceptance."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from reference import assert_close

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.draft import Guesses, draft, guesses_from
from mlx_specstream.decode.plan import make_plan
from mlx_specstream.decode.prune import PruneRule, edge_logprobs, nodes_to_keep
from mlx_specstream.decode.tree import Tree, TreeShape, best_first_tree, cartesian_tree, root_only
from mlx_specstream.decode.verify import accept
from mlx_specstream.errors import BadArgument


def random_guesses(rng, depth, vocabulary, count, spread=2.0):
    logits = rng.normal(size=(depth, vocabulary)) * spread
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens = np.argsort(-logprobs, axis=1)[:, :count]
    return Guesses(tokens.astype(np.int32), np.take_along_axis(logprobs, tokens, axis=1))


def paths(tree):
    """Every node as the tokens from below the root down to it."""
    out = []
    for node in range(tree.size):
        path, at = (), node
        while at:
            path, at = (int(tree.tokens[at]), *path), tree.parents[at]
        out.append(path)
    return out


def random_tree(rng, size):
    parents = [-1, *(int(rng.integers(node)) for node in range(1, size))]
    depth = [0]
    for p in parents[1:]:
        depth.append(depth[p] + 1)
    # Distinct tokens below each parent, as in every draft.
    tokens = np.arange(size) + 3
    return Tree(*(np.array(x, np.int32) for x in (tokens, parents, depth)))


@pytest.mark.parametrize(("gamma", "k"), [(3, 1), (3, 2), (3, 3), (4, 3), (3, 6)])
def test_cartesian_tree_has_the_published_size(gamma, k):
    guesses = random_guesses(np.random.default_rng(0), gamma, 11, k)
    tree = draft(7, guesses, TreeShape("cartesian", k), max_depth=gamma)
    assert tree.size == 1 + sum(k**d for d in range(1, gamma + 1))
    assert {1: 4, 2: 15, 3: 40, 6: 259}[k] == tree.size or gamma == 4
    assert sorted(paths(tree)) == sorted(
        p for d in range(gamma + 1) for p in product(*guesses.tokens[:d].tolist())
    )
    assert tree.depth.tolist() == [len(p) for p in paths(tree)]


@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])  # flat: broad trees; steep: deep ones
@pytest.mark.parametrize("size", [2, 4, 8, 23, 58])
def test_best_first_tree_equals_brute_force(size, spread):
    gamma, vocabulary = 3, 7
    full = random_guesses(np.random.default_rng(size), gamma, vocabulary, vocabulary, spread)
    count = TreeShape("best", size).candidates(vocabulary)
    guesses = Guesses(full.tokens[:, :count], full.logprobs[:, :count])
    tree = draft(5, guesses, TreeShape("best", size), max_depth=gamma)
    of = [dict(zip(t, p, strict=True)) for t, p in zip(full.tokens, full.logprobs, strict=True)]
    every = [
        path for length in range(1, gamma + 1) for path in product(range(vocabulary), repeat=length)
    ]
    every.sort(key=lambda path: -sum(of[d][t] for d, t in enumerate(path)))
    assert set(paths(tree)) == {(), *every[: size - 1]}
    assert tree.size == size
    assert all(parent < node for node, parent in enumerate(tree.parents))


def test_best_first_tree_is_bounded_by_what_there_is():
    guesses = Guesses(np.array([[4, 2]], np.int32), np.log(np.array([[0.6, 0.4]])))
    assert best_first_tree(9, guesses.tokens, guesses.logprobs, 50).size == 3
    assert best_first_tree(9, guesses.tokens, guesses.logprobs, 1).size == 1


def test_chain_and_depth_limit():
    guesses = random_guesses(np.random.default_rng(3), 4, 13, 5)
    chain = draft(1, guesses, TreeShape("chain"), max_depth=9)
    assert paths(chain)[-1] == tuple(guesses.tokens[:, 0])
    assert chain.size == 5
    assert draft(1, guesses, TreeShape("best", 30), max_depth=2).depth.max() == 2
    for nothing in (
        draft(8, guesses, TreeShape("best", 30), 0),
        draft(8, None, TreeShape("chain"), 4),
    ):
        assert nothing.tokens.tolist() == root_only(8).tokens.tolist() == [8]


def test_ancestors_children_and_sub_trees():
    tree = random_tree(np.random.default_rng(1), 17)
    named = paths(tree)
    for i, k in product(range(17), repeat=2):
        assert tree.ancestors[i, k] == (named[i][: len(named[k])] == named[k])
    for node in range(1, 17):
        assert tree.child(int(tree.parents[node]), int(tree.tokens[node])) == node
    assert tree.child(0, 999) is None
    keep = np.array([n for n in range(17) if n != 5 and not tree.ancestors[n, 5]])
    assert paths(tree.take(keep)) == [named[n] for n in keep]


def test_duplicate_tokens_of_two_branches_are_two_nodes():
    tree = cartesian_tree(0, np.array([[1, 2], [1, 2]]))
    assert tree.child(1, 2) != tree.child(2, 2)
    assert tree.child(0, 2) == 2


def test_trees_that_would_not_fit_in_memory_are_refused():
    config = StreamConfig(num_streams=4)
    assert make_plan(config, "cartesian:7").tree.nodes(4) == 2801
    with pytest.raises(BadArgument, match=r"'cartesian:8' has 4681 nodes with 4 streams"):
        make_plan(config, "cartesian:8")
    assert make_plan(config, "best:4096").tree.nodes(4) == 4096
    assert make_plan(config, "chain").tree.nodes(4) == 5


@pytest.mark.parametrize("text", ["chain", "cartesian:3", "best:16"])
def test_shape_reads_what_it_writes(text):
    assert str(TreeShape.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "best", "best:", "best:0", "best:-3", "chain:2", "tree:4", "best:4x", "best:99999"]
)
def test_shape_refuses(text):
    with pytest.raises(BadArgument, match=r"\[tree\].*got '") as caught:
        TreeShape.parse(text)
    assert "\n" not in str(caught.value)


def test_guesses_are_the_likeliest_tokens_and_ties_go_to_the_lower_id():
    logits = np.random.default_rng(2).normal(size=(3, 29)).astype(np.float32)
    logits[1, [4, 9, 20]] = 7.0
    got = guesses_from(mx.array(logits), 6)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :6]
    assert np.array_equal(got.tokens, order)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert_close(got.logprobs, np.take_along_axis(logits - lse, order, axis=1), 1e-6)
    assert guesses_from(mx.array(logits), 29).tokens.shape == (3, 29)


def test_edge_probabilities_are_those_of_the_child_given_its_parent():
    tree = random_tree(np.random.default_rng(4), 9)
    logits = np.random.default_rng(5).normal(size=(9, 31)).astype(np.float32)
    got = edge_logprobs(tree, mx.array(logits))
    for node in range(1, 9):
        row = logits[tree.parents[node]].astype(np.float64)
        want = row[tree.tokens[node]] - np.log(np.exp(row).sum())
        assert_close(got[node], np.array(want), 1e-5, f"node {node}")
    assert got[0] == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_pruning_keeps_whole_paths_and_the_best_ones(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, 23)
    logprobs = np.where(np.arange(23) == 0, 0.0, np.log(rng.uniform(0.05, 1.0, 23)))
    along = [sum(logprobs[k] for k in range(23) if tree.ancestors[n, k]) for n in range(23)]
    kept = nodes_to_keep(tree, logprobs, PruneRule(keep=8))
    assert len(kept) == 8
    assert sorted(along)[-8:] == sorted(along[n] for n in kept)
    kept_2 = nodes_to_keep(tree, logprobs, PruneRule(threshold=0.3))
    wanted = [
        n
        for n in range(23)
        if all(np.exp(logprobs[k]) >= 0.3 for k in range(23) if tree.ancestors[n, k])
    ]
    assert kept_2.tolist() == wanted
    for nodes in (kept, kept_2):
        assert nodes[0] == 0
        assert set(tree.parents[nodes[1:]]) <= set(nodes)


def test_pruning_never_drops_the_root_or_a_parent_of_a_kept_node():
    tree = random_tree(np.random.default_rng(6), 12)
    certain = np.zeros(12)  # P = 1 everywhere: equal scores must keep parents first
    for keep in range(1, 13):
        nodes = nodes_to_keep(tree, certain, PruneRule(keep=keep))
        assert len(nodes) == keep
        assert set(tree.parents[nodes[1:]]) <= set(nodes)
    assert nodes_to_keep(tree, np.full(12, -np.inf), PruneRule(threshold=1.0)).size <= 1
    assert nodes_to_keep(tree, certain - 5, PruneRule(threshold=0.0)).size == 12


@pytest.mark.parametrize(
    "values", [{}, {"keep": 2, "threshold": 0.1}, {"keep": 0}, {"threshold": 1.5}]
)
def test_prune_rule_refuses(values):
    with pytest.raises(BadArgument, match=r"\[prune\]"):
        PruneRule(**values)


#        root 7 -> 1 -> 4 -> 6
#               -> 2 -> 4
TREE = Tree(
    np.array([7, 1, 2, 4, 4, 6], np.int32),
    np.array([-1, 0, 0, 1, 2, 3], np.int32),
    np.array([0, 1, 1, 2, 2, 3], np.int32),
)


@pytest.mark.parametrize(
    ("says", "limit", "stop", "path", "tokens"),
    [
        ({0: 9}, 9, (), [0], [9]),  # nothing matches: the correction alone
        ({0: 2, 2: 4, 4: 0}, 9, (), [0, 2, 4], [2, 4, 0]),
        ({0: 1, 1: 4, 3: 6, 5: 5}, 9, (), [0, 1, 3, 5], [1, 4, 6, 5]),  # one more than the depth
        ({0: 1, 1: 4}, 2, (), [0, 1], [1, 4]),  # the limit ends a path that goes on
        ({0: 1, 1: 4}, 9, (4,), [0, 1], [1, 4]),  # and so does the end of the text
        ({0: 1}, 1, (), [0], [1]),
    ],
)
def test_accept_follows_the_choices(says, limit, stop, path, tokens):
    asked = []

    def choose(node):
        asked.append(node)
        return says[node]

    accepted = accept(TREE, choose, limit=limit, stop=stop)
    assert accepted.path == path == asked  # once per node of the path, in order
    assert accepted.tokens == tokens
