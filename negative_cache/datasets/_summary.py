"""From a docstring to a one-sentence summary in plain English, or to nothing."""

import re

MIN_WORDS = 4
MAX_WORDS = 48

_SPACE = re.compile(r"\s+")
# `:class:`~a.b.C`` and ``code`` become their text.
_ROLE = re.compile(r":[a-zA-Z][\w:+.-]*:`~?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"\[([^][]+)\](\[[^][]*\]|\([^()\s]*\))")
_FOOTNOTE = re.compile(r"\s*\[[\w#*]+\]_")
_NAMED_URL = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_+")
_ESCAPED_SPACE = re.compile(r"\\\s")
# Those that open take `~` and `.` of `~.axes.Axes` with them, those that close the `_` of a link.
_BACKTICKS = re.compile(r"(?<!\w)`+~?\.?(?=\w)|`+_*")
# Lines at which prose ends even without a blank line: fields, sections, doctests, bullets, rulers.
_SECTION = re.compile(
    r"\s*(:\w[^:]*:(\s|$)|@\w+|>>>|\.\. |[-*+] |[-=~*#^_+|]{3,}"
    r"|(Args?|Arguments?|Parameters?|Params|Returns?|Raises|Yields|Examples?|Usage|Notes?|Attributes"
    r"|Inputs?|Outputs?|Keyword Arguments|References|See Also|Warnings?|Invariants?)\s*:{0,2}\s*$"
    r"|(Args|Arguments|Parameters|Returns|Raises|Yields|Example|Usage)\s*:)"
)
# `name(a, b=1) -> int`, `name(a) = b`: a signature, as C extensions and f2py write first.
_SIGNATURE = re.compile(r"\s*[\w.,= ]*\b[\w.]+\([^)]*\)\s*((->|=|:|--).*)?\s*$")
# Pointers and apologies instead of a description, and lines that begin with a name and a sign:
# grammars, formulas, arguments.
_NOISE = re.compile(
    r"\W*(see|refer to|deprecated|todo|fixme|xxx|same as|alias (for|of|to)|inherited|overrides?"
    r"|overridden|internal (use|method|function|helper)|do not (use|call)|not implemented"
    r"|for (documentation|details|more)|(this )?docstring|copied from|backwards?[- ]compatib\w+"
    r"|base class"
    r"|this (method|function|class|property) is (deprecated|private|internal|not|called))\b"
    r"|[\w.]+ (=|::=|->|-) |\*+\w+\*+ ?:",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z0-9])")
# Full stops that end no sentence: of abbreviations and of initials.
_ABBREVIATION = re.compile(r"\b((?i:e\.g|i\.e|etc|vs|cf|resp|approx|fig|eq|al)|[A-Z])\.$")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def summarize(docstring: str) -> str | None:
    """The first sentence of a docstring, if it says something.

    Args:
      docstring: As `ast.get_docstring` returns it: cleaned of indentation.

    Returns:
      The sentence on one line without markup, or None if it has fewer than `MIN_WORDS` words, is
      not mostly ASCII letters, or is a pointer to another place ("See ...", "Deprecated ...").
    """
    sentence = _first_sentence(_plain_text(_first_paragraph(docstring)))
    # Lone surrogates (from escapes) fit neither UTF-8 nor TensorFlow.
    sentence = sentence.encode("utf-8", "ignore").decode()
    # A colon announces the block that was cut off.
    sentence = " ".join(sentence.split()[:MAX_WORDS]).rstrip(": ")
    if len(_WORD.findall(sentence)) < MIN_WORDS or len(sentence.split()) < MIN_WORDS:
        return None
    if _NOISE.match(sentence) or not _is_prose(sentence):
        return None
    return sentence


def key(summary: str) -> str:
    """What two summaries have in common that a reader would call the same.

    Args:
      summary: A summary.

    Returns:
      Its letters and digits in lower case, words apart by one space.
    """
    return " ".join(re.findall(r"\w+", summary.casefold()))


def _first_paragraph(docstring: str) -> str:
    lines: list[str] = []
    for line in docstring.strip().split("\n"):
        if not lines and (not line.strip() or _SIGNATURE.match(line)):
            continue
        if not line.strip() or _SECTION.match(line):
            break
        lines.append(line)
    return " ".join(lines)


def _plain_text(text: str) -> str:
    for markup in (_ROLE, _LINK, _NAMED_URL):
        text = markup.sub(r"\1", text)
    for markup in (_FOOTNOTE, _BACKTICKS, _ESCAPED_SPACE):
        text = markup.sub("", text)
    return _SPACE.sub(" ", text).strip()


def _first_sentence(text: str) -> str:
    for match in _SENTENCE_END.finditer(text):
        sentence = text[: match.start()]
        if not _ABBREVIATION.search(sentence):
            return sentence
    return text


def _is_prose(sentence: str) -> bool:
    """Mostly ASCII letters: neither another script nor a formula nor a table."""
    visible = [character for character in sentence if not character.isspace()]
    letters = sum(character.isascii() and character.isalpha() for character in visible)
    return letters >= 0.7 * len(visible)
