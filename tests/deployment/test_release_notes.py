"""scripts/release-notes: what CHANGELOG.md says of a version; scripts/project-version."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.support.releases import ROOT

from img_serving import __version__

TEXT = """# Changelog

What users notice.

## [Unreleased]

## [1.1.0] - 2026-11-26

### Added

- One.
  Its second line.

```
## [1.0.0] is no heading here
```

### Fixed

- Two, [as told][it].

## [1.0.0rc1] - 2026-11-02

- A candidate.

## 0.9.0

### Changed

[it]: https://example.com
[1.1.0]: https://example.com/1.1.0
"""


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "release-notes", *words], cwd=cwd, check=False, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def changelog(tmp_path: Path) -> Path:
    file = tmp_path / "CHANGELOG.md"
    file.write_text(TEXT)
    return file


def test_the_notes_are_the_section_without_its_heading(changelog: Path) -> None:
    expected = TEXT.partition("2026-11-26\n\n")[2].partition("\n## [1.0.0rc1]")[0]
    for spelled in ("1.1.0", "v1.1.0"):
        done = run(spelled, "--changelog", changelog)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert run("1.0.0rc1", "--changelog", changelog).stdout == "- A candidate.\n"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.0.0", 'there is no section "## [1.0.0] - YYYY-MM-DD" (there are: Unreleased, 1.1.0, 1.0.0rc1, 0.9.0)'),
        ("1.1", "there is no section"),
        ("Unreleased", 'the section "## [Unreleased]" is empty'),
        ("0.9.0", 'the section "## [0.9.0]" is empty'),  # headings and links are no notes
    ],
)
def test_missing_and_empty_notes_are_told_in_one_line(changelog: Path, version: str, said: str) -> None:
    done = run(version, "--changelog", changelog)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"release-notes: CHANGELOG.md: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_two_sections_of_a_version_are_told(changelog: Path) -> None:
    changelog.write_text(TEXT + "\n## [1.1.0] - 2026-11-27\n\n- Three.\n")
    done = run("1.1.0", "--changelog", changelog)
    assert done.returncode == 1
    assert "is a second heading for 1.1.0" in done.stderr


UNRELEASED = "# Changelog\n\n## [Unreleased]\n"
OLD = "\n## [1.0.0] - 2026-11-02\n\n- One.\n"
NEW = "\n## [1.1.0] - 2026-11-26\n"
NOTHING = "\nNothing has changed that users notice.\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{UNRELEASED}\n### Added\n\n- Two.\n{OLD}", f"{UNRELEASED}{NEW}\n### Added\n\n- Two.\n{OLD}"),
        (f"{UNRELEASED}{OLD}", f"{UNRELEASED}{NEW}{NOTHING}{OLD}"),
        (f"{UNRELEASED}\n### Added\n\n### Fixed\n{OLD}", f"{UNRELEASED}{NEW}{NOTHING}{OLD}"),
        (UNRELEASED, f"{UNRELEASED}{NEW}{NOTHING}"),
        (UNRELEASED.strip(), f"{UNRELEASED}{NEW}{NOTHING}"),
        (f"{UNRELEASED}\n[it]: https://example.com\n", f"{UNRELEASED}{NEW}{NOTHING}\n[it]: https://example.com\n"),
        (f"{UNRELEASED}\n- Two.", f"{UNRELEASED}{NEW}\n- Two.\n"),
        (f"# Changelog\n{OLD}", f"{UNRELEASED}{NEW}{NOTHING}{OLD}"),
        ("# Changelog\n", f"{UNRELEASED}{NEW}{NOTHING}"),
        (f"{UNRELEASED}\n- Two.\n{NEW}\n- As it is.\n", f"{UNRELEASED}\n- Two.\n{NEW}\n- As it is.\n"),
        (f"{UNRELEASED}\n- 둘.\n{OLD}".replace("\n", "\r\n"), f"{UNRELEASED}{NEW}\n- 둘.\n{OLD}".replace("\n", "\r\n")),
    ],
)  # fmt: skip
def test_a_release_gets_what_is_unreleased(changelog: Path, text: str, expected: str) -> None:
    changelog.write_bytes(text.encode())
    done = subprocess.run(
        [ROOT / "scripts" / "release-notes", "v1.1.0", "--released", "2026-11-26", "--changelog", changelog],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.decode() == expected
    assert changelog.read_bytes() == text.encode()
    changelog.write_bytes(done.stdout)
    assert run("1.1.0", "--changelog", changelog).returncode == 0


@pytest.mark.parametrize(
    "block",
    [
        "```` ```one line fence``` ````",
        "```code``` in a line",
        "```text\n~~~\n## [1.0.0]\n```",
        "~~~ `a` ```\n```\n## [1.0.0]\n~~~",
        "````\n```\n## [1.0.0]\n```` more\n## [1.0.0]\n`````  ",
        "   ```\n## [1.0.0]\n ```",
        "    ```\n\nIndented code opens nothing.",
        "- One:\n\n  ```sh\n  make\n  ```\n- Two",
        "- One:\n  ```\n\n  ## [1.0.0]\n      ```\n  ```",
        "10. - ```\n      ```",
        "- ```\n  an item ends, and what is open in it",
        "- One\n\n\t```\n\t## [1.0.0]\n\t```",
        "``\n~~\n` ` `",
    ],
)
def test_fenced_blocks_end_where_commonmark_says(changelog: Path, block: str) -> None:
    text = f"{UNRELEASED}\n{block}\n{OLD}"
    changelog.write_text(text)
    done = run("1.0.0", "--changelog", changelog)
    assert (done.returncode, done.stdout, done.stderr) == (0, "- One.\n", "")
    assert run("1.0.0", "--released", "2026-11-26", "--changelog", changelog).stdout == text
    assert run("Unreleased", "--changelog", changelog).stdout == f"{block}\n".rstrip() + "\n"


@pytest.mark.parametrize("block", ["```\nopen", "~~~\n```\n~~", "````\n```", "```\n``` text\n    ```"])
def test_a_block_that_hides_every_later_section_is_told(changelog: Path, block: str) -> None:
    changelog.write_text(f"{UNRELEASED}\n{block}\n{OLD}")
    for words in (["1.0.0"], ["1.0.0", "--released", "2026-11-26"]):
        done = run(*words, "--changelog", changelog)
        assert (done.returncode, done.stdout) == (1, "")
        assert "line 5 begins a block with " in done.stderr


def test_a_missing_changelog_is_told(tmp_path: Path) -> None:
    done = run("1.1.0", "--changelog", tmp_path / "none.md")
    assert done.returncode == 1
    assert "No such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_projects_version_is_the_default_and_has_notes(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(__version__).stdout


def test_the_version_is_read_without_python(tmp_path: Path) -> None:
    shown = subprocess.run(
        [ROOT / "scripts" / "project-version"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert shown.stdout == f"{__version__}\n"
