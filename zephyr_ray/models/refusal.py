"""Detects an answer that refuses the request, by its first sentences."""

import re

from zephyr_ray.models.prose import mask_marked

START = 400
"""Characters at the start of an answer to search for a refusal; "I cannot" further on is advice or
part of a story."""
_SPELLINGS = [
    (r"[’‘]", "'"),
    (r"\b(?:I'm|Im)\b", "I am"),
    (r"\bcan(?:'t|t| not)\b", "cannot"),
    (r"\bwon'?t\b", "will not"),
    (r"n't\b", " not"),
]
_CANNOT = (
    r"(?:cannot|can neither|could not|will not(?: be able to)?"
    r"|must (?:decline|refuse)|have to (?:decline|refuse)"
    r"|decline|refuse|am (?:not able|unable|not allowed|not permitted|not programmed|not designed"
    r"|not comfortable|not going)(?: to| with)?|do not feel comfortable|am (?:afraid|sorry)"
    r"(?:,? but)?(?: that)? I (?:cannot|will not|am (?:unable|not able) to))"
)
# Only verbs that refusals use: "cannot find an error" may be an answer, and "cannot give an exact
# number" may begin one.
_COMPLY = (
    r"(?:to )?(?:help(?! (?:but|\w+ing)\b)|assist|fulfill?|comply|provid(?:e|ing)|support(?:ing)?"
    r"|generat(?:e|ing)|creat(?:e|ing)|writ(?:e|ing)|produc(?:e|ing)|engag(?:e|ing)"
    r"|participat(?:e|ing)|endors(?:e|ing)"
    r"|promot(?:e|ing)|encourag(?:e|ing)|condon(?:e|ing)|continu(?:e|ing)|complet(?:e|ing)"
    r"|answer(?:ing)?|respond(?:ing)?|discuss(?:ing)?|offer(?:ing)?|give(?! (?:up|in)\b)|giving"
    r"|share|sharing|do (?:that|this|so)|teach(?:ing)?|facilitat(?:e|ing))\b"
    r"(?! (?:you )?(?:(?:an?|the|any) )?(?:exact|precise|specific|definit\w+)\b)"
)
_ADVERBS = r"(?:(?:really|simply|just|also|directly|ethically|in good conscience|therefore),? )*"
_OPENING = (
    r"(?:(?:I am (?:very |so |truly |really )?(?:sorry|afraid)|sorry|apologies|my apologies"
    r"|I apologi[sz]e|unfortunately|no|regrettably|thank you[^,.!]{0,40}"
    r"|as an? (?:(?!as an?\b)[^,.!?\n]){0,60}\b(?:AI|model|assistant|bot|program)\b"
    # The aside ends where an opening or the refusal can begin, to limit backtracking.
    r"(?:(?!as an?\b)[^,.!?\n]){0,40}?(?=[,.!:;]|$| (?:but|however|and|that|I|we|as|sorry)\b))"
    r"[,.!:;]? *(?:but|however|and|that)?,? *){0,3}"
)
_REFUSAL = re.compile(
    rf"^{_OPENING}(?:I|we) {_ADVERBS}{_CANNOT} {_ADVERBS}{_COMPLY}", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
SENTENCES = 2
"""Sentences at the start of an answer to check; the first may be an apology or praise."""


def is_refusal(text: str) -> bool:
    """Returns whether an assistant's answer begins with a refusal of the request."""
    start = mask_marked(text[:START].strip())
    for spelling, plain in _SPELLINGS:
        start = re.sub(spelling, plain, start, flags=re.IGNORECASE)
    sentences = [s for s in _SENTENCE_END.split(start) if s.strip()]
    return any(_REFUSAL.match(sentence.strip(" *_")) for sentence in sentences[:SENTENCES])
