"""The pages about servers and proxies: their links lead somewhere, their settings load, and they say what the files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.proxies import FILES, SNIPPETS

from img_serving.config import load

PAGES = Path(__file__).parents[2] / "docs" / "deployment"
NAMES = ("bare-metal", "reverse-proxies")
TEXTS = [PAGES / f"{name}{language}.md" for name in NAMES for language in ("", ".ko")]


def ids(path: Path) -> str:
    return path.name


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", TEXTS, ids=ids)
def test_every_link_into_the_repository_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert len(links) >= 3
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", TEXTS, ids=ids)
def test_the_settings_on_a_page_load(page: Path, tmp_path: Path) -> None:
    found = blocks(page, "toml") + re.findall(r"<<'TOML'\n(.*?)^TOML$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    for text in found:
        (tmp_path / "config.toml").write_text(text.replace("#public_url", "public_url"))
        loaded = load(tmp_path / "config.toml", {"IMG_SERVING_API_KEY": "sk-x"})
        assert loaded.config.server.host == "127.0.0.1"
        assert loaded.config.server.trusted_proxies == ("127.0.0.1",)


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_give_the_same_commands(name: str) -> None:
    """But for what a prompt and the comments say."""

    def commands(language: str) -> list[str]:
        text = "".join(blocks(PAGES / f"{name}{language}.md", "sh"))
        return [re.sub(r" +# .*|\"prompt\": \"[^\"]*\"", "", line) for line in text.splitlines()]

    assert commands("") == commands(".ko")


@pytest.mark.parametrize("page", [page for page in TEXTS if "proxies" in page.name], ids=ids)
def test_what_the_table_names_is_in_the_files(page: Path) -> None:
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    head = rows.index("| | nginx | HAProxy | Caddy |")
    named = 0
    for row in rows[head + 2 : head + 11]:
        cells = row.split("|")[2:-1]
        assert len(cells) == len(FILES)
        for file, cell in zip(FILES.values(), cells, strict=True):
            text = (SNIPPETS / file).read_text()
            for term in re.findall(r"`([^`]+)`", cell):
                assert term.split(" ")[0].rstrip("…") in text, f"{file} says nothing of {term}"
                named += 1
    assert named > 25
