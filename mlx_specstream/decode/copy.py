"""copy: drafts copied from the prompt and the text so far, for any model and without training.

The end of the text is looked up in what came before it, once as token ids and once as characters,
and what followed there is proposed. Characters are needed because a name is spelt with other tokens
in other places: ``name[Blue`` holds ``Blue``, a sentence holds `` Blue``. Source: prompt lookup
decoding (A. Saxena, 2023), there with token ids only.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import BadArgument

RECENT = 12  # places remembered per key, the latest ones: bounds the work of a look-up
TOKEN_KEYS = (4, 2, 1)  # tokens per key, longest first: a long suffix is found among few places
WORD = 24  # characters of the longest text key
REACH = 24  # tokens or characters compared backwards from a place
TAIL = 16  # tokens that are encoded again with a text continuation
TRIES = 2  # text places tried, because encoding is the dear part of a proposal
PER_TOKEN = 8  # characters of the text that a proposed token may take
BARRIER = "\0"  # stands for special and undecodable tokens; no text match crosses it
BROKEN = "\ufffd"  # what half a character decodes to
IDEOGRAPHS = 0x2E80  # from here on one character is a word

# Prior: log odds that a copied token is right = how long the match is + how the token begins + what
# the other places say. Fitted to copies in 1,200 answers of e2e-sql-14m to prompts of the train splits
# of E2E and text-to-SQL, and in 150 worked answers of gsm8k's train split; each task weighs the same.
LENGTH = {  # of a match in characters, or in so many tokens
    "text": 1.9,
    "token short": -0.3,  # one token of 1-3 characters
    "token 1": 1.2,
    "token 2": 1.4,
    "token 3": 0.9,
    "token 4": 1.2,  # and longer
}
BEGINS = {"letter": 0.0, "_": 0.0, "word": -2.1}  # inside a word or a name, a new word
MARK = -3.9  # anything else
PLACES = {"differ": 0.0, "one": 0.9, "agree": 1.0}  # what follows at the places with the same key
CERTAIN = 7.0  # log odds are kept within this: nothing is certain, so log P stays below 0
UNLIKELY = math.log(
    0.3
)  # first tokens below it never made a difference to a tree of streams' guesses
SLOWEST = 0.15  # the step of learning never falls below this, so old texts are forgotten


@dataclass(frozen=True)
class Copied:
    """A chain of candidates behind the last known token; empty if nothing matches.

    Args:
        tokens: the likeliest continuation, at most ``longest`` tokens.
        logprobs: log P(token d is right | the tokens before it are), each below 0.
        classes: (length, begins, places) of each token, which ``observe`` learns about.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    classes: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def unlikely(self) -> bool:
        """Not worth the work beside the guesses of streams."""
        return not self.tokens or self.logprobs[0] < UNLIKELY


class Calibration:
    """How often copied tokens were right: a prior and what was seen since, by class of match.

    A logistic model whose weights move after each verified token. How copies end (at ``]``, at a
    quotation mark) differs between tasks far more than between texts of a task, so share one
    object between the texts that a model writes.
    """

    def __init__(self):
        self._learned: dict[tuple[str, ...], list[float]] = {}  # feature -> [weight, times seen]
        self._known: dict[tuple[str, str, str], float] = {}  # class -> log P, until one is learned

    def logprob(self, kind: tuple[str, str, str]) -> float:
        """log P(a copied token of this class is right), below 0."""
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = -math.log1p(math.exp(-self._odds(kind)))
        return known

    def learn(self, kind: tuple[str, str, str], right: bool) -> None:
        """A token of this class was verified."""
        self._known.clear()
        missed = right - 1 / (1 + math.exp(-self._odds(kind)))
        for feature in self._features(kind):
            seen = self._learned.setdefault(feature, [0.0, 0])
            seen[1] += 1
            seen[0] += max(SLOWEST, 1 / math.sqrt(1 + 0.2 * seen[1])) * missed

    def _odds(self, kind: tuple[str, str, str]) -> float:
        length, begins, places = kind
        odds = LENGTH[length] + BEGINS.get(begins, MARK) + PLACES[places]
        for feature in self._features(kind):
            odds += self._learned.get(feature, (0.0,))[0]
        return max(-CERTAIN, min(CERTAIN, odds))

    @staticmethod
    def _features(kind: tuple[str, str, str]) -> tuple[tuple[str, ...], ...]:
        """From coarse to fine, so that a class seen for the first time knows its neighbours."""
        length, begins, _ = kind
        return (begins,), (length.split()[0], begins), kind


class Copier:
    """Copied drafts for one text. All work per token is bounded, whatever the text's length.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        tokens: the prompt.
        longest: the most tokens that a proposal has (>= 1).
        calibration: what was learned from other texts; by default nothing.

    Raises:
        BadArgument: ``longest`` is below 1.
    """

    def __init__(
        self,
        tokenizer,
        tokens: Sequence[int],
        *,
        longest: int = 8,
        calibration: Calibration | None = None,
    ):
        if longest < 1:
            raise BadArgument(f"[copy] 'longest' must be >= 1, got {longest}.")
        self.longest = longest
        self.calibration = calibration or Calibration()
        self._pieces = _Pieces(tokenizer)
        self._tokens: list[int] = []
        self._starts: list[int] = []  # per token: where its characters begin
        self._characters: list[str] = []
        self._halves: list[int] = []  # tokens at the end that do not yet make whole characters
        self._key = ""  # the text from the beginning of the last word on, while it is short
        self._token_places, self._text_places = _Places(), _Places()
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that were generated, in order."""
        for token in tokens:
            self._tokens.append(int(token))
            self._starts.append(len(self._characters))
            n = len(self._tokens)
            for size in TOKEN_KEYS:
                if n >= size:
                    self._token_places.add(tuple(self._tokens[-size:]), n)
            for character in self._text_of(self._tokens[-1]):
                self._append(character)

    def propose(self) -> Copied:
        """The continuation of the longest suffix that occurred before, the latest if several did.

        A match of token ids is copied as it is, special tokens too; one of text without them.
        """
        length, place, agreement = self._token_match()
        covered = len(self._characters) - self._starts[-length] if length else 0
        for count, start, others in self._text_matches()[:TRIES]:
            if count <= covered or (length and self._starts[place] == start):
                break
            tokens = self._spelt(start)
            if tokens:
                return self._copied(tokens, 0, "text", others)
        if not length:
            return Copied()
        one = "token short" if length == 1 and covered < 4 else "token 1"
        return self._copied(self._following(place, special=True), length, one, agreement)

    def observe(self, copied: Copied, right: int, tried: int) -> None:
        """The first ``tried`` tokens of a proposal were verified and ``right`` of them accepted."""
        for d, kind in enumerate(copied.classes[: min(tried, right + 1)]):
            self.calibration.learn(kind, d < right)

    def _copied(self, tokens: list[int], length: int, first: str, places: str) -> Copied:
        """After d right tokens the match is d tokens longer: that is their class."""
        grown = [min(max(length, 1) + d, 4) for d in range(len(tokens))]
        lengths = [first if d == 0 and n == 1 else f"token {n}" for d, n in enumerate(grown)]
        begins = [self._pieces.begins(token) for token in tokens]
        classes = [(n, b, places) for n, b in zip(lengths, begins, strict=True)]
        return Copied(tokens, [self.calibration.logprob(kind) for kind in classes], classes)

    # token ids

    def _token_match(self) -> tuple[int, int, str]:
        """(tokens of the longest suffix found, index behind it, class of places)."""
        n = len(self._tokens)
        for size in TOKEN_KEYS:
            if n < size:
                continue
            found = [p for p in self._token_places.of(tuple(self._tokens[-size:])) if p < n]
            if found:
                length, place = max((_common(self._tokens, p, n), p) for p in found)
                return length, place, _agreement([self._tokens[p] for p in found])
        return 0, 0, "differ"

    def _following(self, place: int, *, special: bool) -> list[int]:
        """Token ids from ``place`` on; behind the end of the text the copy goes on with itself."""
        out: list[int] = []
        for index in range(place, place + self.longest):
            past = index - len(self._tokens)
            token = self._tokens[index] if past < 0 else out[past]
            if self._pieces.text(token) is None or (self._pieces.is_special(token) and not special):
                break
            out.append(token)
            if token in self._pieces.ends:
                break
        return out

    # characters

    def _text_of(self, token: int) -> str:
        """The characters that are complete with this token."""
        text = self._pieces.text(token) or BARRIER
        if BROKEN in text:
            self._halves.append(token)
            text = self._pieces.decode(self._halves)
            if BROKEN in text:
                if len(self._halves) < 4:  # a character has four bytes at most
                    return ""
                text = BARRIER
        elif self._halves:
            text = BARRIER + text
        self._halves = []
        return text

    def _append(self, character: str) -> None:
        """Index the prefixes of every word, and what stands between it and the next."""
        text = self._characters
        text.append(character)
        if character == BARRIER:
            self._key = ""
        elif character.isalnum() and not _inside_word(text, len(text) - 1):
            self._key = character
        elif self._key:
            self._key = self._key + character if len(self._key) < WORD else ""
        if self._key:
            self._text_places.add(self._key, len(text))

    def _text_matches(self) -> list[tuple[int, int, str]]:
        """(characters of a suffix, index behind its earlier place, class of places), best first."""
        text, key = self._characters, self._key
        n = len(text)
        if not key or self._halves:
            return []
        places = [p for p in self._text_places.of(key) if p < n and text[p] != BARRIER]
        others = _agreement([text[p] for p in places])
        found = []
        for place in places:
            count = _common(text, place, n)
            # Part of a word is no evidence: back to where a word begins in both places.
            while count > len(key) and any(_inside_word(text, p - count) for p in (place, n)):
                count -= 1
            if count > 1 or not key.isalpha():  # a single letter matches by accident
                found.append((count, place, others))
        return sorted(found, reverse=True)

    def _spelt(self, start: int) -> list[int]:
        """The text from ``start`` on as the tokens that a model would spell it with here."""
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == start:
            # A token begins there. Models repeat the tokens they see, even where a tokenizer would
            # split the word in another way behind what comes before it here.
            return self._following(index, special=False)
        return self._encoded(start)

    def _encoded(self, start: int) -> list[int]:
        """The text from ``start`` on, encoded behind the last tokens.

        Empty if these would be other tokens with the text behind them: then the model, which chose
        them, means another word (`` he`` cannot become `` head`` where that is one token).
        """
        first, anchor = self._tail()
        if first == len(self._tokens):
            return []
        tail = "".join(self._characters[self._starts[first] :])
        following = "".join(self._characters[start : start + PER_TOKEN * self.longest])
        following, barrier, _ = following.partition(BARRIER)
        known = self._pieces.anchors[anchor] + self._tokens[first:]
        tokens = self._pieces.encode(anchor + tail + following)
        if tokens[: len(known)] != known:
            return []
        tokens = tokens[len(known) :]
        if not barrier and len(tokens) <= self.longest:
            tokens = tokens[:-1]  # the text was cut, perhaps inside this token
        tokens = tokens[: self.longest]
        special = (d for d, token in enumerate(tokens) if self._pieces.is_special(token))
        return tokens[: next(special, None)]

    def _tail(self) -> tuple[int, str]:
        """Where to begin to encode: (index of a token, text to put before it).

        Tokenisers split before a space that follows a letter, so encoding from there on gives
        what encoding everything gives; the letter also takes the space that some put in front.
        """
        text, starts = self._characters, self._starts
        first = len(starts)
        for index in range(first - 1, max(-1, first - 1 - TAIL), -1):
            begin = starts[index]
            if BARRIER in text[begin : starts[first] if first < len(starts) else None]:
                break
            first = index
            whole = index == 0 or starts[index - 1] < begin  # not the second half of a character
            lead = "".join(text[begin : begin + 2])
            if whole and len(lead) == 2 and lead[0] == " " and not lead[1].isspace():
                return index, "a"
        return first, "\n"


class _Pieces:
    """What single tokens of a tokenizer say, decoded once each."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.ends = frozenset(tokenizer.eos_token_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = self.ends | {*tokenizer.all_special_ids}
        self._special |= {index for index, token in added.items() if token.special}
        self._text: dict[int, str | None] = {}
        self.anchors = {text: self.encode(text) for text in ("a", "\n")}
        # Decoded behind another token, a piece keeps the space that it begins with.
        self._before = self.anchors["a"]
        self._skip = len(self._decode(self._before))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: list[int]) -> str:
        return self._decode(self._before + tokens)[self._skip :]

    def text(self, token: int) -> str | None:
        """The text of a token, BARRIER for a special one, None if there is no such token."""
        if token not in self._text:
            text = None
            if self._exists(token):
                text = BARRIER if self.is_special(token) else self.decode([token])
            self._text[token] = text
        return self._text[token]

    def is_special(self, token: int) -> bool:
        return token in self._special

    def begins(self, token: int) -> str:
        """``"letter"``, ``"word"`` (a space before it) or the first character that shows."""
        text = self.text(token) or BARRIER
        shown = text.lstrip()
        if not shown[:1].isalnum():
            return shown[:1]
        return "letter" if shown == text else "word"

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _exists(self, token: int) -> bool:
        try:
            return self._tokenizer.convert_ids_to_tokens(token) is not None
        except (IndexError, OverflowError):  # how tokenizers refuse ids they do not have
            return False


class _Places:
    """Where a key was seen: the index behind it, the latest RECENT ones, oldest first."""

    def __init__(self):
        self._places: dict = {}

    def add(self, key, place: int) -> None:
        places = self._places.setdefault(key, [])
        places.append(place)
        if len(places) > RECENT:
            del places[0]

    def of(self, key) -> Sequence[int]:
        return self._places.get(key, ())


def _common(sequence: list, a: int, b: int) -> int:
    """How many items (REACH at most) before a and before b are the same; a < b."""
    count = 0
    while count < min(a, REACH) and sequence[a - 1 - count] == sequence[b - 1 - count] != BARRIER:
        count += 1
    return count


def _agreement(following: list) -> str:
    if len(following) == 1:
        return "one"
    return "agree" if len({*following}) == 1 else "differ"


def _inside_word(text: list[str], index: int) -> bool:
    """Is the character one of a word that begins before it?"""
    here = text[index]
    return here.isalnum() and index > 0 and text[index - 1].isalnum() and ord(here) < IDEOGRAPHS
