"""The tokenizer as GGUF holds it: tokens, their kinds, merges or scores, and the name of how text is split.

llama.cpp knows ways to split text by name only. They are recognised here by what they do, as tokenizer.json says it.
One that is not known is refused, because another way would give other tokens without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sparlow.errors import InputError, as_input_error
from sparlow.exporting.gguf_families import MERGE
from sparlow.files import parse_json

_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # regular expression: name
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS + r"\p{N}" + _REST: "qwen2",
}
_WHOLE_WORDS = ("llama-bpe",)  # of which llama.cpp takes a word that is a token as it is, without merging


def tokenizer_fields(folder: Path, size: int) -> dict[str, Any]:
    """Return the fields below ``tokenizer.``.

    Args:
        folder: With tokenizer.json.
        size: Rows of the embedding, which may be more than there are tokens.

    Raises:
        InputError: There is no such file, or llama.cpp has no name for how it splits text.
    """
    if not (folder / "tokenizer.json").exists():
        raise InputError(f"{folder} has no tokenizer.json, without which nothing reads GGUF. Add it.")
    content = parse_json(folder / "tokenizer.json")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(f"A tokenizer of the kind {model.get('type')} is not written as GGUF yet. {MERGE}")
    pieces = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(content, size, pieces=pieces)
    found = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    found |= _pieces(content, tokens) if pieces else _bytes(content)
    return found | _special(folder, size)


def _tokens(content: Mapping[str, Any], size: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = dict(content["model"]["vocab"])
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    vocabulary |= {text: token["id"] for text, token in added.items()}
    by_number = {number: text for text, number in vocabulary.items()}
    if max(by_number) >= size:
        raise InputError(f"The tokenizer has {max(by_number) + 1} tokens, and the embedding {size} rows. Check both.")
    tokens, kinds = [], []
    for number in range(size):
        text = by_number.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        kinds.append(_kind(text, added, content["model"].get("unk_token"), pieces=pieces))
    return tokens, kinds


def _kind(text: str | None, added: Mapping[str, Any], unknown: str | None, *, pieces: bool) -> int:
    if text is None:
        return _UNUSED
    if pieces and text == unknown:
        return _UNKNOWN
    if text in added:
        return _CONTROL if added[text].get("special") else _OWN
    byte = pieces and len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">")
    return _BYTE if byte else _NORMAL


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in _raw(content))
    return [(pair[0], pair[1]) for pair in pairs]


def _raw(content: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = content["model"].get("merges") or []
    return found


def _bytes(content: Mapping[str, Any]) -> dict[str, Any]:
    name = _split_name(content.get("pre_tokenizer") or {})
    if name is None or bool(content["model"].get("ignore_merges")) != (name in _WHOLE_WORDS):
        raise InputError(f"The tokenizer splits text in a way for which no name of llama.cpp is known here. {MERGE}")
    return {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": [" ".join(pair) for pair in _merges(content)]}


def _split_name(split: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of a way to split text into words, if it is known."""
    steps = split.get("pretokenizers", [split]) if split.get("type") == "Sequence" else [split]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    kinds = [step.get("type") for step in steps[:-1]]
    if last.get("use_regex", True):
        digits = kinds == ["Digits"] and steps[0].get("individual_digits")
        return "gpt-2" if not kinds else "smollm" if digits else None
    if kinds != ["Split"] or steps[0].get("invert") or str(steps[0].get("behavior")).lower() != "isolated":
        return None
    return _SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))


def _pieces(content: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the fields of a tokenizer of sentencepiece: a token that is merged earlier has a higher score."""
    ranks: dict[str, int] = {}
    last = None
    for pair in _merges(content):
        text = "".join(pair)
        if text != last and text in ranks:
            raise InputError(f"The merges of this tokenizer are in no order that scores could give. {MERGE}")
        ranks.setdefault(text, len(ranks))
        last = text
    scores = [-float(ranks.get(text, len(ranks))) for text in tokens]
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores, **_prefix(content)}


def _prefix(content: Mapping[str, Any]) -> dict[str, Any]:
    normalizer, split = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    metaspace = split.get("type") == "Metaspace" and split.get("prepend_scheme", "always") != "never"
    return {"ggml.add_space_prefix": metaspace or any(step.get("type") == "Prepend" for step in steps)}


def _special(folder: Path, size: int) -> dict[str, Any]:
    with as_input_error(f"Cannot open the tokenizer of {folder}"):
        untyped: Any = AutoTokenizer
        tokenizer = untyped.from_pretrained(folder)
        text = tokenizer("a").input_ids
    numbers = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    numbers["padding"] = tokenizer.pad_token_id
    found: dict[str, Any] = {
        f"ggml.{name}_token_id": number for name, number in numbers.items() if number is not None and number < size
    }
    found["ggml.add_bos_token"] = bool(text) and text[0] == numbers["bos"]
    found["ggml.add_eos_token"] = bool(text) and len(text) > 1 and text[-1] == numbers["eos"]
    template = tokenizer.chat_template
    return found | ({"chat_template": template} if isinstance(template, str) else {})
