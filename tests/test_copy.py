"""Copied drafts: what is found, how it is spelt, how sure it is said to be, what it costs."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny_models import make_tokenizer

from mlx_specstream.decode import copy
from mlx_specstream.decode.copy import Calibration, Copied, Copier
from mlx_specstream.errors import BadArgument

MODEL = Path(__file__).resolve().parents[1] / "examples/models/e2e-sql-14m-4bit"
# An odd id is one that no tokenizer here has; 2**70 fits no integer type of theirs.
ODD = [4096, -1, 10**9, 2**70]
SPACE = "\u2581"  # how SentencePiece writes a space


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE, the real one of the bundled model; halves of characters are tokens."""
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def pieces():
    """Built like llama's: a space before every text, <s> before every prompt, bytes at need."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "Blue",
        f"{SPACE}Blue",
        f"{SPACE}Spice",
        "[",
        "]",
        f"{SPACE}name",
        "The",
        f"{SPACE}The",
    ]
    words += ["Win", f"{SPACE}Win", "ter", "Winter", f"{SPACE}Garden", f"{SPACE}near", SPACE]
    words += [*"abcdefghijklmnopqrstuvwxyzBSTGW", "咖", "啡", "馆", f"{SPACE}咖"]
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    scores += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scores += [(word, -4.0 - 2.0 * (len(word) == 1)) for word in words]
    inner = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [  # like many, it makes one space of several and of line breaks
            normalizers.Prepend(SPACE),
            normalizers.Replace(Regex(r"\s+"), SPACE),
            normalizers.Replace(SPACE * 2, SPACE),
        ]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=inner, **special))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def after(tokenizer, prompt: str, answer: list[int] | str, **settings) -> Copied:
    """The proposal after an answer, which is encoded by itself if it is text."""
    if isinstance(answer, str):
        answer = ids(tokenizer, answer)
    copier = Copier(tokenizer, ids(tokenizer, prompt), **settings)
    copier.extend(answer)
    return copier.propose()


def says(tokenizer, copied: Copied) -> list[str]:
    return [tokenizer.decode([token]) for token in copied.tokens]


def random_tokens(seed: int, count: int, odd: bool = True) -> list[int]:
    """Few different tokens, so that matches abound: letters, halves, specials, unknown ids."""
    rng = random.Random(seed)
    alphabet = rng.sample(range(4096), 12) + rng.sample(range(3, 260), 8) + [0, 1, 2]
    alphabet += ODD if odd else []
    out = []
    while len(out) < count:
        start = rng.randrange(len(out) + 1)
        out += out[start : start + rng.randrange(9)] if rng.random() < 0.4 else []
        out.append(rng.choice(alphabet))
    return out[:count]


# what is found


def test_the_longest_suffix_wins_then_the_latest_place():
    tokenizer = make_tokenizer()
    longest = [11, 12, 13, 20, 30, 9, 12, 13, 21, 31, 9, 13, 22, 32, 8, 11, 12, 13]
    assert Copier(tokenizer, longest, longest=2).propose().tokens == [20, 30]
    latest = [12, 13, 20, 30, 9, 12, 13, 21, 31, 8, 12, 13]
    assert Copier(tokenizer, latest, longest=2).propose().tokens == [21, 31]


def test_nothing_is_proposed_where_nothing_matches():
    tokenizer = make_tokenizer()
    assert Copier(tokenizer, [11, 12, 13, 14]).propose() == Copied([], [], [])
    assert Copier(tokenizer, []).propose().tokens == []
    assert Copier(tokenizer, [11]).propose().tokens == []
    assert Copier(tokenizer, [11, 11]).propose().tokens != []


def test_a_copy_of_the_end_goes_on_with_itself():
    proposal = Copier(make_tokenizer(), [40, 11, 12, 11, 12], longest=5).propose()
    assert proposal.tokens == [11, 12, 11, 12, 11]


@pytest.mark.parametrize("longest", [1, 3, 8])
def test_a_proposal_has_at_most_longest_tokens(bpe, longest):
    prompt = "<s>name[Winter Garden Hotel], area[city centre], near[The Blue Spice]\nText:"
    for answer in (" near", " Win"):  # by token ids, by text
        assert 1 <= len(after(bpe, prompt, answer, longest=longest).tokens) <= longest


def test_longest_below_one_is_refused():
    with pytest.raises(BadArgument, match="'longest' must be >= 1, got 0"):
        Copier(make_tokenizer(), [1, 2], longest=0)


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
def test_a_name_is_found_without_its_space(kind, request):
    tokenizer = request.getfixturevalue(kind)
    inside, outside = ids(tokenizer, "[Blue"), ids(tokenizer, "a Blue")
    assert inside[-1] != outside[-1], "the case is not the one meant"
    prompt = ids(tokenizer, "name[Blue Spice]")
    proposal = after(tokenizer, "name[Blue Spice]", outside[-1:])
    assert proposal.tokens[0] == prompt[-2]
    assert says(tokenizer, proposal)[0].strip() == "Spice"
    assert proposal.classes[0][0] == "text"


def test_text_is_spelt_as_after_the_answer(bpe):
    """Behind "[" Winter is W-inter, in a sentence Win-ter: no token of the prompt is "ter"."""
    prompt = "<s>name[Winter Garden], area[riverside]\nText:"
    assert says(bpe, after(bpe, prompt, " The Win"))[:2] == ["ter", " G"]
    assert ids(bpe, "ter")[0] not in ids(bpe, prompt)
    whole = ids(bpe, " The Winter Garden], area[riverside]\n")
    assert after(bpe, prompt, " The Win", longest=4).tokens == whole[2:6]


def test_text_is_spelt_as_after_the_answer_with_sentencepiece(pieces):
    answer = ids(pieces, "The Win")[-1:]
    assert pieces.convert_ids_to_tokens(answer) == [f"{SPACE}Win"]
    proposal = after(pieces, "name[Winter Garden]", answer)
    assert pieces.convert_ids_to_tokens(proposal.tokens)[:2] == ["ter", f"{SPACE}Garden"]
    assert pieces.bos_token_id not in proposal.tokens


def test_tokens_of_the_prompt_are_kept_where_one_begins(bpe):
    """Win-ner in the prompt is repeated, though a tokenizer makes one token of `` Winner``."""
    assert len(ids(bpe, " Winner")) == 1
    prompt = ids(bpe, "<s>name[Winner 3]\nText:")
    place = prompt.index(ids(bpe, "ner")[0])
    copier = Copier(bpe, [*prompt, *ids(bpe, " The Win")], longest=4)
    assert copier.propose().tokens == prompt[place : place + 4]


def test_a_token_that_the_copied_text_cuts_is_not_proposed(bpe):
    copier = Copier(bpe, [*ids(bpe, "[Winter is"), *ids(bpe, " Win")])
    assert says(bpe, copier.propose()) == ["ter", " is"]


def test_text_is_spelt_as_after_what_precedes_its_word(bpe):
    """The tokens encoded again begin where a special token or a split character allows it."""
    arrow = ids(bpe, " \u2192")
    assert bpe.decode(arrow[:1]) == " \ufffd", "a space and a third of an arrow"
    for before in ([bpe.bos_token_id], arrow):
        assert says(bpe, after(bpe, "an approximate x", [*before, *ids(bpe, "ap")]))[0] == "pro"


def test_a_continuation_that_the_last_token_rules_out_is_not_proposed(bpe):
    assert len(ids(bpe, " head")) == 1
    assert len(ids(bpe, " FROM he")) == 2
    prompt = "<s>CREATE TABLE head (age INTEGER)\nSQL:"
    assert after(bpe, prompt, " FROM he").tokens == []
    # where the name is spelt with that token, its rest is proposed
    assert says(bpe, after(bpe, prompt.replace("head", "heaq"), " FROM he"))[0] == "a"


def test_a_later_place_is_tried_if_the_first_is_ruled_out(bpe):
    prompt = "<s>CREATE TABLE x (assets INTEGER) y (assists INTEGER)\nSQL:"
    assert [len(ids(bpe, word)) for word in (" assists", " assets")] == [1, 2]
    assert says(bpe, after(bpe, prompt, ids(bpe, " assets")[:1]))[0] == "ets"


def test_a_single_letter_is_no_match_but_may_begin_one(bpe):
    prompt = "<s>name[Qx zoo]\nText:"
    assert bpe.decode(ids(bpe, " Q")[:1]) == " Q"
    assert after(bpe, prompt, ids(bpe, " Q")[:1]).tokens == []
    assert says(bpe, after(bpe, prompt, " Qx"))[0].strip()[:1] == "z"


def test_a_match_does_not_begin_inside_a_word(bpe):
    prompt = "<s>name[Hublue Spice]\nText:"
    assert bpe.decode(ids(bpe, " blue")) == " blue"
    assert "text" not in {kind[0] for kind in after(bpe, prompt, " blue").classes}
    assert after(bpe, prompt.replace("Hublue", "Hu blue"), " a[blue").tokens


def test_the_longest_text_wins(bpe):
    """The token match is one token in all three places, the text match is two words in one."""
    prompt = "<s>x[Blue Winter Road], y[The Winter Lane], z[Old Winter Hall]\nText:"
    for name, following in (("Blue", " Ro"), ("The", " L"), ("Old", " Hall")):
        assert says(bpe, after(bpe, prompt, f" {name} Win"))[1] == following
    assert after(bpe, prompt, " The Win").classes[0][0] == "text"


def test_part_of_a_word_does_not_make_a_match_longer(bpe):
    """`` is Blue`` is in "this Blue", but a match counts from where a word begins: a tie."""
    prompt = "<s>x: this Blue Spice, y: a Blue Mill\nText:"
    assert says(bpe, after(bpe, prompt, " is Blue"))[0] == " Mill"
    assert says(bpe, after(bpe, prompt.replace("this", "is"), " is Blue"))[0] == " Spice"


def test_a_name_is_found_among_many_words_that_end_like_it(bpe):
    prompt = "<s>name[Winter Garden], " + "fan tin can pen sun " * 9
    assert says(bpe, after(bpe, prompt, " Win"))[0] == "ter"


def test_token_ids_come_first(bpe):
    """Where both match in the same place, the tokens are copied and called that."""
    proposal = after(bpe, "<s>name[x], near[The Blue Spice]\nText:", " near[The")
    assert [kind[0] for kind in proposal.classes[:2]] == ["token 3", "token 4"]


def test_signs_of_writing_without_spaces_are_words(pieces):
    answer = [pieces.convert_tokens_to_ids(sign) for sign in (f"{SPACE}咖", "啡")]
    prompt = ids(pieces, "[馆咖啡馆")
    assert Copier(pieces, [*prompt, *answer[:1]]).propose().tokens == [], "one sign is no match"
    copier = Copier(pieces, [*prompt, *ids(pieces, "[啡b"), *answer], longest=1)
    assert pieces.convert_ids_to_tokens(copier.propose().tokens) == ["馆"], "two signs are"


# special, broken and unknown tokens


def test_special_tokens_are_copied_by_id_only(bpe):
    bos, eos = bpe.bos_token_id, bpe.eos_token_id
    blue = ids(bpe, "x[Blue")
    copier = Copier(bpe, [*blue, bos, *ids(bpe, " Spice"), *blue])
    assert copier.propose().tokens[:2] == [bos, *ids(bpe, " Spice")]
    copier = Copier(bpe, [*blue, bos, *ids(bpe, " Spice"), *ids(bpe, " Blue")])
    assert copier.propose().tokens == [], "text goes no further than a special token"
    copier = Copier(bpe, [*ids(bpe, "[Blue Spice"), bos, 9, *ids(bpe, " Blue")])
    assert copier.propose().tokens == ids(bpe, " Spice")
    copier = Copier(bpe, [*blue, eos, *ids(bpe, " Spice"), *blue])
    assert copier.propose().tokens == [eos], "nothing comes after the end"


def test_text_does_not_cross_special_tokens(bpe):
    bos, eos = bpe.bos_token_id, bpe.eos_token_id
    win = ids(bpe, " Win")
    cut = Copier(bpe, [*ids(bpe, "[Winter"), bos, *ids(bpe, " Garden The Win")])
    assert says(bpe, cut.propose()) == ["ter"]
    # places with nothing but a special token behind them are not worth a try
    ends = Copier(bpe, [*ids(bpe, "[Winter Garden]"), *[*ids(bpe, "[Win"), bos] * 2, 9, *win])
    assert says(bpe, ends.propose())[0] == "ter"
    # one special token is not another
    road, lane = ids(bpe, " Winter Road"), ids(bpe, " Winter Lane")
    copier = Copier(bpe, [*ids(bpe, "x"), bos, *road, 9, *lane, 9, *ids(bpe, "x"), eos, *win])
    assert copier.propose().tokens[:2] == lane[1:3]


def test_a_special_token_spelt_out_in_the_text_is_not_proposed(bpe):
    spelt = [token for sign in "</s> b" for token in ids(bpe, sign)]
    copier = Copier(bpe, [*ids(bpe, "x[Winter"), *spelt, *ids(bpe, " The Win")])
    assert says(bpe, copier.propose()) == ["ter"]


def test_halves_of_characters(bpe):
    cafe = ids(bpe, "[咖啡")
    assert len(cafe) > 4
    assert "\ufffd" in bpe.decode(cafe[1:2])
    prompt = "<s>name[咖啡 Blue Spice]\nText:"
    assert after(bpe, prompt, cafe[1:3], longest=2).tokens == cafe[3:5], "inside a character"
    # whole characters that came in halves are text again
    name = ids(bpe, "[Zoë Café 咖啡 Winter Garden]")
    copier = Copier(bpe, [*name, *ids(bpe, " 咖啡 Win")[1:]])
    assert says(bpe, copier.propose())[0] == "ter"
    # halves that never become a character end the text match only there
    stray = cafe[1:2]
    copier = Copier(bpe, [*ids(bpe, "[Winter Garden]"), *stray, *ids(bpe, " The Win")])
    assert says(bpe, copier.propose())[0] == "ter"
    assert after(bpe, "[Winter Garden]", ids(bpe, " Win") + stray).tokens == []
    assert after(bpe, "[Blue Spice]", ids(bpe, " Blue") + stray).tokens == []
    copier = Copier(bpe, [*ids(bpe, "[Winter"), *stray, *ids(bpe, " Garden The Win")])
    assert says(bpe, copier.propose()) == ["ter"]
    copier = Copier(bpe, [*ids(bpe, "[Winter Garden]"), *stray, *ids(bpe, " Win")])
    assert copier.propose().tokens == []
    # split characters are copied whole
    spelt = ids(bpe, " The Winter\u5496 Garden")
    copier = Copier(bpe, [*ids(bpe, "[Winter\u5496 Garden]"), *spelt[:2]], longest=6)
    assert copier.propose().tokens == spelt[2:8]


def test_unknown_ids_are_never_proposed(bpe):
    for odd in ODD:
        assert Copier(bpe, [70, 71, odd, 72, 70, 71]).propose().tokens == []
        assert Copier(bpe, [70, 71, 72, odd, 70, 71]).propose().tokens == [72]


@pytest.mark.parametrize("kind", ["bpe", "pieces", "words"])
def test_any_tokens_at_all(kind, request):
    """Never raises; every proposal is a chain of known tokens with log-probabilities below 0."""
    words = kind == "words"
    tokenizer = make_tokenizer() if words else request.getfixturevalue(kind)
    found = 0
    for seed in range(6):
        copier = Copier(tokenizer, random_tokens(seed, 40), longest=5)
        for token in random_tokens(seed + 100, 80):
            proposal = copier.propose()
            found += bool(proposal.tokens)
            assert len(proposal.tokens) <= 5
            assert len(proposal.tokens) == len(proposal.logprobs) == len(proposal.classes)
            assert all(0 <= t < len(tokenizer) for t in proposal.tokens)
            assert all(type(t) is int for t in proposal.tokens)
            assert all(-20 < p < 0 for p in proposal.logprobs)
            copier.observe(proposal, min(1, len(proposal.tokens)), len(proposal.tokens))
            copier.extend([token])
    assert found > 40


def test_tokens_may_be_numpy_integers(bpe):
    prompt = ids(bpe, "<s>name[Winter Garden]\nText: Win")
    assert Copier(bpe, np.array(prompt)).propose() == Copier(bpe, prompt).propose()


# incremental work


@pytest.mark.parametrize("kind", ["bpe", "pieces", "words"])
def test_step_by_step_is_the_same_as_from_scratch(kind, request):
    tokenizer = make_tokenizer() if kind == "words" else request.getfixturevalue(kind)
    rng = random.Random(3)
    for seed in range(4):
        tokens = random_tokens(seed, 120)
        copier, done = Copier(tokenizer, tokens[:7]), 7
        while done < len(tokens):
            count = rng.randrange(1, 6)
            copier.extend(tokens[done : done + count])
            done = min(done + count, len(tokens))
            assert copier.propose() == Copier(tokenizer, tokens[:done]).propose()
            assert copier.propose() == copier.propose()


def test_work_does_not_grow_with_the_context(bpe):
    """Counted in executed lines, so the machine does not matter; 16 times the text, the same work."""
    text = "".join(
        f"{i} name[Blue Spice {i % 37}], area[city {i % 11}], near[The Mill {i % 5}] "
        for i in range(900)
    )
    tokens = ids(bpe, text)
    assert len(tokens) > 16 * 800 + 100

    def lines(context: int) -> int:
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            count += 1
            return trace if frame.f_code.co_filename == copy.__file__ else None

        copier = Copier(bpe, tokens[:context])
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for token in tokens[context : context + 100]:
                copier.propose()
                copier.extend([token])
        finally:
            sys.settrace(before)
        return count

    assert lines(16 * 800) < 1.5 * lines(800)


# calibration


def first(copied: Copied) -> float:
    return copied.logprobs[0]


def test_a_token_is_said_to_be_as_sure_as_its_class_was(bpe):
    shared = Calibration()

    def propose():
        return Copier(bpe, [80, 81, 82, 80, 81], calibration=shared).propose()

    before = first(propose())
    for right in (True, False):
        for _ in range(200):
            Copier(bpe, [], calibration=shared).observe(propose(), int(right), 1)
        assert abs(math.exp(first(propose())) - right) < 0.05
    said = []
    for draw in range(600):  # seven of ten, mixed
        Copier(bpe, [], calibration=shared).observe(propose(), int(draw * 7 % 10 < 7), 1)
        said.append(math.exp(first(propose())))
    assert max(said[200:]) - min(said[200:]) < 0.3, "it hardly follows single draws"
    assert abs(sum(said[200:]) / 400 - 0.7) < 0.05
    assert first(Copier(bpe, [80, 81, 82, 80, 81]).propose()) == before, "nothing global"


def test_only_tokens_that_were_verified_teach(bpe):
    """right = 1 of tried = 2: the first token was right, the second wrong, the rest is unknown."""
    kinds = [("text", "word", "one"), ("token 2", "]", "one"), ("token 3", "letter", "one")]
    copied = Copied([5, 6, 7], [-1.0, -1.0, -1.0], kinds)

    signs = {(1, 2): [1, -1, 0], (0, 3): [-1, 0, 0], (3, 3): [1, 1, 1], (2, 2): [1, 1, 0]}
    for (right, tried), expected in signs.items():
        copier = Copier(bpe, [])
        before = [copier.calibration.logprob(kind) for kind in kinds]
        copier.observe(copied, right, tried)
        now = [copier.calibration.logprob(kind) for kind in kinds]
        assert [(b > a) - (b < a) for a, b in zip(before, now, strict=True)] == expected


def test_neighbouring_classes_learn_too():
    calibration, alike = Calibration(), ("token 4", "]", "agree")
    other = ("token 4", "letter", "one")
    before, apart = calibration.logprob(alike), calibration.logprob(other)
    calibration.learn(("token 2", "]", "one"), False)
    assert calibration.logprob(alike) < before
    assert calibration.logprob(other) == apart


def test_the_prior_knows_what_copies_are_like():
    p = Calibration().logprob
    kinds = ("letter", "one"), ("word", "agree"), ("word", "differ"), ("]", "differ")
    said = [p(("token 1", *kind)) for kind in kinds]
    assert said == sorted(said, reverse=True)
    assert p(("token short", "word", "one")) < p(("token 2", "word", "one"))
