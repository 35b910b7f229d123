"""What pages show exists: every command parses, every option, recipe, import, target and file that is named is there.

The commands' own tables are the truth. No command is run.
"""

import ast
import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from manual import examples, recipes
from manual.commands import (
    CONSOLE,
    ROOT,
    Shown,
    blocks,
    command_lines,
    is_synopsis,
    option_names,
    pages,
    spans,
    without_remark,
    words,
)

from whit.cli.app import VERBS, app
from whit.pipeline.effort import PRESETS
from whit.pipeline.targets import LAYOUTS
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.named import check_rounding

PAGES = pages()
GROUP: Any = typer.main.get_command(app)
BENCHES = "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
FOREIGN = {"-c", *re.findall(r'add_argument\("(--[\w-]+)"', BENCHES)}  # of other programs that sentences mention


def command(verb: str) -> Any:
    found = GROUP.get_command(GROUP.make_context("whit", [], resilient_parsing=True), verb)
    assert found is not None, f"there is no `whit {verb}`"
    return found


def options_of(verb: str) -> set[str]:
    return {name for parameter in command(verb).params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


EVERY_OPTION = {name for verb in VERBS for name in options_of(verb)} | {"--version"}


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The verb of a line and its values by the command's own parser; AssertionError with its message otherwise."""
    verb, *arguments = words(line)
    unknown = set(option_names(" ".join(a for a in arguments if a.startswith("-")))) - options_of(verb)
    assert not unknown, f"whit {verb} has no {', '.join(unknown)}"
    try:
        return verb, command(verb).make_context(verb, arguments).params
    except typer.Exit:  # --help
        return verb, {}
    except typer.TyperException as error:
        raise AssertionError(error.format_message()) from None


def is_placeholder(value: object) -> bool:
    return not isinstance(value, str) or value.isupper() or value.endswith(".json")


def check_names(values: dict[str, Any]) -> None:
    """Raises for recipes, presets, roundings and formats that do not exist."""
    if not is_placeholder(name := values.get("recipe")):
        assert folder_recipe(name) or recipe_named(name)
    if not is_placeholder(name := values.get("qat")):
        assert folder_recipe(name) or recipe_named(name)
    if not is_placeholder(name := values.get("preset")):
        assert name in PRESETS
    if not is_placeholder(name := values.get("rounding")):
        check_rounding(name)
    if not is_placeholder(name := values.get("format_")):
        assert name in {*LAYOUTS, "awq", "gptq_v2", "float"}


def shown_commands(program: str) -> list[tuple[str, str]]:
    return [
        (block.where, line)
        for page in PAGES
        for block in blocks(page)
        for line in command_lines(block)
        if line.startswith(program + " ")
    ]


COMMANDS = shown_commands("whit")


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where} {line[:40]}" for where, line in COMMANDS])
def test_every_command_that_is_shown_parses(where: str, line: str) -> None:
    if is_synopsis(line):
        verb = line.split()[1]
        unknown = set(option_names(line)) - options_of(verb)
        assert not unknown, f"{where}: whit {verb} has no {', '.join(unknown)}"
        return
    try:
        verb, values = parsed(line)
    except (AssertionError, ValueError):
        verb, values = parsed(without_remark(line))
    check_names(values)


def test_a_command_with_a_wrong_option_value_or_recipe_does_not_pass() -> None:
    parsed("whit quantize MODEL --fit 4GB -o small.gguf   # fine")
    parsed("whit inspect small.gguf | sed -n 1,5p > list")
    assert is_synopsis("whit eval A --against B [--json]")
    assert not is_synopsis("whit plan M --keep '*.[qk]_proj=f16' | head")
    for line in (
        "whit quantise MODEL -o small.gguf",
        "whit quantize MODEL --fits 4GB -o small.gguf",
        "whit quantize MODEL --recipe q4_0",
        "whit quantize MODEL --bpw four -o small.gguf",
        "whit inspect A B C",
        "whit explain --jsno 3",
    ):
        with pytest.raises(AssertionError):
            parsed(line)
    with pytest.raises(Exception, match="no recipe called"):
        check_names(parsed("whit quantize MODEL --recipe q4_k_xl -o small.gguf")[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_a_sentence_exists(page: Path) -> None:
    for span in spans(page):
        if span.text.startswith("whit ") and len(span.text.split()) > 1:
            verb = span.text.split()[1]
            if re.fullmatch("[a-z]+", verb):
                assert set(option_names(span.text)) <= options_of(verb), f"{span.where}: `{span.text}`"
        elif span.text.startswith("-"):
            unknown = set(option_names(span.text)) - EVERY_OPTION - FOREIGN
            assert not unknown, f"{span.where}: no command has {', '.join(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_that_is_shown_works(page: Path) -> None:
    for home, names in imports(block for block in blocks(page) if block.language != CONSOLE):
        module = import_module(home)
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, f"{page.name}: from {home} import {', '.join(missing)}"


def imports(shown: Iterable[Shown]) -> Iterable[tuple[str, list[str]]]:
    """(module, names) of every import of whit's own, in blocks that need not be Python as a whole."""
    for block in shown:
        for line in block.text.splitlines():
            if match := re.match(r"[+\s]*(from\s+(?:whit|bench)\b.*)$", line):
                node = ast.parse(re.sub(r"\s+", " ", match[1])).body[0]
                assert isinstance(node, ast.ImportFrom)
                yield node.module or "", [alias.name for alias in node.names]


def test_every_target_and_bench_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        texts = [line for block in blocks(page) for line in command_lines(block)] + [span.text for span in spans(page)]
        for text in texts:
            if match := re.match(r"make ([a-z-]+)", text):
                assert match[1] in targets, f"{page.name}: make {match[1]}"
            if match := re.match(r"python -m (bench|manual)\.(\w+)", text):
                script = (ROOT / match[1] / f"{match[2]}.py").read_text()
                assert all(f'"{name}"' in script for name in option_names(text[match.end() :])), f"{page.name}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in re.findall(r"\bdocs/\w+\.md", text) if not (ROOT / name).exists()]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_with_output_hold_what_a_run_printed(page: Path) -> None:
    for block in blocks(page):
        if block.language == CONSOLE:
            assert block.text.startswith("$ "), f"{block.where}: a console block begins with a command"
            assert len(block.text.splitlines()) > len(command_lines(block)), f"{block.where}: run `make docs-examples`"


def test_a_console_block_gets_what_its_commands_print_and_nothing_else_changes(tmp_path: Path) -> None:
    page = "Before\n\n```console\n$ echo old > file; cat file\nstale\n$ wc -w < file\n```\n\n    $ echo untouched\n"
    new = examples.filled(page, tmp_path, dict(os.environ))
    assert new == page.replace("stale\n", "old\n").replace("file\n```", "file\n1\n```")


def test_blocks_without_the_words_that_are_asked_for_stay_as_they_are(tmp_path: Path) -> None:
    page = "```console\n$ echo one\nstale\n```\n\n```console\n$ echo two\nstale\n```\n"
    new = examples.filled(page, tmp_path, dict(os.environ), "echo two")
    assert new == page.replace("two\nstale", "two\ntwo")


def test_commands_that_fail_or_succeed_against_their_word_stop_the_examples(tmp_path: Path) -> None:
    fails = "```console fails\n$ echo no; false\n```\n"
    assert examples.filled(fails, tmp_path, dict(os.environ)) == fails.replace("false\n", "false\nno\n")
    for page in (fails.replace("; false", ""), fails.replace(" fails", ""), "```console\n$ false | cat\n```\n"):
        with pytest.raises(SystemExit):
            examples.filled(page, tmp_path, dict(os.environ))


def test_the_page_of_recipes_is_what_the_tables_say() -> None:
    assert recipes.PAGE.read_text() == recipes.page(), "run `python -m manual.recipes`"


# GiB of Llama 3 8B's files, from llama.cpp's README on perplexity; with a header of 8 MB and two decimals.
PUBLISHED = {
    "q8_0": 7.96, "q6_k": 6.14, "q5_k_m": 5.33, "q4_k_m": 4.58, "q4_k_s": 4.37, "iq4_xs": 4.14,
    "q3_k_m": 3.74, "iq3_s": 3.42, "q3_k_s": 3.41, "q2_k": 2.96, "iq2_m": 2.74, "iq2_xxs": 2.24,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_on_the_page_of_recipes_are_those_of_published_files(name: str) -> None:
    row = re.search(rf"\| `{name}` \| ([\d.]+) ", recipes.page())
    assert row is not None
    assert float(row[1]) * 1e9 / 2**30 == pytest.approx(PUBLISHED[name], abs=0.016)
