"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json does.

llama.cpp cannot read a tokenizer.json: it has a list of splitters written by hand, and a file names one of them.
The name follows from the structure of the `pre_tokenizer` entry. A structure that is not in the table is refused,
because a wrong splitter gives a file that runs and answers badly.
Source: the splitters of llama.cpp, the tokenizer.json files of the models named beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whit.errors import ModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
    r"|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cased(suffix: str, digits: str) -> str:
    return _CASED.replace("{suffix}", suffix).replace("{digits}", digits)


# How GPT-2 splits: letters, digits, other signs, white space, each with at most one space before it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _cased("", "")
GPT4O = _cased(_CONTRACTIONS + "?", "{1,3}")

# The steps of a pre-tokenizer, in order. ByteLevel either splits as GPT-2 does ("ByteLevel+split") or only maps bytes.
_BY_STEPS: dict[tuple[str, ...], str] = {
    ("ByteLevel+split",): "gpt-2",  # GPT-2, OPT, GPT-NeoX, Pythia, OLMo, Phi-2
    ("Digits individual", "ByteLevel+split"): "smollm",  # SmolLM, StarCoder, Command-R
    (f"Split {LLAMA3}", "ByteLevel"): "llama-bpe",
    (f"Split {QWEN2}", "ByteLevel"): "qwen2",
    (f"Split {QWEN35}", "ByteLevel"): "qwen35",
    (f"Split {TEKKEN}", "ByteLevel"): "tekken",  # Mistral Nemo
    (f"Split {GPT4O}", "ByteLevel"): "gpt-4o",
    ("Punctuation Contiguous", "ByteLevel+split", "Digits", "Split [0-9][0-9][0-9]"): "falcon",
}
# llama.cpp's splitters of these names look a whole word up before they merge; others do not.
_WHOLE_WORDS_FIRST = {"llama-bpe", "tekken"}
_MERGES_ONLY = {"llama-bpe": "dbrx"}  # the same split without the look-up
_REGEXES: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "qwen35": (QWEN35,),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
}
# A tokenizer that Whit built from a GGUF file says the same with plain splits.
_BY_STEPS |= {(*(f"Split {regex}" for regex in regexes), "ByteLevel"): name for name, regexes in _REGEXES.items()}
_REGEXES["dbrx"] = _REGEXES["llama-bpe"]
# Names that llama.cpp treats as one of the above.
_SYNONYMS = {
    **dict.fromkeys(("olmo", "mpt", "phi-2", "jais", "default", "gpt-neox"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe", "glm4"), "dbrx"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), "qwen2"),
    "llama4": "gpt-4o",
}


def pretokenizer_name(tokenizer: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json with byte-level BPE.

    where  the file, for the message
    Raises ModelError when llama.cpp has nothing that splits in this way.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    name = _BY_STEPS.get(steps)
    if name is None:
        raise ModelError(
            f"{where}: splits text in a way that Whit does not know llama.cpp's name for: {' then '.join(steps)}. "
            f"Known: {', '.join(sorted(set(_BY_STEPS.values())))}."
        )
    if name in _WHOLE_WORDS_FIRST and not tokenizer["model"].get("ignore_merges", False):
        name = _MERGES_ONLY.get(name, name)
    return name


def pretokenizer_regexes(name: str, where: str) -> tuple[tuple[str, ...], bool]:
    """The regular expressions that split text under llama.cpp's name, and whether whole words are looked up first.

    Raises ModelError for a name that is not in the table.
    """
    known = _SYNONYMS.get(name, name)
    if known not in _REGEXES:
        raise ModelError(f"{where}: the pre-tokenizer {name!r} is not known. Known: {', '.join(sorted(_REGEXES))}.")
    return _REGEXES[known], known in _WHOLE_WORDS_FIRST


def _steps(node: Mapping[str, Any] | None) -> list[str]:
    if node is None:
        return []
    kind = node["type"]
    if kind == "Sequence":
        return [step for child in node["pretokenizers"] for step in _steps(child)]
    if kind == "ByteLevel":
        return ["ByteLevel+split" if node.get("use_regex", True) else "ByteLevel"]
    if kind == "Split":
        pattern = node["pattern"]
        return [f"Split {pattern.get('Regex', pattern.get('String'))}"]
    if kind == "Digits":
        return ["Digits individual" if node.get("individual_digits") else "Digits"]
    if kind == "Punctuation":
        return [f"Punctuation {node.get('behavior', 'Isolated')}"]
    return [kind]
