"""Corrects missing capitals in prose, as Zephyr's cleaning of UltraChat does."""

import re

from zephyr_ray.models.prose import FILLER, mask

_ABBREVIATIONS = ("etc", "vs", "approx", "resp", "incl", "al", "cf", "fig", "min", "max", "est")
# A lowercase word that follows the end of a sentence and does not end one itself: such a word would
# be a name in a list. The small letter of "iPhone" or of an address is right. A single letter
# before the full stop is an abbreviation ("e.g. this").
_SENTENCE_START = re.compile(
    rf"(?:\A|(?<=[a-z{FILLER}]{{2}}[.!?][ \n])"
    + "".join(rf"(?<!\b{word}\.[ \n])" for word in _ABBREVIATIONS)
    + r"(?=[a-z'’-]+[,:;]*\s))[a-z](?=[a-z'’-]*[,.!?:;]*(?:\s|\Z))"
)
# The words that follow the pronoun; a variable is followed by others ("i goes from 1 to n").
_VERBS = (
    "am was have had do did don['’]t didn['’]t haven['’]t wasn['’]t will won['’]t would wouldn['’]t "
    "can['’]t cannot can could couldn['’]t should shouldn['’]t may might must think thought know "
    "knew want wanted need needed like liked love loved hate hope hoped feel felt see saw hear heard "
    "believe guess suppose suggest recommend agree understand remember forgot mean meant say said "
    "tell told ask asked try tried went go got get give gave made make live lived work worked "
    "wonder wish prefer enjoy enjoyed use used just really also always never still only often "
    "usually sometimes personally actually once already currently promise apologize appreciate"
).split()
_PRONOUN = re.compile(rf"(?<![\w'’./$-])i(?=['’](?:m|ve|ll|d)\b|\s+(?:{'|'.join(_VERBS)})\b)")
# Where the letter is a variable once, it is one everywhere in the text.
_VARIABLE = re.compile(
    r"(?<![\w'’.])i(?:\s*[+*/=<>^)\]]|\s*-\s?(?:\d|th\b)|,\s*j\b"
    r"|\s+(?:in|is|and|to|from|of|times|goes|equals|ranges|be)\b)"
    r"|\b(?:variable|index|counter|integer|number|letter|iteration|element|item|row|column|each|for)"
    r"\s+i\b|[\[({$`]i\b[^'’]"
)


def true_case(text: str) -> str:
    """Returns the text with capitals at the start of sentences and for the word "i", in its prose.

    Prose without any capital, or all in capitals, is a style and stays as it is.
    """
    prose = mask(text)
    if prose == prose.lower() or prose == prose.upper():
        return text
    letters = list(text)
    is_variable = _VARIABLE.search(text)
    for pattern in [_SENTENCE_START] if is_variable else [_SENTENCE_START, _PRONOUN]:
        for match in pattern.finditer(prose):
            letters[match.start()] = letters[match.start()].upper()
    return "".join(letters)
