"""The card as others read it: front matter by a YAML library, Markdown by a parser of CommonMark."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from release_records import record
from whit.release.card import code, front_matter, render, row, size
from whit.release.choice import choices
from whit.release.origin import Origin

HOSTILE = "a | b\n---\n<script>alert(1)</script> ![x](http://x) `code` {{ 7 * 7 }} *b* [l](javascript:x) # \x1b[31m"


def card(origin: Origin, prompt: str = "<|user|>\n{prompt}\n") -> str:
    records = [record("m.Q4_0.gguf", 91_000_000, 0.05), record("m-GPTQ-4bit", 110_000_000, 0.06, "gptq")]
    chosen = choices(records)
    return render(
        {
            "front_matter": front_matter(origin, records, bool(prompt)),
            "origin": origin,
            "whit": "0.1.0",
            "torch": "2",
            "rows": [row(each, chosen[each.file]) for each in records],
            "context": "4,096",
            "measured": "2 windows",
            "machine": "llama.cpp on 1 core",
            "tokens": 64,
            "times": 3,
            "notes": ["a note"],
            "pictures": True,
            "examples": ["whit run m.Q4_0.gguf 'x'"],
            "prompt": prompt,
            "digest": "00",
            "calibration": origin.label,
            "preset": "fast",
            "again": "whit release x",
            "importance": "m.imatrix.gguf",
        }
    )


def parsed(text: str) -> tuple[dict[str, Any], list[Any]]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable("table").parse(body)


def every(tokens: list[Any]) -> list[Any]:
    return [each for token in tokens for each in (token, *(token.children or ()))]


def test_the_hub_reads_where_it_is_from_and_what_it_is() -> None:
    front, _ = parsed(card(Origin("m", "owner/m", "apache-2.0", "m")))
    assert front["base_model"] == "owner/m"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-generation"
    assert {"gguf", "gptq", "conversational"} <= set(front["tags"])
    assert front["quantized_by"]


def test_the_table_has_a_line_per_variant_and_links_to_its_file() -> None:
    _, tokens = parsed(card(Origin("m", "owner/m", "mit", "m")))
    assert sum(token.type == "table_open" for token in tokens) == 2
    assert sum(token.type == "tr_open" for token in tokens) == 1 + 2 + 1 + 6
    links = [token.attrs["href"] for token in every(tokens) if token.type == "link_open"]
    assert links == ["https://huggingface.co/owner/m", "m.Q4_0.gguf", "m-GPTQ-4bit"]
    assert next(token.content for token in tokens if token.type == "code_block") == "whit run m.Q4_0.gguf 'x'\n"


@pytest.mark.parametrize("prompt", [HOSTILE, "```\n# not a heading\n```\n<b>", "````" * 3])
def test_what_a_model_says_stays_text(prompt: str) -> None:
    text = card(Origin("m", "", HOSTILE, HOSTILE), prompt)
    front, tokens = parsed(text)
    assert front["license"] == "other"
    assert "\n" not in front["license_name"]
    assert "\x1b" not in text
    found = every(tokens)
    assert not [token for token in found if token.type in ("html_block", "html_inline")]
    assert [token.attrs["src"] for token in found if token.type == "image"] == ["frontier.png"]
    assert {token.attrs["href"] for token in found if token.type == "link_open"} == {"m.Q4_0.gguf", "m-GPTQ-4bit"}
    assert sum(token.type == "tr_open" for token in tokens) == 1 + 2 + 1 + 6
    fence = next(token for token in tokens if token.type == "fence")
    assert fence.content.rstrip() == prompt.replace("\x1b", "").rstrip()
    headings = [tokens[k + 1].content for k, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[:4] == ["m, quantized", "Which one?", "Run it", "Prompt template"]


def test_a_code_span_holds_any_text() -> None:
    for text in ("a", "`", "a``b", "`a", "x|y"):
        for written in (f"|h|\n|-|\n|{code(text, table=True)}|\n", f"Made from {code(text)} by hand.\n"):
            tokens = MarkdownIt("commonmark").enable("table").parse(written)
            assert [token.content for token in every(tokens) if token.type == "code_inline"] == [text]


def test_sizes_are_decimal() -> None:
    assert [size(n) for n in (120_000, 105_455_328, 4_700_000_000)] == ["0.12 MB", "105 MB", "4.70 GB"]
