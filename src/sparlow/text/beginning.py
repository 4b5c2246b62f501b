"""The tokens that a text begins with: those that a tokenizer puts there by itself, such as BOS."""

from typing import TYPE_CHECKING, cast

from sparlow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, NEVER = "auto", "never"
WITH_BOS = ", with BOS"  # follows the name of a corpus whose windows all begin with it, beside the published protocol
_SOME_TEXT = "A"


def beginning(tokenizer: "PreTrainedTokenizerBase", way: str) -> tuple[int, ...]:
    """Return the token ids that every window begins with; none for ``never``.

    Args:
        tokenizer: The model's.
        way: ``auto`` for what the tokenizer puts before a text by itself (some models have two tokens there),
            ``always`` for the same, else its beginning-of-text token, or ``never``.

    Raises:
        InputError: It has none, and ``always`` was asked for.
    """
    if way == NEVER:
        return ()
    own = _own_beginning(tokenizer)
    if own or way == AUTO:
        return own
    token = tokenizer.bos_token_id
    if not isinstance(token, int):
        raise InputError("The tokenizer has no beginning-of-text token. Give --bos auto or never.")
    return (token,)


def _own_beginning(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    whole, plain = (
        cast("list[int]", tokenizer(_SOME_TEXT, add_special_tokens=special)["input_ids"]) for special in (True, False)
    )
    for start in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    first = whole[:1]  # a text of which no token is known tells nothing but this
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
