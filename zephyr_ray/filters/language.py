"""Finds texts in languages that are not in a list."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.filters.passage import Fault, Passage
from zephyr_ray.models.prose import FILLER, mask_marked

OTHER, UNKNOWN = "other language", "language not detected"
CHARACTERS = 400
"""Characters read from the start of a prompt and of an answer; more would only cost time."""
LETTER_BYTES = 60
"""Minimum UTF-8 bytes of letters; on shorter texts the detector guesses. The unit is bytes because
fewer letters are enough in scripts other than Latin, whose letters have more bytes."""
SURE = 0.9
"""Minimum probability of the detected language."""


def find_language(passage: Passage, *, languages: Sequence[str]) -> Fault | None:
    """Finds a passage in another language. Joins prompt and answer, because each may be short, and
    ignores code and quotations."""
    texts = (passage.prompt, passage.answer or "")
    sample = "\n".join(mask_marked(text[:CHARACTERS]).replace(FILLER, " ") for text in texts)
    letters = "".join(filter(str.isalpha, sample))
    language, probability = "", 0.0
    if len(letters.encode(errors="replace")) >= LETTER_BYTES:
        language, probability = detect(sample)
    if probability < SURE:
        return Fault(UNKNOWN, is_removed=False)
    if language in languages:
        return None
    return Fault(OTHER, f"add {language} to languages", language)


def detect(text: str) -> tuple[str, float]:
    """Returns the most probable language of a text and its probability; "" and 0 if the detector
    finds none."""
    from langdetect import DetectorFactory, LangDetectException, detect_langs

    DetectorFactory.seed = 0  # the detector samples, so results vary without a seed
    try:
        [first, *_] = detect_langs(text)
    except (LangDetectException, ValueError):
        return "", 0.0
    return first.lang, first.prob


@cache
def known_languages() -> frozenset[str]:
    """Returns the codes of the languages that the detector knows."""
    from langdetect import PROFILES_DIRECTORY

    return frozenset(path.name for path in Path(PROFILES_DIRECTORY).iterdir())


def check_languages(languages: Sequence[str]) -> None:
    """Raises Permanent if the detector does not know a language."""
    for language in languages:
        if language not in (known := known_languages()):
            raise Permanent(f"languages: unknown '{language}'{suggest(language, known)}")
