"""Prepares texts of any script for splitting into words."""

import unicodedata

import regex

_LETTER = r"[\p{L}\p{N}_]"
WORD = rf"{_LETTER}(?:{_LETTER}|[\p{{Mn}}\p{{Mc}}\u200c\u200d--\p{{VS}}])*"
"""A word in a text from `spaced`: marks and joiners, such as Hindi vowel signs, are part of it; the
variation selectors of emoji are not. Needs `regex.V1`."""

# Unicode's line-breaking classes identify the letters of scripts without spaces between words, such
# as those of Chinese, Japanese, Thai, Lao, Khmer and Burmese.
_UNSPACED = regex.compile(
    r"(?=[\p{L}\p{N}])[\p{lb=SA}\p{lb=ID}\p{lb=CJ}\p{lb=NS}\p{lb=AK}\p{lb=AS}]\p{M}*"
)
_OTHER_WIDTH = regex.compile(r"[\uff00-\uffef]+")


def spaced(text: str) -> str:
    """Returns the text with spaces around every letter of a script without spaces between words, so
    that each such letter is a word. Fullwidth and halfwidth letters become ordinary ones."""
    if text.isascii():
        return text
    text = _OTHER_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", text))


def is_unspaced(word: str) -> bool:
    """Returns whether the word is one letter of a script without spaces between words."""
    return _UNSPACED.match(word) is not None
