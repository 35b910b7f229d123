"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json does.

llama.cpp cannot read a tokenizer.json: it has a list of splitters written by hand, and a file names one of them.
The name follows from the structure of the `pre_tokenizer` entry. A structure that is not in the table is refused,
because a wrong splitter gives a file that runs and answers badly.
Left out: splitters of architectures that Whit does not write, and those that llama.cpp only approximates.
Source: the splitters of llama.cpp, the tokenizer.json files of the models named beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers.models import BPE

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
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

Steps = tuple[str, ...]


@dataclass(frozen=True)
class Splitter:
    """One of llama.cpp's pre-tokenizers.

    name               what a file says
    regexes            applied one after the other; matches and what lies between them become pieces
    structures         pre-tokenizers of tokenizer.json that split alike, beside plain splits at `regexes`
    synonyms           names that llama.cpp treats as this one
    whole_words_first  a piece that is a token is taken as it is, before any merge
    adds_bos           a first token is put before a text unless the file says otherwise
    """

    name: str
    regexes: Steps
    structures: tuple[Steps, ...] = ()
    synonyms: Steps = ()
    whole_words_first: bool = False
    adds_bos: bool = False


# The steps of a structure, in order. ByteLevel either splits as GPT-2 does ("ByteLevel+split") or only maps bytes.
SPLITTERS = (
    Splitter(  # GPT-2, OPT, GPT-NeoX, Pythia, OLMo, Phi-2, MPT
        "gpt-2",
        (GPT2,),
        structures=(("ByteLevel+split",),),
        synonyms=("phi-2", "olmo", "mpt", "jais", "exaone4", "trillion", "granite-docling", "gigachat", "a.x-4.0"),
    ),
    Splitter(  # SmolLM, StarCoder, Command-R
        "smollm",
        (r"\p{N}", GPT2),
        structures=(("Digits individual", "ByteLevel+split"),),
        synonyms=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    Splitter(  # Llama 3, SmolLM3, Falcon 3
        "llama-bpe",
        (LLAMA3,),
        synonyms=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        whole_words_first=True,
        adds_bos=True,
    ),
    Splitter("dbrx", (LLAMA3,), synonyms=("smaug-bpe", "chatglm-bpe")),  # Phi-4, OLMo 2
    Splitter("glm4", (LLAMA3,), synonyms=("glm5",), whole_words_first=True),
    Splitter(
        "qwen2",
        (QWEN2,),
        synonyms=("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "kormo", "f2llmv2", "solar-open", "grok-2"),
    ),
    Splitter("qwen35", (QWEN35,)),
    Splitter("tekken", (TEKKEN,), whole_words_first=True, adds_bos=True),  # Mistral Nemo
    Splitter("gpt-4o", (GPT4O,), synonyms=("llama4", "kanana2", "talkie", "minimax-m2")),  # Phi-4-mini
    Splitter(  # with one digit a piece in tokenizer.json; its vocabulary has no token of two
        "deepseek-coder",
        (*DEEPSEEK_CODER, r"\p{N}"),
        structures=((*(f"Split {regex}" for regex in DEEPSEEK_CODER), "Digits individual", "ByteLevel"),),
    ),
    Splitter("deepseek-v3", DEEPSEEK3, synonyms=("hunyuan-dense", "joyai-llm", "hy_v4")),
    Splitter(
        "falcon",
        (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
        # differs where a byte of a letter looks like a digit once mapped; llama.cpp has nothing closer
        structures=(("Punctuation Contiguous", "ByteLevel+split", "Digits", "Split [0-9][0-9][0-9]"),),
    ),
    # for files made before llama.cpp knew more than one; written for no tokenizer
    Splitter("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
_BY_NAME = {name: splitter for splitter in SPLITTERS for name in (splitter.name, *splitter.synonyms)}


def pretokenizer_name(tokenizer: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json with byte-level BPE.

    where  the file, for the message
    Raises ModelError when llama.cpp has nothing that splits in this way.
    """
    steps = tuple(pretokenizer_steps(tokenizer.get("pre_tokenizer")))
    alike = [splitter for splitter in SPLITTERS if steps in _structures(splitter)]
    if not alike:
        raise ModelError(
            f"{where}: splits text in a way that Whit does not know llama.cpp's name for: "
            f"{' then '.join(steps) or 'no pre-tokenizer'}. Known: {', '.join(s.name for s in SPLITTERS)}."
        )
    whole_words_first = bool(tokenizer["model"].get("ignore_merges", False))
    exact = [splitter for splitter in alike if splitter.whole_words_first == whole_words_first]
    if exact:
        return exact[0].name
    # where merges arrive at every token, looking a word up first changes nothing
    lost = _first_token_beyond_merges(tokenizer)
    if lost is not None:
        raise ModelError(
            f"{where}: splits like llama.cpp's {alike[0].name!r}, which takes whole words "
            f"{'only through merges' if whole_words_first else 'before merges'} although this tokenizer does the "
            f"opposite, and the token {lost!r} would be lost or found wrongly. llama.cpp cannot express it."
        )
    return alike[0].name


def splitter_named(name: str, where: str) -> Splitter:
    """How llama.cpp splits under one of its names. Raises ModelError for a name that is not in the table."""
    if name not in _BY_NAME:
        raise ModelError(f"{where}: the pre-tokenizer {name!r} is not known. Known: {', '.join(sorted(_BY_NAME))}.")
    return _BY_NAME[name]


def pretokenizer_steps(node: Mapping[str, Any] | None) -> list[str]:
    """The steps of a `pre_tokenizer` entry as the table writes them, whatever its nesting."""
    if node is None:
        return []
    kind = node["type"]
    if kind == "Sequence":
        return [step for child in node["pretokenizers"] for step in pretokenizer_steps(child)]
    if kind == "ByteLevel":
        prefix = " after a space" if node.get("add_prefix_space", True) else ""
        return [("ByteLevel+split" if node.get("use_regex", True) else "ByteLevel") + prefix]
    if kind == "Split":
        pattern, behavior, inverted = node["pattern"], node["behavior"], node.get("invert", False)
        # to drop what lies between matches is to isolate them when, as in all of the table, nothing lies between
        isolated = (behavior, inverted) in (("Isolated", False), ("Removed", True))
        how = "" if isolated else f" {behavior}{' inverted' if inverted else ''}"
        return [f"Split{how} {pattern.get('Regex', pattern.get('String'))}"]
    if kind == "Digits":
        return ["Digits individual" if node.get("individual_digits") else "Digits"]
    if kind == "Punctuation":
        return [f"Punctuation {node.get('behavior', 'Isolated')}"]
    if kind == "Metaspace":
        return ["Metaspace+split" if node.get("split", True) else "Metaspace"]
    return [kind]


def _structures(splitter: Splitter) -> tuple[Steps, ...]:
    return ((*(f"Split {regex}" for regex in splitter.regexes), "ByteLevel"), *splitter.structures)


def _first_token_beyond_merges(tokenizer: Mapping[str, Any]) -> str | None:
    """A token that merges never arrive at, tokens that are matched as written left out."""
    model = tokenizer["model"]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    backend = BPE(model["vocab"], [(left, right) for left, right in pairs])
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    return next((text for text in model["vocab"] if text not in added and len(backend.tokenize(text)) != 1), None)
