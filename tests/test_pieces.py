"""Tests that tokenizing by pieces gives the tokenizer's own tokens, and is off if it would not."""

import json
import random
from typing import Any

import pytest
from chat_families import FAMILIES, byte_level
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from zephyr_ray.chat import ChatFormat, pieces
from zephyr_ray.chat.pieces import Pieces, by_pieces

PARTS = [*"aZ9 .!'\"\n\t()é日🎉\u0301<|>", "  ", " a", " the", "ing", "\ufdd0", "</s> it", "▁", "Ġ"]
WORDS = "Name two colours that go well together, and say why. Two colours that go well: red."


def whole(backend: Any, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def encoder(backend: Any) -> Any:
    """Returns the function that encodes by pieces; None if the tokenizer needs the whole text."""
    encode = lambda text: whole(backend, text)  # noqa: E731
    chosen = by_pieces(backend, [], encode)
    return None if chosen is encode else chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tokenized_by_pieces_with_the_same_tokens(family: str) -> None:
    own = ChatFormat.of(FAMILIES[family]())._encoder
    assert isinstance(own._encode.__self__, Pieces)
    pick, parts = random.Random(0), [*PARTS, *own._control.values()]
    for _ in range(2000):
        text = "".join(pick.choices(parts, k=30))
        assert own._encode(text) == own._encode_whole(text), text
    assert own._encode(WORDS) == own._encode(WORDS) == own._encode_whole(WORDS)


def test_words_that_occurred_before_are_not_tokenized_again() -> None:
    backend = byte_level(["<pad>"])
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return whole(backend, text)

    chosen = by_pieces(backend, [], encode)
    seen.clear()
    assert chosen("the red bus, a red car") == whole(backend, "the red bus, a red car")
    assert seen == ["the", " red", " bus,", " a", " car"]


def with_token_over_a_space() -> Tokenizer:
    """Returns a tokenizer that does not split at spaces and has the token `s g` ("colours go")."""
    inner = byte_level([])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model = json.loads(inner.to_str())["model"]
    vocabulary = model["vocab"] | {"Ġg": len(model["vocab"]), "sĠg": len(model["vocab"]) + 1}
    merges = [("Ġ", "g"), ("s", "Ġg"), *map(tuple, model["merges"])]
    inner.model = models.BPE(vocab=vocabulary, merges=merges)
    return inner


def with_added(token: AddedToken) -> Tokenizer:
    inner = byte_level([])
    inner.add_tokens([token])
    return inner


LOOK_BEYOND = {
    "a token of two words": with_token_over_a_space(),
    "an added token with a space": with_added(AddedToken("colours that", normalized=False)),
    "an added token that takes whitespace": with_added(AddedToken("say.", rstrip=True)),
}


@pytest.mark.parametrize("name", LOOK_BEYOND)
def test_a_tokenizer_that_looks_beyond_a_piece_is_given_the_whole_text(name: str) -> None:
    assert encoder(byte_level([])) is not None
    assert encoder(LOOK_BEYOND[name]) is None


def test_a_normalizer_that_looks_beyond_a_piece_is_given_the_whole_text() -> None:
    from tokenizers import Regex, normalizers

    backend = byte_level([])
    backend.normalizer = normalizers.Replace(Regex(r"9 (?=Z)"), "9")
    assert encoder(backend) is None


def test_remembered_pieces_are_limited_in_count_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_MOST_PIECES", 3)
    encode = encoder(byte_level([]))
    known = encode.__self__._known
    known.clear()
    long = "x" * (pieces._LONGEST_PIECE + 1)
    encode(f"a b c {long} d e")
    assert [*known] == ["e"]
