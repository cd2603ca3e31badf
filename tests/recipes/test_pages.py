"""The recipes as pages: two languages that show the same programs, links that lead somewhere, an index that names them all."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.recipes.pages import DOCS, blocks_of, program_of

LIBRARIES = ("openai-python", "openai-node", "langchain", "litellm", "vercel-ai-sdk")
NAMES = sorted(path.name.removesuffix(".md") for path in (DOCS / "recipes").glob("*.md") if ".ko." not in path.name)


def recipe(name: str, suffix: str = "") -> Path:
    """A page; `suffix` is ".ko" for the Korean one."""
    return DOCS / "recipes" / f"{name}{suffix}.md"


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]


def anchor_of(heading: str) -> str:
    """As GitHub makes it: in lower case, without punctuation, with hyphens for blanks."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", LIBRARIES)
def test_both_languages_show_the_same_code(name: str) -> None:
    english, korean = recipe(name), recipe(name, ".ko")
    assert blocks_of(english) == blocks_of(korean)
    assert english.read_text().count("```") == 2 * len(blocks_of(english))
    assert english.read_text().count("\n## ") == korean.read_text().count("\n## ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["", ".ko"])
def test_every_link_leads_somewhere(name: str, suffix: str) -> None:
    page = recipe(name, suffix)
    found = links(page.read_text())
    assert found
    for link in found:
        path, _, anchor = link.partition("#")
        target = page.parent / path
        assert target.is_file(), link
        headings = re.findall(r"^##+ (.+)$", target.read_text(), re.MULTILINE)
        assert not anchor or anchor in {anchor_of(heading) for heading in headings}, link


@pytest.mark.parametrize("name", NAMES)
def test_each_page_is_there_in_both_languages_and_knows_the_other(name: str) -> None:
    assert f"({name}.ko.md)" in recipe(name).read_text()
    assert f"({name}.md)" in recipe(name, ".ko").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "README"])
def test_the_index_names_every_page(name: str) -> None:
    assert f"({name}.md)" in links_of("README")
    assert f"({name}.ko.md)" in links_of("README.ko")


def links_of(name: str) -> str:
    return " ".join(f"({link})" for link in links(recipe(name).read_text()))


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_python_on_a_page_is_python(name: str) -> None:
    """It is run where the library is (`test_libraries.py`); everywhere it is at least read."""
    program = program_of(recipe(name), "python")
    assert program or program_of(recipe(name), "js")
    ast.parse(program)
