"""Finds the prose in a text: all but code, mathematics, data, quoted lines, addresses and verse."""

import re
from collections.abc import Callable

FILLER = "\0"
"""Replaces each character that is not prose."""
VERSE_LINE = 60
"""Maximum characters per line of verse; the lines of wrapped prose are longer."""

# A block without an end runs to the end of the text, so that no search restarts inside it.
_DISPLAYED = re.compile(
    r"^[ >\t]*(```+|~~~+).*?(?:^[ >\t]*\1[`~]*[ \t]*$|\Z)|^[ \t]*>[^\n]*"
    r"|\$\$.*?(?:\$\$|\Z)|\\\[.*?(?:\\\]|\Z)|\\begin\{(\w+\*?)\}.*?(?:\\end\{\2\}|\Z)"
    r"|<(pre|code|script|style|svg|table)\b.*?(?:</\3>|\Z)|<!--.*?(?:-->|\Z)",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(
    r"(?<!`)(`++)[^`\n]++\1"  # code
    r"|(?<![\w$])\$(?=\S)[^$\n]++(?<=\S)\$(?![\w$])|\\\(.*?(?:\\\)|$)"  # mathematics
    r"|\b(?:[a-z][a-z+.-]{1,20}://|www\.)[^\s<>]*[\w/]"  # an address
    r"|(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+"
    r"|(?<![\w./~-])(?:[~.]*/|(?:[\w.-]++/){2})(?:[\w.-]++/)*+[\w.-]*\w"  # a path
    r"|(?<![\w-])\w[\w-]++\.(?-i:[a-z])\w{0,4}\b",  # a file
    re.MULTILINE | re.IGNORECASE,
)
# Lowercase words that seldom begin a sentence of prose, and what follows them in code.
_STATEMENT = (
    r"for\s+\w+(?:,\s*\w+)*\s+(?:in|from)\b[^.!?\n]*:|with\s+\S+\s+as\b|(?:from\s+\S+\s+)?import\s+\S"
    r"|select\s[^.\n]{0,200}\sfrom\s|insert\s+into\s|update\s+\w+\s+set\s|delete\s+from\s"
    r"|(?:def|fn|func|function|class|struct|enum|const|var|let\s+mut|lambda|public|private|static"
    r"|void|int|echo|puts|print|printf|return|yield|raise|throw|assert|del|foreach"
    r"|npm|npx|pip|git|sudo|apt|brew|docker|kubectl|curl|cd|mkdir|conda)\s+\S"
)
_CODE_LOOK = re.compile(
    r"[={}\\^|\t]|[∑∏∫√≤≥≠≈±×÷∞∈∀∃→⇒]|[-=<>+*]>|<-|::|&&|\+\+|//|/\*|\*/|\(\)|\s[<>;]\s|;[ \t]*$"
    r"|\b[A-Za-z_]\w*+\((?!e?s\))|\w\[|</?[A-Za-z][^<>]*>|\b[a-z]+_\w|\s--?[a-z]"
    # At the start of a line: a comment, a quotation, a shell's prompt, a key, an indent.
    r"|^[ \t]*(?:[#$%;@]|--|\" |\"\"\"|'''|(?:[a-z_][\w.-]*|\"[^\"\n]*\"):(?:[ \t]|$))"
    r"|^(?: {2,}|\t+)(?![-*•] |\d+[.)] )\S"
    # A comment after a statement, or a loop after a comment.
    r"|^[a-z_][\w.]*+:? # |^[^#\n]*+#[^\n]*?\bfor +\w+(?:, *\w+)* +in\b"
    rf"|(?:^|[.!?:]\s+)(?:{_STATEMENT})|^for\s+\w+(?:,\s*\w+)*\s+(?:in|from)\b"
    r"|^(?:for|while|if|elif|try|except|finally|with|do|switch|match|case|until)\b[^.!?\n]*:[ \t]*$"
    r"|^(?:end|else|begin|done|fi|esac|endif|then|loop|pass|break|continue):?[ \t]*$"
    r"|^[^,\n]+(?:,[^\s,\d][^,\n]*){2,}$",  # comma-separated values
    re.MULTILINE,
)
_BLOCK = re.compile(r"^(?:[^\S\n]*+\S[^\n]*+(?:\n|\Z))++", re.MULTILINE)
_ITEM = re.compile(r"(?:[-*•+]|\d+[.)])\s")


def mask(text: str) -> str:
    """Replaces everything that is not prose with FILLER; keeps the text's length and line breaks.

    A block of lines without a blank line counts as code if any of them looks like code, because
    wrong capitals in code are worse than missing ones in prose.
    """
    return _mask_blocks(_CODE_LOOK.search, mask_marked(text))


def mask_marked(text: str) -> str:
    """Masks only verse and text marked as something other than prose; unmarked code stays."""
    return _mask_blocks(_is_verse, _INLINE.sub(fill, _DISPLAYED.sub(fill, text)))


def _mask_blocks(is_other: Callable[[str], object], text: str) -> str:
    return _BLOCK.sub(lambda block: fill(block) if is_other(block[0]) else block[0], text)


def fill(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", FILLER, match[0])


def _is_verse(block: str) -> bool:
    """Returns whether all lines are short, and either most do not end a sentence or at least two
    begin with a lowercase letter."""
    lines = [line.strip() for line in block.splitlines() if line.strip(f" \t{FILLER}")]
    if len(lines) < 3 or any(len(line) > VERSE_LINE or _ITEM.match(line) for line in lines):
        return False
    lowercase = sum(line[:1].islower() for line in lines)
    ended = sum(line.endswith((".", "!", "?", ":")) for line in lines)
    return lowercase > 1 or 2 * ended < len(lines)
