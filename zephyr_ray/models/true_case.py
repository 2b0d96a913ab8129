"""Corrects missing capitals in prose, as Zephyr's cleaning of UltraChat does."""

import re

from zephyr_ray.models.prose import FILLER, fill, mask

# Words whose punctuation mark does not end a sentence. Some abbreviations are also ordinary words:
# "Sun." counts only with a capital, and "no." only before a number. A name with a mark counts only
# before a verb ("Yahoo! was").
_NO_END = re.compile(
    r"\b(?:(?i:etc|vs|approx|resp|incl|al|cf|figs?|min|max|est|inc|corp|ltd|co|dept|vol|sec|ie|eg"
    r"|st|mt|dr|mrs?|ms|prof|gen|rep|sen|rev|jr|sr|ave|blvd|univ|jan|feb|apr|jun|jul|aug|sept?|oct"
    r"|nov|dec|mon|tues?|thu(?:rs?)?|fri)|Mar|Wed|Sat|Sun)\."
    r"|\b(?i:nos?)\.(?= (?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b)"
    r"|\b[A-Z][\w'’]*+[!?] (?:is|are|was|were|has|have|had|does|did|will|would|can|could|may|might"
    r"|must|shall|should)\b"
)
# The lowercase first letter of a sentence, except in a one-word sentence, which may be a name in a
# list; "iPhone" and addresses, which are right as they are; a single letter, which may be a
# variable; and after a single letter with a period, which is an abbreviation ("e.g. this").
_SENTENCE_START = re.compile(
    rf"(?:\A|(?<=[a-z{FILLER}]{{2}}[.!?][ \n])"
    r"(?=[a-z'’-]+[,:;]* ))(?![b-z]\b)[a-z](?=[a-z'’-]*[,.!?:;]*(?:\s|\Z))"
)
# Words that follow the pronoun but not a variable ("i goes from 1 to n").
_FIRST_PERSON = (
    r"(?:am|was|have|had|do|did|will|would|can|cannot|could|should|may|might|must"
    r"|(?:do|did|have|had|was|wo|would|ca|could|should)n['’]t"
    r"|think|thought|know|knew|want(?:ed)?|need(?:ed)?|lik(?:e|ed)|lov(?:e|ed)|hat(?:e|ed)"
    r"|hop(?:e|ed)|feel|felt|see|saw|hear|heard|believe|guess|suppose|suggest|recommend|agree"
    r"|understand|remember|forgot|mean|meant|say|said|tell|told|ask(?:ed)?|try|tried|go|went|get|got"
    r"|give|gave|make|made|liv(?:e|ed)|work(?:ed)?|wonder|wish|prefer|enjoy(?:ed)?|used?"
    r"|promise|apologize|appreciate|just|really|also|always|never|still|only|often|usually"
    r"|sometimes|personally|actually|once|already|currently)"
)
_PRONOUN = re.compile(rf"(?<![\w'’./$-])i(?=['’](?:m|ve|ll|d)\b|\s+{_FIRST_PERSON}\b)")
# If "i" is a variable once, it is treated as one everywhere in the text.
_VARIABLE = re.compile(
    r"(?<![\w'’.])i(?:\s*[+*/=<>^)\]]|\s*-\s?(?:\d|th\b)|,\s*j\b"
    r"|\s+(?:in|is|and|to|from|of|times|goes|equals|ranges|be)\b)"
    r"|\b(?:variable|index|counter|integer|number|letter|iteration|element|item|row|column|each|for|first|last)"
    r"\s+i\b|[\[({$`]i\b[^'’]"
)


def true_case(text: str) -> str:
    """Returns the text with capitals at the start of sentences and for the word "I" in its prose.

    Leaves prose without any capitals, or all in capitals, as it is, because that is a style.
    """
    prose = mask(text)
    if prose == prose.lower() or prose == prose.upper():
        return text
    prose = _NO_END.sub(fill, prose)
    letters = list(text)
    is_variable = _VARIABLE.search(text)
    for pattern in [_SENTENCE_START] if is_variable else [_SENTENCE_START, _PRONOUN]:
        for match in pattern.finditer(prose):
            letters[match.start()] = letters[match.start()].upper()
    return "".join(letters)
