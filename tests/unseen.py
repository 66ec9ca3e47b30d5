"""What shows nothing where a person reads it: said by the names and categories of Unicode's characters.

It is what Unicode derives Default_Ignorable_Code_Point from (DerivedCoreProperties.txt), with spaces and blanks. What
the code escapes is a list of ranges, so that one finds what the other lacks.
"""

from __future__ import annotations

import functools
import unicodedata

# Controls, format characters, surrogates, ends of lines and paragraphs, spaces.
_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
# What letters, marks and symbols that show nothing have in their names; punctuation that fills a gap is seen.
_WORDS = ("VARIATION SELECTOR", "FILLER", "GRAPHEME JOINER", "VOWEL INHERENT", "PATTERN BLANK", "NULL NOTEHEAD")
# Unassigned, and to be ignored until they are something (Other_Default_Ignorable_Code_Point).
_RESERVED = (0x2065, *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))


@functools.cache
def shows_nothing(character: str) -> bool:
    """Whether nothing of it is seen, or it changes how what is around it looks."""
    if character == " ":
        return False
    name, category = unicodedata.name(character, ""), unicodedata.category(character)
    return (
        category in _CATEGORIES
        or ord(character) in _RESERVED
        or (category[0] in "LMS" and any(word in name for word in _WORDS))
    )


def is_one_line(text: str) -> bool:
    """Whether everything in the text is seen, and stays on its line."""
    return not any(map(shows_nothing, set(text)))
