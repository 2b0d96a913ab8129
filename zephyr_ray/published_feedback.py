"""Converts rated or ranked answers of published data sets to rows of feedback.

- UltraFeedback (openbmb/UltraFeedback on the hub): `instruction` and `completions`, each with
  `response`, `model`, `principle`, `custom_system_prompt`, `annotations` (by aspect: `Rating`, a
  text from 1 to 5 or N/A, and `Rationale`), `critique` and `overall_score`
- rankings, such as Nectar (berkeley-nest/Nectar): `prompt`, an Anthropic transcript, and `answers`,
  each with `answer`, `model` and `rank` (1 is the best)
- answers with `text` and `score`, as in our own feedback (docs/03)

The original of a repaired or unusable value is kept in the answer's `stated`, and counted.
"""

import math
from collections.abc import Iterator
from typing import Any

from zephyr_ray.conversations import Unreadable, checked, parse
from zephyr_ray.messages import Message, assistant, user
from zephyr_ray.published_rows import (
    EMPTY,
    INTEGER_END,
    NO_ANSWERS,
    NO_PROMPT,
    NO_TEXT,
    NOT_RATED,
    RANK_0,
    Conversion,
    Row,
    is_empty,
    number,
    task,
)

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
NOT_APPLICABLE = "N/A"
TEXTS = ("text", "response", "answer")
COPIED = ("finish_reason", "principle", "critique")
REPAIRED = "repaired/overall 10 that was 1"
DOUBTFUL = "unscored/overall 10 that may be 1"


def _feedback(row: Row) -> Row:
    *context, question = _messages(row)
    # In a transcript, whitespace separates the answer from its label.
    is_transcript = isinstance(row.get("prompt"), str) and row["prompt"] != question["content"]
    completions = [_completion(answer, is_transcript) for answer in _records(row["completions"])]
    if not completions:
        raise Unreadable(NO_ANSWERS)
    # Only if no answer has a score: a score from a rank cannot be compared with a judge's.
    if all(c["score"] is None for c in completions):
        # Ranks from 0 would leave the best answer without a score.
        if any(number(c.get("stated", {}).get("rank")) == 0 for c in completions):
            raise Unreadable(RANK_0)
        ranks = [c["rank"] for c in completions if c.get("rank")]
        for completion in completions:
            if completion.get("rank"):
                completion["score"] = max(ranks) + 1 - completion["rank"]
    if all(c["score"] is None and "aspects" not in c for c in completions):
        raise Unreadable(NOT_RATED)
    source = row.get("source")
    return {
        **task(question["content"]),
        "source": source if isinstance(source, str) else "published",
        **({"context": context} if context else {}),
        "completions": completions,
    }


def _remarks(row: Row) -> Iterator[str]:
    """Yields a name to count for each repaired, unreadable or missing value in a row's answers."""
    for completion in row["completions"]:
        stated = completion.get("stated", {})
        for name, value in stated.items():
            if name in ASPECTS:
                yield "unrated/unreadable rating"
            elif name == "overall" and number(value) == 10:
                yield DOUBTFUL if completion["overall"] is None else REPAIRED
            else:
                yield f"unscored/unreadable {name}"
        for name, aspect in completion.get("aspects", {}).items():
            if aspect["rating"] is None and name not in stated:
                yield f"unrated/{NOT_APPLICABLE}"


FEEDBACK = Conversion(
    needed=("completions",),
    optional=("prompt", "instruction", "id", "source"),
    convert=_feedback,
    remarks=_remarks,
)


def _messages(row: Row) -> list[Message]:
    """Returns the messages up to the answers. A `prompt` may be a conversation; an `instruction` is
    one text, even if it quotes a conversation."""
    if "prompt" not in row and "instruction" not in row:
        raise Unreadable(NO_PROMPT, column="prompt")
    has_prompt = not is_empty(row.get("prompt"))
    raw = row["prompt"] if has_prompt else row.get("instruction")
    if is_empty(raw):
        raise Unreadable(EMPTY)
    question = parse(raw) if has_prompt or not isinstance(raw, str) else raw
    messages = [user(question)] if isinstance(question, str) else question
    return checked([*messages, assistant("An answer.")])[:-1]


def _records(value: Any) -> list[Any]:
    """Returns the answers in a list or a struct of lists; none if they cannot be separated."""
    if isinstance(value, list):
        return value
    columns = value if isinstance(value, dict) else {}
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) != 1:
        return []
    return [{name: columns[name][n] for name in columns} for n in range(*lengths)]


def _completion(answer: Any, is_transcript: bool) -> Row:
    fields = answer if isinstance(answer, dict) else {}
    text = next((fields[name] for name in TEXTS if fields.get(name) is not None), None)
    if not isinstance(text, str):
        raise Unreadable(NO_TEXT)
    words = {name: value for name, value in fields.items() if isinstance(value, str)}
    stated: Row = {}
    aspects = _aspects(fields.get("annotations") or fields.get("aspects"), stated)
    overall = _read("overall", fields.get("overall"), stated, 1, 10)
    if (raw := fields.get("overall_score")) is not None:
        read = _read("overall", raw, stated, 1, 10)
        overall = _repaired(read, fields, aspects)
        if overall != read:
            stated["overall"] = raw
    score = _read("score", fields.get("score"), stated, -math.inf)
    rank = _read("rank", fields.get("rank"), stated, 1)
    return {
        "text": text.strip() if is_transcript else text,
        "model": str(fields.get("model") or "unknown"),
        "system": words.get("custom_system_prompt") or words.get("system"),
        **{name: words[name] for name in COPIED if name in words},
        **({"aspects": aspects} if aspects else {}),
        **({"overall": overall} if overall is not None or "overall" in stated else {}),
        **({"rank": rank} if rank is not None else {}),
        "score": overall if score is None else score,
        "reason": words.get("reason") or words.get("critique") or "",
        **({"stated": stated} if stated else {}),
    }


def _aspects(annotations: Any, stated: Row) -> Row:
    """Returns rating and rationale by aspect; a rating that does not apply is None."""
    aspects = {}
    for name in ASPECTS:
        notes = annotations.get(name) if isinstance(annotations, dict) else None
        if not isinstance(notes, dict):
            continue
        rating = notes.get("Rating", notes.get("rating"))
        reasons = (notes.get(key) for key in ("Rationale For Rating", "Rationale", "rationale"))
        aspects[name] = {
            "rating": _read(name, None if rating == NOT_APPLICABLE else rating, stated, 1, 5),
            "rationale": next((reason for reason in reasons if isinstance(reason, str)), ""),
        }
    return aspects


def _read(name: str, raw: Any, stated: Row, least: float, most: float = math.inf) -> float | None:
    """Returns a number, which may be given as text; None if `raw` is None. Also returns None for a
    value that is not a number from `least` to `most`, and keeps it in `stated` under its name:
    text, Booleans and numbers that can be stored unchanged, anything else as text."""
    if raw is None:
        return None
    value = number(raw)
    if value is None or not least <= value <= most:
        stated[name] = raw if isinstance(raw, str | bool) else str(raw) if value is None else value
        return None
    return int(value) if value == int(value) and abs(value) < INTEGER_END else value


def _repaired(overall: float | None, fields: Row, aspects: Row) -> float | None:
    """Returns the overall score, corrected if it is a 10 that was a 1; None if that is unknown.

    The first revision of UltraFeedback multiplied scores of 1 by 10. Its authors' rule: a 10 with a
    mean rating of at most 2 was a 1, and a 10 with a mean of more than 4 is correct. They asked the
    judge again about the others; the repaired revision, whose answers have `fine-grained_score`,
    has the new scores.

    Source: github.com/OpenBMB/UltraFeedback, issue 8 and src/data_annotation at commit bf80fd4.
    """
    ratings = [a["rating"] for a in aspects.values() if a["rating"] is not None]
    if overall != 10 or not ratings:
        return overall
    mean = sum(ratings) / len(ratings)
    if mean <= 2:
        return 1
    is_repaired_revision = fields.get("fine-grained_score") is not None
    return overall if mean > 4 or is_repaired_revision else None
