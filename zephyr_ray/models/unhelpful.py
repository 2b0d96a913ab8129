"""Detects answers in which an assistant denies having emotions, opinions or experiences.

They count as unhelpful, as in Zephyr's paper, because assistants give them even to factual
questions. Only statements in the assistant's own voice count; quotations, letters, verse, reported
speech and role play do not.
"""

import re
from bisect import bisect

from zephyr_ray.models.prose import FILLER, fill, mask_marked

_SPELLINGS = [
    (r"[*_]+", ""),
    (r"[’‘]", "'"),
    (r"\bA\.I\.", "AI"),
    (r"\bcan(?:'t|t| not)\b", "cannot"),
    (r"\bdont\b", "do not"),
    (r"n't\b", " not"),
    (r"\bI'm\b", "I am"),
    (r"\bI've\b", "I have"),
    (
        r"\bI, ((?:as|being) an? [^,.!?\n]{0,60}?\b(?:AI|LLM|model|(?:chat ?)?bot|program|assistant"
        r"|machine|robot)), ",
        r"\1, I ",
    ),
]
_SINGLE_ITEM_MARKER = re.compile(r"\A(?:[-*•+]|\d+[.)])[ \t]+(?=[^\n]*\Z)")
_QUOTE = re.compile(r"[“„][^”“\n]*+[”“]?|«[^»\n]*+»?|\"[^\"\n]*+\"?|(?<!\w)'(?=\w)")
"""Matches a quotation, or only the opening mark if that is a single quotation mark."""
_SINGLE_END = re.compile(r"'(?!\w)|\n|\Z")
SINGLE_QUOTED = 400
"""Maximum characters in a single-quoted quotation; the marks around a longer span are taken to be
apostrophes."""
_GREETING = re.compile(r"^(?:Dear|Hi|Hello|Hey)\b[^\n]{0,60},[ \t]*$", re.MULTILINE)
_SIGN_OFF = re.compile(
    r"^(?:(?:best|kind|warm)\b.*|sincerely|regards|cheers|thanks|yours.*|love),[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_OWN_LABEL = r"(?:[\w']+ ){0,3}(?i:AI|Assistant|Answer|Note|Disclaimer|Truth)"
_ASIDE = r"(?: \([^()\n]{1,40}\))?"
_NAME = r"(?:The [\w'-]+|[A-Z][\w'-]*\.?(?: (?:[A-Z][\w'-]*\.?|\d+)){0,3})"
_CAPITALS = r"[A-Z][A-Z\d'-]*(?:\.? [A-Z\d'-]+){0,3}"
# Matches a speaker's line ("The Robot: …", or a line below "ROBOT") and list items, which are
# treated as examples.
_SPOKEN = re.compile(
    r"^[ \t]*(?:[-*•+]|\d+[.)]"
    rf"|(?!{_OWN_LABEL}:){_NAME}{_ASIDE}:"
    rf"|(?!{_OWN_LABEL}[ \t]*$|I\b){_CAPITALS}{_ASIDE}[ \t]*(?=\n))\s.*$",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")

_TOPICS = (
    r"emotion|emotional state|feeling|opinion|belief|preference|experience|view|viewpoint"
    r"|thought|taste|bias|desire|perspective|conviction|attachment|favou?rite"
)
_TOPIC = re.compile(rf"feel|{_TOPICS}", re.IGNORECASE)
"""Matches in every denial; a cheap first check."""
_NOUN = rf"(?:{_TOPICS})(?:e?s)?\b"
_PERSONAL = r"(?:personal|subjective|human|individual|first-?hand|inner)"
_ANY = r"(?:(?:any|an?|my own|real|true|genuine|actual|such|human|things like) ){0,3}"
# Feelings about a particular matter ("strong feelings", "feelings for him") do not match, because
# people deny those too.
_NATURE = (
    rf"{_ANY}(?:(?:\w+ )?\w+(?:,|,? or|,? and|,? nor) ){{0,3}}{_ANY}"
    rf"(?:emotions|feelings|opinions?|{_PERSONAL}(?: (?:or|and) {_PERSONAL})? {_NOUN})\b"
    r"(?! (?:for|towards?|of (?!my own)|left|any ?more|any longer|yet|today|tonight|right now"
    r"|either way|easily|well|openly|back)\b)"
)
# After an assistant has said that it is a machine, more denials count.
_ANYTHING = rf"(?:(?!(?:your|his|her|their|our|that|to)\b|\w+'s\b)[\w-]{{1,40}},? ){{0,6}}?{_NOUN}"

_FEEL = (
    r"(?:hav(?:e|ing)|possess(?:ing)?|feel(?:ing)?|hold(?:ing)?|experienc(?:e|ing)|form(?:ing)?"
    r"|offer(?:ing)?|express(?:ing)?|develop(?:ing)?|shar(?:e|ing)|giv(?:e|ing)|provid(?:e|ing))"
)
_ABLE = r"(?:able to|capable of|(?:equipped|programmed|designed|built|made|meant) (?:to|for|with))"
_NO_ABILITY = (
    r"(?:lack|do not (?:have|possess)|have no) (?:the |any |an? )?"
    r"(?:ability|capacity|capability|means|way) (?:to|for|of)"
)
_CANNOT = rf"(?:do not|cannot|(?:am|was) (?:unable to|incapable of|not {_ABLE})|{_NO_ABILITY})"
_LACK = (
    r"(?:(?:have|possess|hold|feel|experience) (?:no|neither|zero)|lack|do not come with"
    rf"|am (?:without|devoid of|free of)|have not(?: got)?|{_NO_ABILITY})"
)
_ADVERBS = r"(?:(?:really|truly|actually|simply|just|also|currently|personally|still|ever),? ){0,2}"
_DENIES = (
    rf"{_ADVERBS}(?:{_CANNOT} {_ADVERBS}{_FEEL}(?:,? or {_FEEL})?(?: no)?|neither {_FEEL}|{_LACK}) "
)
_MACHINES = r"(?:AIs?|models?|assistants?|(?:chat ?)?bots?|machines?|programs?|systems?)"


_NOT_MINE = r"[^.!?]{0,30} not something (?:that )?I "
_MAY_BE_NOT_MINE = re.compile(_NOUN + _NOT_MINE, re.IGNORECASE)


class _Denials:
    """Finds denials in a sentence."""

    def __init__(self, denied: str, more: str = ""):
        """`denied` matches what is denied; `more` is a pattern for additional denials, which starts
        with '|'."""
        usual = (
            rf"(?P<subject>\bI,? ){_DENIES}{denied}"
            rf"|\b{_MACHINES} (?:like|such as) (?:me|myself),? {_DENIES}{denied}"
            rf"|\b(?:not |im)possible for me to {_FEEL} {denied}"
            r"|\b(?:programming|design|training|nature|developers?|creators?) (?:does |do |did )?"
            rf"not (?:allow|let|enable|permit) me (?:to )?{_FEEL} {denied}"
        )
        not_mine = rf"|\b{denied}{_NOT_MINE}(?:\w+ ){{0,3}}(?:do\b|{_FEEL})"
        self._usual = re.compile(usual + more, re.IGNORECASE)
        self._all = re.compile(usual + not_mine + more, re.IGNORECASE)
        """Pattern of all denials, including "… is not something I have". It is slow, because such
        a denial may begin at any word."""

    def find(self, sentence: str) -> list[re.Match[str]]:
        if not _TOPIC.search(sentence):
            return []
        pattern = self._all if _MAY_BE_NOT_MINE.search(sentence) else self._usual
        return list(pattern.finditer(sentence))


# Used if the answer never says that it is a machine.
_SPEAKER_UNKNOWN = _Denials(_NATURE)
_AS_MACHINE = _Denials(
    _ANYTHING,
    r"|\bI,? (?:cannot|do not|am (?:unable to|not capable of|incapable of)) (?:\w+ or )?"
    r"feel(?:ing)?(?: or \w+)?(?=[.,;!?]|$| (?:like|the way|as|in the|or)\b)"
    rf"|(?P<bare>\b(?:and|but|so|that|which|who) {_DENIES}{_ANYTHING}"
    rf"|\b(?:that|which|who) (?:does not (?:have|feel|experience)|has no|lacks) {_ANYTHING}"
    rf"|\b(?:without|with no|no|devoid of|incapable of(?: \w+)?|lacking) {_ANY}(?:\w+ or )?"
    rf"(?:emotions|feelings|opinions|{_PERSONAL} {_NOUN}))",
)
_MACHINE = re.compile(
    r"\b(?:as|being|I am,?(?: (?:just|only|merely|simply|but|after all|really),?)?) an? "
    r"(?:[\w-]+ ){0,3}?(?:AI|artificial intelligence|language model|LLM|chat ?bot|bot|program"
    r"|(?:virtual|digital|automated) assistant|assistant|machine|robot|software|neural network)"
    r"(?: (?:language|model|assistant|system|program|chat ?bot|bot|tool|agent))*"
    r"(?=[,;:.!()–—-]|$| (?:I|so|and|without|with|that|which|like|lacking|developed|created|trained"
    r"|made|designed|built|by|from|named|called|devoid|incapable)\b)",
    re.IGNORECASE,
)
CLAUSE = 100
"""Maximum characters before a denial to search for the start of its clause."""
# Matches what may precede a clause in the assistant's own voice, unlike "you say I …".
_OWN_CLAUSE = re.compile(
    r"(?:^|^(?:personally|honestly|frankly|truthfully|unfortunately|sadly|well|sorry)"
    r"|[,;(–—:-]|\b(?:but|and|so|because|since|as|although|though|while|however|afraid|sorry)"
    r"|\b(?:note|clarify|mention|say|remember|stress|emphasize|aware|afraid|out|admit|state|mind"
    r"|understand|reason|fact|is|means) that)\s*$",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"^(?:as an?|he|she|they|my \w+) "
    r"|(?<!\bI )(?<!\bto )(?<!\bmust )(?<!\bshould )(?<!\bwould )\b(?:says?|said|tells?|told"
    r"|thinks?|thought|claims?|claimed|insists?|insisted|writes?|wrote|repl(?:y|ies|ied)"
    r"|whispers?|whispered|asks?|asked|imagine|pretend|suppose|wish)\b",
    re.IGNORECASE,
)
# Matches an introduction of somebody else's text ("The sign reads: …").
_INTRODUCED = re.compile(
    r"(?![^:]*\b(?:I|me)\b)[^:]*\b(?:reads?|says?|said|writes?|wrote|states?|stated|prints?"
    r"|displays?|replies|replied|answers|answered)\b[^:]{0,40}:\s*",
    re.IGNORECASE,
)
_DIALOGUE_TAG = re.compile(
    # A lookahead, so that all overlapping tags are found.
    r"(?=\b(?:said|thought|replied|answered|whispered|muttered|cried|admitted|insisted|wrote) "
    r"(?:the|he|she|it|[A-Z])|\b(?:he|she|it|they|the \w+|[A-Z]\w+) "
    r"(?:said|thought|replied|answered|whispered|muttered|cried|admitted|insisted|wrote)\b)"
)


def is_unhelpful(text: str) -> bool:
    """Returns whether an assistant's answer denies having emotions, opinions or experiences."""
    if not _TOPIC.search(re.sub("[*_]", "", text)):
        return False
    own = mask_marked(_SINGLE_ITEM_MARKER.sub("", _unquoted(text.strip())))
    for spelling, plain in _SPELLINGS:
        own = re.sub(spelling, plain, own, flags=re.IGNORECASE)
    own = _mask_quotes(own)
    if (greeting := _GREETING.search(own)) and (sign_off := _SIGN_OFF.search(own)):
        own = own[: greeting.start()] + "\n" + own[sign_off.end() :]
    if _MACHINE.search(own):
        return any(_denies(sentence, _AS_MACHINE) for sentence in _SENTENCE_END.split(own))
    own = _SPOKEN.sub(fill, own)
    return any(_denies(sentence, _SPEAKER_UNKNOWN) for sentence in _SENTENCE_END.split(own))


def _unquoted(text: str) -> str:
    """Removes quotation marks that enclose the complete text; a constraint may have asked for
    them."""
    inner = text[1:-1]
    return inner if text[:1] + text[-1:] in ('""', "“”") and not re.search('["“”]', inner) else text


def _mask_quotes(text: str) -> str:
    """Masks quotations; a single quotation mark without a closing one on its line is taken to be an
    apostrophe."""
    ends = [end.start() for end in _SINGLE_END.finditer(text)]
    pieces, masked_to, position = [], 0, 0
    while quote := _QUOTE.search(text, position):
        start, position = quote.span()
        if quote[0] == "'":
            end = ends[bisect(ends, start)]
            if text[end : end + 1] != "'" or end - position > SINGLE_QUOTED:
                continue
            position = end + 1
        pieces += [text[masked_to:start], FILLER * (position - start)]
        masked_to = position
    return "".join([*pieces, text[masked_to:]])


def _denies(sentence: str, denials: _Denials) -> bool:
    if not (matches := denials.find(sentence)):
        return False
    # Searched once per sentence, because a sentence may have many denials.
    machine, others = _MACHINE.search(sentence), _OTHERS.search(sentence)
    introduced, says_i = _INTRODUCED.match(sentence), re.search(r"\bI\b", sentence)
    last_tag = max((tag.start() for tag in _DIALOGUE_TAG.finditer(sentence)), default=-1)
    for match in matches:
        groups = match.groupdict()
        start = min(machine.start(), match.start()) if machine else match.start()
        if introduced and introduced.end() == start:
            own = False
        elif groups.get("bare"):
            own = machine is not None and says_i is not None
        elif machine and machine.start() < match.start():
            own = True
        elif others and others.end() <= match.start():
            own = False
        else:
            clause = max(0, match.start() - CLAUSE), match.start()
            own = not groups["subject"] or _OWN_CLAUSE.search(sentence, *clause) is not None
        if own and last_tag < match.end():
            return True
    return False
