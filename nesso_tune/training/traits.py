"""What can be told of one answer by itself: which language it is in, and whether it ends in a loop."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nesso_tune.conversation import UNKNOWN_LANGUAGE
from nesso_tune.data.languages import CANDIDATES, NO_LANGUAGE, detect_language

# Words of these are no language that a person speaks: code in fences or backticks, calls of tools, addresses.
NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|<tool_call>.*?(?:</tool_call>|\Z)|https?://\S+", re.DOTALL)
# Bytes of letters: 12 Latin ones, 4 Chinese. Of English and Italian texts of 12 letters and more the detector takes
# 0.6 % for another language, of those of 8 to 11 letters 15 %.
LEAST = 12
BLOCK, COPIES, STRETCH = 64, 3, 24  # tokens of the longest block, how often it comes, and tokens of a loop at least


def language_told(text: str) -> str:
    """The language of an answer's prose; `und` where it is too short to tell, or holds none.

    Code, calls of tools and addresses are left out, and fewer than 12 letters are not told.
    """
    prose = NOT_PROSE.sub(" ", text)
    letters = "".join(filter(str.isalpha, prose))
    return detect_language(prose) if len(letters.encode(errors="surrogatepass")) >= LEAST else UNKNOWN_LANGUAGE


def in_language(text: str, language: str, expected: str) -> bool | None:
    """Whether an answer is in the language of its prompt; None where that cannot be told.

    Args:
        text: the answer.
        language: code of the prompt's language. Of a prompt whose row names none (`und`), it is the language that the
            data's own answer is told to be in.
        expected: the data's own answer.
    """
    wanted = language_told(expected) if language == UNKNOWN_LANGUAGE else language
    if wanted not in CANDIDATES or wanted == NO_LANGUAGE:  # the detector could never say so
        return None
    told = language_told(text)
    return None if told == UNKNOWN_LANGUAGE else told == wanted


def ends_in_a_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens of an answer repeat one block.

    So it is if for some length p of at most 64 tokens the last max(3 * p, 24) tokens have period p: each equals the one
    p before it. The block then stands there three times or more, and the loop is 24 tokens long or more: a refrain, a
    ruled line or a word said a few times is none. The last copy may be cut anywhere.
    """
    for period in range(1, min(BLOCK, len(ids) // COPIES) + 1):
        stretch = max(COPIES * period, STRETCH)
        tail = ids[-stretch:]
        if len(tail) == stretch and all(a == b for a, b in zip(tail[period:], tail, strict=False)):
            return True
    return False
