"""Extracts a one-sentence summary in plain English from a docstring, if there is one."""

import re

MIN_WORDS = 4
MAX_WORDS = 48

_SPACE = re.compile(r"\s+")
# Roles such as `:class:`~a.b.C`` become their text.
_ROLE = re.compile(r":[a-zA-Z][\w:+.-]*:`~?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"\[([^][]+)\](\[[^][]*\]|\([^()\s]*\))")
_FOOTNOTE = re.compile(r"\s*\[[\w#*]+\]_")
_NAMED_URL = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_+")
_ESCAPED_SPACE = re.compile(r"\\\s")
# Opening backticks are removed with the `~` and `.` of `~.axes.Axes`, closing ones with the `_` of
# a link.
_BACKTICKS = re.compile(r"(?<!\w)`+~?\.?(?=\w)|`+_*")
# Fields, sections, doctests, bullets and rulers end the prose even without a blank line.
_SECTION = re.compile(
    r"\s*(:\w[^:]*:(\s|$)|@\w+|>>>|\.\. |[-*+] |[-=~*#^_+|]{3,}"
    r"|(Args?|Arguments?|Parameters?|Params|Returns?|Raises|Yields|Examples?|Usage|Notes?|Attributes"
    r"|Inputs?|Outputs?|Keyword Arguments|References|See Also|Warnings?|Invariants?)\s*:{0,2}\s*$"
    r"|(Args|Arguments|Parameters|Returns|Raises|Yields|Example|Usage)\s*:)"
)
# C extensions and f2py begin with a signature, such as `name(a, b=1) -> int` or `name(a) = b`.
_SIGNATURE = re.compile(r"\s*[\w.,= ]*\b[\w.]+\([^)]*\)\s*((->|=|:|--).*)?\s*$")
# Sentences that refer elsewhere instead of describing, and lines that begin with a name and a sign,
# as grammars, formulas and lists of arguments do.
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
# Full stops of abbreviations and initials do not end a sentence.
_ABBREVIATION = re.compile(r"\b((?i:e\.g|i\.e|etc|vs|cf|resp|approx|fig|eq|al)|[A-Z])\.$")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def summarize(docstring: str) -> str | None:
    """Returns the first sentence of a docstring, if it is a description.

    Args:
      docstring: As `ast.get_docstring` returns it, without indentation.

    Returns:
      The sentence on one line without markup, or None if it has fewer than `MIN_WORDS` words, is
      not mostly ASCII letters, or refers to another place ("See ...", "Deprecated ...").
    """
    sentence = _first_sentence(_plain_text(_first_paragraph(docstring)))
    # Escapes can produce lone surrogates, which neither UTF-8 nor TensorFlow can represent.
    sentence = sentence.encode("utf-8", "ignore").decode()
    # A final colon introduced a block that is cut off.
    sentence = " ".join(sentence.split()[:MAX_WORDS]).rstrip(": ")
    if len(_WORD.findall(sentence)) < MIN_WORDS or len(sentence.split()) < MIN_WORDS:
        return None
    if _NOISE.match(sentence) or not _is_prose(sentence):
        return None
    return sentence


def key(summary: str) -> str:
    """Returns a key that is equal for summaries that a reader would call the same.

    Args:
      summary: A summary.

    Returns:
      The words of the summary in lower case, separated by one space, without punctuation.
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
    """Whether a sentence is mostly ASCII letters, unlike other scripts, formulas and tables."""
    visible = [character for character in sentence if not character.isspace()]
    letters = sum(character.isascii() and character.isalpha() for character in visible)
    return letters >= 0.7 * len(visible)
