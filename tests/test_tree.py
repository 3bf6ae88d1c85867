"""Token trees: shapes, counts, drafting against brute force, pruning, acceptance."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from reference import assert_close

from mlx_specstream.config import StreamConfig
from mlx_specstream.decode.draft import (
    CopiedText,
    Guesses,
    Promises,
    draft,
    guesses_from,
    padded,
    size_of,
)
from mlx_specstream.decode.plan import make_plan
from mlx_specstream.decode.prune import PruneRule, edge_logprobs, nodes_to_keep
from mlx_specstream.decode.tree import HostTree, Tree, TreeShape
from mlx_specstream.decode.verify import accept, descend
from mlx_specstream.errors import BadArgument


def random_guesses(rng, depth, vocabulary, count, spread=2.0):
    logits = rng.normal(size=(depth, vocabulary)) * spread
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens = np.argsort(-logprobs, axis=1)[:, :count]
    top = np.take_along_axis(logprobs, tokens, axis=1)
    return Guesses(mx.array(tokens.astype(np.int32)), mx.array(top.astype(np.float32)))


def copied(tokens, probabilities, slots):
    padded = np.full(slots, -1, np.int32)
    logs = np.full((2, slots), -20.0, np.float32)
    padded[: len(tokens)] = tokens
    logs[:, : len(tokens)] = np.log([probabilities, 1 - np.array(probabilities)])
    return CopiedText(mx.array(padded), mx.array(logs))


def make(root, guesses, kind, size=1, text=None):
    shape = TreeShape(kind, size)
    most = size_of(guesses, text, shape)
    return draft(mx.array(root), guesses, text, shape, min(most, size) if kind == "best" else most)


def paths(tree):
    """Every node as the tokens from below the root down to it."""
    tokens, parents, out = np.array(tree.tokens), np.array(tree.parents), []
    for node in range(tree.size):
        path, at = (), node
        while at:
            path, at = (int(tokens[at]), *path), int(parents[at])
        out.append(path)
    return out


def tree_of(tokens, parents):
    """A Tree from the parents of its nodes (the root's is itself)."""
    n = len(parents)
    sees = np.eye(n, dtype=bool)
    for node in range(1, n):
        sees[node] |= sees[parents[node]]
    depth = sees.sum(axis=1) - 1
    as_int = lambda x: mx.array(np.array(x, np.int32))  # noqa: E731
    return Tree(as_int(tokens), as_int(parents), as_int(depth), mx.array(sees), mx.zeros(n) > 0)


def random_tree(rng, size):
    # Distinct tokens below each parent, as in every draft.
    return tree_of(np.arange(size) + 3, [0, *(int(rng.integers(n)) for n in range(1, size))])


@pytest.mark.parametrize(("gamma", "k"), [(3, 1), (3, 2), (3, 3), (4, 3), (3, 6)])
def test_cartesian_tree_has_the_published_size(gamma, k):
    guesses = random_guesses(np.random.default_rng(0), gamma, 11, k)
    tree = make(7, guesses, "cartesian", k)
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
    tree = make(5, guesses, "best", size)
    every = brute_force(full, vocabulary)
    assert set(paths(tree)) == {(), *[path for _, path in every[: size - 1]]}
    assert tree.size == size
    parents = np.array(tree.parents)
    assert (parents[1:] < np.arange(1, size)).all()
    sees = np.array(tree.ancestors)
    named = paths(tree)
    for i, k in product(range(size), repeat=2):
        assert sees[i, k] == (named[i][: len(named[k])] == named[k])
    want = [np.exp(p) for p, _ in every[: size - 1]]
    got = Promises.of(guesses, None, TreeShape("best", size)).probabilities
    assert_close(got[: size - 1], np.array(want), 1e-5)


def brute_force(guesses, vocabulary, text=(), probabilities=()):
    """Every path and its log-probability, most probable first; a copied text mixed in by hand."""
    tokens, logprobs = np.array(guesses.tokens), np.array(guesses.logprobs, np.float64)
    of = [dict(zip(t.tolist(), p, strict=True)) for t, p in zip(tokens, logprobs, strict=True)]
    every = []
    for length in range(1, len(of) + 1):
        for path in product(range(vocabulary), repeat=length):
            score = 0.0
            for d, token in enumerate(path):
                edge = of[d][token]
                if path[:d] == tuple(text[:d]) and d < len(text):
                    p = probabilities[d]
                    edge = max(edge, np.log(p)) if token == text[d] else edge + np.log(1 - p)
                score += edge
            every.append((score, path))
    for length in range(len(of) + 1, len(text) + 1):  # beyond the streams' reach
        every.append((np.log(probabilities[:length]).sum(), tuple(text[:length])))
    return sorted(every, key=lambda e: -e[0])


@pytest.mark.parametrize("text", [(), (2, 6, 1, 0)])
def test_ranks_of_accepted_nodes_equal_brute_force(text):
    full = random_guesses(np.random.default_rng(9), 3, 7, 7)
    odds = [0.7, 0.6, 0.55, 0.5][: len(text)]
    every = [path for _, path in brute_force(full, 7, text, odds)]
    guess = [int(row[0]) for row in full.tokens.tolist()]
    made = copied(text, odds, 5) if text else None
    promises = Promises.of(full, made, TreeShape("best", 400))  # every node
    for path in ([], guess[:1], guess, [guess[0], int(full.tokens[1, 2])], list(text), [5, 5, 5]):
        got = promises.ranks(path)
        want = [every.index(tuple(path[: d + 1])) for d in range(len(got))]
        assert got == want, path
        assert len(got) == len(path) or path == [5, 5, 5]


@pytest.mark.parametrize("size", [3, 6, 13, 30])
@pytest.mark.parametrize("seed", range(4))
def test_a_copied_text_competes_in_the_same_tree(size, seed):
    """Where it agrees with guesses it raises them, elsewhere it is a branch of its own."""
    rng = np.random.default_rng(seed)
    gamma, vocabulary, slots = 3, 7, 6
    full = random_guesses(rng, gamma, vocabulary, vocabulary, 1.0)
    text = rng.integers(0, vocabulary, 5).tolist()
    sure = rng.uniform(0.4, 0.95, 5)
    tree = make(5, full, "best", size, copied(text, sure, slots))
    # Off the copied text a node must be one that a tree of guesses alone may hold.
    ranks, tokens = TreeShape("best", size).ranks(gamma, vocabulary), np.array(full.tokens)
    legal = {tuple(int(tokens[d, r]) for d, r in enumerate(row) if r >= 0) for row in ranks}
    legal |= {tuple(text[:d]) for d in range(1, 6)}
    every = brute_force(full, vocabulary, text, sure)
    want = [path for _, path in every if path in legal][: size - 1]
    assert set(paths(tree)) == {(), *want}
    assert len(set(paths(tree))) == size, "a node stands twice"


@pytest.mark.parametrize(
    ("kind", "size", "gamma"), [("chain", 1, 3), ("cartesian", 2, 3), ("best", 16, 1)]
)
def test_a_text_that_says_what_the_guesses_say_stands_above_a_node_once(kind, size, gamma):
    """Trees with room for every slot hold a node twice: of equal nodes all count as the first."""
    guesses = random_guesses(np.random.default_rng(7), gamma, 9, 8)
    text = [*guesses.tokens[:, 0].tolist(), 6, 5]
    tree = make(3, guesses, kind, size, copied(text, [0.8] * len(text), len(text)))
    said, first = paths(tree), {}
    for node, path in enumerate(said):
        first.setdefault(path, node)
    assert len(first) < tree.size, "none stands twice here"
    assert tree.ancestors.sum(axis=1).tolist() == [len(path) + 1 for path in said]
    assert tree.parents.tolist()[1:] == [first[path[:-1]] for path in said[1:]]


def test_a_copied_text_without_streams_is_a_chain():
    tree = make(9, None, "best", 5, copied([4, 4, 2, 6], [0.9, 0.8, 0.7, 0.6], 5))
    assert paths(tree) == [(), (4,), (4, 4), (4, 4, 2), (4, 4, 2, 6)]
    assert tree.tokens.tolist()[0] == 9
    assert np.array(tree.copied).tolist() == [False, True, True, True, True]
    assert make(9, None, "best", 4).tokens.tolist() == [9]


def test_a_copied_text_whose_tokens_no_stream_guesses_has_its_own_branch():
    guesses = random_guesses(np.random.default_rng(1), 2, 9, 3)
    strange = next(t for t in range(9) if t not in guesses.tokens[0].tolist())
    tree = make(0, guesses, "best", 7, copied([strange, 8, 8], [0.99, 0.99, 0.99], 4))
    assert {(strange,), (strange, 8), (strange, 8, 8)} <= set(paths(tree))


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 11])
def test_streams_and_text_that_are_not_there_change_no_tree(size, conditioned):
    """Filled up to all streams and with an empty text, so that one trace serves: the same nodes."""
    rng = np.random.default_rng(size)
    few = random_guesses(rng, 2, 50, 4)
    if conditioned:
        edges = np.log(rng.dirichlet(np.ones(4), size=(2, 4))).astype(np.float32)
        edges[0] = edges[0, 0]
        few = Guesses(few.tokens, mx.array(edges))
    want = make(5, few, "best", size)
    every, nothing = padded(few, 6), CopiedText.of([], [], 3)
    assert every.tokens.shape == (6, 4)
    assert every.logprobs.shape == ((6, 4, 4) if conditioned else (6, 4))
    for text in (None, nothing):
        tree = draft(mx.array(5), every, text, TreeShape("best", size), size)
        for ours, plain in zip(tree, want, strict=True):
            assert ours.tolist() == plain.tolist()
    # Where there are no others, unlikely ones fill it: each once, or rows would see a row that is not theirs.
    full = draft(mx.array(5), every, nothing, TreeShape("best", 40), 40)
    assert len(set(paths(full))) == full.size == 40
    assert padded(few, 2) is few


def test_a_tree_is_bounded_by_what_there_is():
    guesses = Guesses(mx.array([[4, 2]]), mx.log(mx.array([[0.6, 0.4]])))
    assert make(9, guesses, "best", 50).size == 3
    assert make(9, guesses, "best", 1).size == 1


def test_chain():
    guesses = random_guesses(np.random.default_rng(3), 4, 13, 5)
    chain = make(1, guesses, "chain")
    assert paths(chain)[-1] == tuple(guesses.tokens[:, 0].tolist())
    assert chain.size == 5
    assert chain.parents.tolist() == [0, 0, 1, 2, 3]


def test_children_and_sub_trees():
    tree = random_tree(np.random.default_rng(1), 17)
    named, host = paths(tree), HostTree.of(tree)
    for node in range(1, 17):
        assert host.child(int(host.parents[node]), int(host.tokens[node])) == node
    assert host.child(0, 999) is None
    keep = [n for n in range(17) if n != 5 and not np.array(tree.ancestors)[n, 5]]
    small = tree.take(mx.array(keep))
    assert paths(small) == [named[n] for n in keep]
    assert small.depth.tolist() == [len(named[n]) for n in keep]


def test_duplicate_tokens_of_two_branches_are_two_nodes():
    guesses = Guesses(mx.array([[1, 2], [1, 2]]), mx.log(mx.full((2, 2), 0.5)))
    tree = make(0, guesses, "cartesian", 2)
    assert sorted(paths(tree)) == [(), (1,), (1, 1), (1, 2), (2,), (2, 1), (2, 2)]


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


@pytest.mark.parametrize(("V", "count"), [(29, 6), (29, 29), (32 * 9, 3), (32 * 40 + 5, 11)])
def test_guesses_are_the_likeliest_tokens(V, count):
    logits = 2 * np.random.default_rng(2).normal(size=(3, V)).astype(np.float32)
    got = guesses_from(mx.array(logits), count)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    assert np.array_equal(np.array(got.tokens), order)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    exact = np.take_along_axis(logits - lse, order, axis=1)
    if count >= V // 32:
        assert_close(got.logprobs, exact, 1e-6)
    else:  # normalised over the blocks that hold them: never less, and the order stays
        more = np.array(got.logprobs) - exact
        assert (more >= -1e-5).all()
        assert np.ptp(more, axis=1).max() < 1e-5


def test_guesses_of_a_draft_vocabulary_are_real_tokens():
    logits, ids = mx.array([[0.1, 3.0, 2.0]]), mx.array([17, 4, 99])
    assert guesses_from(logits, 2, ids).tokens.tolist() == [[4, 99]]


def test_edge_probabilities_are_those_of_the_child_given_its_parent():
    tree = random_tree(np.random.default_rng(4), 9)
    logits = np.random.default_rng(5).normal(size=(9, 31)).astype(np.float32)
    got = np.array(edge_logprobs(tree, mx.array(logits)))
    parents, tokens = np.array(tree.parents), np.array(tree.tokens)
    for node in range(1, 9):
        row = logits[parents[node]].astype(np.float64)
        want = row[tokens[node]] - np.log(np.exp(row).sum())
        assert_close(got[node], np.array(want), 1e-5, f"node {node}")
    assert got[0] == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_pruning_keeps_whole_paths_and_the_best_ones(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, 23)
    sees, parents = np.array(tree.ancestors), np.array(tree.parents)
    logprobs = np.where(np.arange(23) == 0, 0.0, np.log(rng.uniform(0.05, 1.0, 23)))
    along = [sum(logprobs[k] for k in range(23) if sees[n, k]) for n in range(23)]
    scores = mx.array(logprobs.astype(np.float32))
    kept = nodes_to_keep(tree, scores, PruneRule(keep=8)).tolist()
    assert len(kept) == 8
    assert sorted(along)[-8:] == sorted(along[n] for n in kept)
    kept_2 = nodes_to_keep(tree, scores, PruneRule(threshold=0.3)).tolist()
    assert kept_2 == [
        n for n in range(23) if all(np.exp(logprobs[k]) >= 0.3 for k in range(23) if sees[n, k])
    ]
    for nodes in (kept, kept_2):
        assert nodes[0] == 0
        assert {int(parents[n]) for n in nodes[1:]} <= set(nodes)


def test_pruning_never_drops_the_root_or_a_parent_of_a_kept_node():
    tree = random_tree(np.random.default_rng(6), 12)
    parents = np.array(tree.parents)
    for scores in (mx.zeros(12), mx.full((12,), -500.0)):  # equal scores must keep parents first
        for keep in range(1, 13):
            nodes = nodes_to_keep(tree, scores, PruneRule(keep=keep)).tolist()
            assert len(nodes) == keep
            assert {int(parents[n]) for n in nodes[1:]} <= set(nodes)
    assert nodes_to_keep(tree, mx.full((12,), -mx.inf), PruneRule(threshold=1.0)).size <= 1
    assert nodes_to_keep(tree, mx.full((12,), -5.0), PruneRule(threshold=0.0)).size == 12


@pytest.mark.parametrize(
    "values", [{}, {"keep": 2, "threshold": 0.1}, {"keep": 0}, {"threshold": 1.5}]
)
def test_prune_rule_refuses(values):
    with pytest.raises(BadArgument, match=r"\[prune\]"):
        PruneRule(**values)


#        root 7 -> 1 -> 4 -> 6
#               -> 2 -> 4
TREE = tree_of([7, 1, 2, 4, 4, 6], [0, 0, 0, 1, 2, 3])
SAYS = [
    ({0: 9}, [0], [9]),  # nothing matches: the correction alone
    ({0: 2, 2: 4, 4: 0}, [0, 2, 4], [2, 4, 0]),
    ({0: 1, 1: 4, 3: 6, 5: 5}, [0, 1, 3, 5], [1, 4, 6, 5]),  # one more than the depth
    ({0: 1, 1: 5, 2: 4, 3: 6}, [0, 1], [1, 5]),  # what other branches say is of no account
]


@pytest.mark.parametrize(("says", "path", "tokens"), SAYS)
def test_accept_follows_the_choices(says, path, tokens):
    chosen = mx.array([says.get(n, 0) for n in range(6)])
    got = accept(TREE, chosen, 4)
    count, tie, *rest = got.report.tolist()
    assert (count, tie) == (len(path), 0)
    assert rest[:5] == [*path, *[0] * (5 - len(path))] == got.path.tolist()
    assert rest[5 : 5 + count] == tokens
    assert got.count.item() == count


def test_accept_stops_before_a_near_tie():
    says = mx.array([1, 4, 0, 6, 0, 5])
    for unsure, count in (([], 4), ([3], 2), ([1], 1), ([0], 0), ([2, 4], 4), ([5], 3)):
        sure = mx.array([n not in unsure for n in range(6)])
        got = accept(TREE, says, 3, sure)
        total, tie, *_ = got.report.tolist()
        assert got.count.item() == total - tie == count
        assert tie == (count < 4)


@pytest.mark.parametrize(
    ("says", "limit", "stop", "path", "tokens"),
    [
        *[(says, 9, (), path, tokens) for says, path, tokens in SAYS],
        ({0: 1, 1: 4}, 2, (), [0, 1], [1, 4]),  # the limit ends a path that goes on
        ({0: 1, 1: 4}, 9, (4,), [0, 1], [1, 4]),  # and so does the end of the text
        ({0: 1}, 1, (), [0], [1]),
    ],
)
def test_descend_asks_once_per_node_of_the_path(says, limit, stop, path, tokens):
    asked = []

    def choose(node):
        asked.append(node)
        return says[node]

    assert descend(HostTree.of(TREE), choose, limit=limit, stop=stop) == (path, tokens)
    assert asked == path
