"""scripts/deploy.sh against a real remote and a `docker` that writes down how it is called."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.support.releases import CHANGELOG, ROOT, SCRIPTS, Project

FAILED, MISUSED, REFUSED, LACKING = 1, 2, 3, 4
TOKEN = "dckr_pat_s3cret-never-shown"
LOGIN = {"DOCKER_HUB_USERNAME": "painter", "DOCKER_HUB_TOKEN": TOKEN}
IMAGE = "painter/generative-img-serving"


def pushed(project: Project) -> list[str]:
    return [call.words[1] for call in project.calls() if call.words[0] == "push"]


# --- the command line


def test_the_help_names_every_option_and_exit_status(project: Project) -> None:
    for words in (["--help"], ["-h"], ["release", "--help"]):
        done = project.deploy(*words)
        assert done.returncode == 0
        assert not done.stderr
        for option in (
            "-v, --version",
            "-b, --build-only",
            "-d, --dry-run",
            "-f, --force",
            "-h, --help",
            "Exit status",
        ):
            assert option in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to do: direct or release"),
        (["publish"], '"publish" is neither a mode'),
        (["release", "--forced"], '"--forced" is neither'),
        (["release", "-v"], "-v needs a version"),
        (["release", "-b"], "-b is an option of direct"),
        (["direct", "-d"], "-d is an option of release"),
        (["direct", "-f"], "-f is an option of release"),
        (["direct", "release"], "one mode at a time"),
        *(
            ([mode, "-v", version], f'"{version.removeprefix("v")}" is no version')
            for mode in ("direct", "release")
            for version in ("1.2", "1.2.3-rc.1", "v1.2.3.4", "01.2.3", "latest", "1.2.3+local", "1.2.3 ; rm -rf /")
        ),
    ],
)
def test_wrong_usage_is_told_and_does_nothing(project: Project, words: list[str], said: str) -> None:
    before = project.state()
    done = project.deploy(*words, env=LOGIN)
    assert done.returncode == MISUSED
    assert said in done.stderr
    assert project.state() == before
    assert project.calls() == []


# --- release


def test_a_release_is_an_annotated_tag_of_this_commit_with_the_notes(project: Project) -> None:
    head = project.git("rev-parse", "HEAD")
    done = project.deploy("release")
    assert done.returncode == 0, done.stderr
    assert "Pushed v1.2.3" in done.stdout
    assert project.remote_commit("refs/tags/v1.2.3") == head
    assert project.git("cat-file", "-t", "refs/tags/v1.2.3", cwd=project.remote) == "tag"
    message = project.git("tag", "-l", "--format=%(contents)", "v1.2.3", cwd=project.remote)
    assert message.startswith("img-serving 1.2.3\n\n### Added\n\n- Pictures of lakes.\n\n### Fixed\n")
    assert project.calls() == []  # the image is built elsewhere


@pytest.mark.parametrize("spelled", [["-v", "1.2.3"], ["--version", "v1.2.3"], ["--version=1.2.3"]])
def test_the_version_may_be_said(project: Project, spelled: list[str]) -> None:
    assert project.deploy(*spelled, "release").returncode == 0
    assert project.remote_commit("refs/tags/v1.2.3") == project.git("rev-parse", "HEAD")


def test_a_dry_run_tells_everything_and_changes_nothing(project: Project) -> None:
    before = project.state()
    for spelled in ("-d", "--dry-run"):
        done = project.deploy("release", spelled)
        assert done.returncode == 0, done.stderr
        for said in (
            "A dry run: nothing is changed", f"annotated tag v1.2.3 of {project.git('rev-parse', 'HEAD')[:12]}",
            "main: The first commit", f"push it to origin ({project.remote})",
            "generative-img-serving:1.2.3, :1.2, :latest", "| - Pictures of lakes.", "Nothing is in the way.",
        ):  # fmt: skip
            assert said in done.stdout
        assert project.state() == before


def test_a_dry_run_tells_what_is_in_the_way_all_of_it(project: Project) -> None:
    project.write_notes("## [1.2.3]\n")
    (project.clone / "draft.txt").write_text("…")
    before = project.state()
    done = project.deploy("release", "-d")
    assert done.returncode == REFUSED
    assert done.stderr.count("would be refused") == 2
    assert "Nothing is in the way." not in done.stdout
    assert project.state() == before


@pytest.mark.parametrize("kind", ["changed", "staged", "untracked"])
def test_a_dirty_tree_is_refused(project: Project, kind: str) -> None:
    name = "draft.txt" if kind == "untracked" else "Dockerfile"
    (project.clone / name).write_text("FROM elsewhere\n")
    if kind == "staged":
        project.git("add", name)
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert f"refused: there are changes that no commit has ({name})" in done.stderr
    assert project.state() == before


def test_what_git_ignores_makes_no_tree_dirty(project: Project) -> None:
    (project.clone / ".env").write_text("DOCKER_HUB_TOKEN=x\n")
    assert project.deploy("release").returncode == 0


def test_an_existing_tag_is_refused_wherever_it_is(project: Project) -> None:
    project.git("tag", "v1.2.3")
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert "the tag v1.2.3 exists here" in done.stderr
    assert "though not on origin" in done.stderr
    assert project.state() == before

    project.git("push", "--quiet", "origin", "v1.2.3")
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert "the tag v1.2.3 exists, here and on origin" in done.stderr

    project.git("tag", "-d", "v1.2.3")
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert f"exists on origin (at {project.git('rev-parse', 'HEAD')[:12]}), though not here" in done.stderr
    assert project.state() == before


@pytest.mark.parametrize(
    ("where", "spelled"), [("both", "-f"), ("here", "--force"), ("there", "-f"), ("nowhere", "-f")]
)
def test_force_moves_the_tag_wherever_it_is(project: Project, where: str, spelled: str) -> None:
    if where != "nowhere":
        project.git("tag", "v1.2.3")
    if where in {"both", "there"}:
        project.git("push", "--quiet", "origin", "v1.2.3")
    if where == "there":
        project.git("tag", "-d", "v1.2.3")
    old = project.git("rev-parse", "HEAD")
    head = project.commit("A repair")
    project.git("push", "--quiet")
    planned = project.deploy("release", spelled, "-d")
    assert planned.returncode == 0, planned.stderr
    assert (f"replace the tag v1.2.3 here (now at {old[:12]})" in planned.stdout) == (where in {"both", "here"})
    assert (f"replace the tag v1.2.3 on origin (now at {old[:12]})" in planned.stdout) == (where in {"both", "there"})
    assert project.remote_commit("refs/tags/v1.2.3") != head
    done = project.deploy("release", spelled)
    assert done.returncode == 0, done.stderr
    assert project.remote_commit("refs/tags/v1.2.3") == head
    assert project.git("rev-parse", "v1.2.3^{commit}") == head


def test_force_overcomes_nothing_but_the_tag(project: Project) -> None:
    project.push_from_elsewhere()
    before = project.state()
    for more in ([], ["-v", "1.2.2"], ["-v", "1.3.0"]):
        assert project.deploy("release", "-f", *more).returncode == REFUSED
        assert project.state() == before


def test_commits_that_the_remote_lacks_are_pushed_with_the_tag(project: Project) -> None:
    project.commit("One")
    head = project.commit("Two")
    before = project.state()
    planned = project.deploy("release", "-d")
    assert planned.returncode == 0, planned.stderr
    assert (
        f"push main and the tag together, both or neither, to origin ({project.remote}), whose main lacks 2 commits\n"
        in planned.stdout
    )
    assert project.state() == before
    done = project.deploy("release")
    assert done.returncode == 0, done.stderr
    assert f"Pushed main and v1.2.3 ({head[:12]}) together to origin" in done.stdout
    assert project.remote_commit("refs/heads/main") == project.remote_commit("refs/tags/v1.2.3") == head


@pytest.mark.parametrize("fetched", [False, True])
def test_a_branch_behind_its_remote_is_refused(project: Project, fetched: bool) -> None:
    project.push_from_elsewhere()
    if fetched:
        project.git("fetch", "--quiet")
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert "main is behind origin/main" in done.stderr
    assert project.state() == before  # nor was anything fetched


def test_a_branch_that_has_gone_apart_from_its_remote_is_refused(project: Project) -> None:
    project.push_from_elsewhere()
    project.git("fetch", "--quiet")
    project.commit("Ours")
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert "main and origin/main have gone apart" in done.stderr


def test_a_branch_that_the_remote_does_not_have_is_pushed_with_the_tag(project: Project) -> None:
    project.git("switch", "--quiet", "-c", "series-1")
    assert "which has no series-1 yet" in project.deploy("release", "-d").stdout
    done = project.deploy("release")
    assert done.returncode == 0, done.stderr
    assert "Pushed series-1 and v1.2.3" in done.stdout
    assert project.remote_commit("refs/heads/series-1") == project.remote_commit("refs/tags/v1.2.3")


def test_a_branch_may_have_another_name_and_remote_there(project: Project) -> None:
    project.git("remote", "rename", "origin", "hub")
    project.git("switch", "--quiet", "-c", "mine", "--track", "hub/main")
    assert project.deploy("release").returncode == 0
    assert project.remote_commit("refs/tags/v1.2.3") == project.git("rev-parse", "HEAD")


def test_no_branch_no_remote_and_no_repository_are_refused(project: Project) -> None:
    project.git("switch", "--quiet", "--detach")
    project.git("remote", "remove", "origin")
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert "refused: HEAD is on no branch" in done.stderr
    assert 'refused: there is no remote "origin"' in done.stderr
    assert project.state() == before
    shutil.rmtree(project.clone / ".git")
    done = project.deploy("release")
    assert (done.returncode, "is no git repository" in done.stderr) == (REFUSED, True)


def test_a_dry_run_tells_what_it_can_without_a_remote(project: Project) -> None:
    project.git("remote", "set-url", "origin", f"{project.remote}.gone")
    for remove in (False, True):
        if remove:
            project.git("remote", "remove", "origin")
        done = project.deploy("release", "-d")
        assert done.returncode == REFUSED
        assert "make the annotated tag v1.2.3" in done.stdout
        assert re.search(
            r'would be refused: (there is no remote "origin"|the remote "origin" does not answer)', done.stderr
        )


def test_a_section_without_notes_is_refused(project: Project) -> None:
    project.write_notes("# Changelog\n\n## [1.2.3] - 2026-11-26\n\n### Added\n")
    project.commit("Notes")
    project.git("push", "--quiet")
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == REFUSED
    assert 'CHANGELOG.md: the section "## [1.2.3]" is empty' in done.stderr
    assert project.state() == before


def test_entries_that_the_notes_would_lack_are_mentioned(project: Project) -> None:
    project.write_notes(CHANGELOG.format(version="1.2.3").replace("[Unreleased]\n", "[Unreleased]\n\n- More.\n"))
    project.commit("Notes")
    project.git("push", "--quiet")
    done = project.deploy("release", "-d")
    assert done.returncode == 0
    assert 'CHANGELOG.md has entries under "Unreleased"' in done.stderr


def test_a_remote_that_does_not_answer_is_told_without_its_password(project: Project) -> None:
    project.git("remote", "set-url", "origin", f"http://painter:{TOKEN}@127.0.0.1:1/x.git")
    before = project.state()
    done = project.deploy("release")
    assert done.returncode == FAILED
    assert 'the remote "origin" does not answer' in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert project.state() == before


def test_a_push_address_is_shown_without_its_password(project: Project) -> None:
    project.git("remote", "set-url", "--push", "origin", f"http://painter:{TOKEN}@127.0.0.1:1/x.git")
    done = project.deploy("release", "-d")
    assert "push it to origin (http://127.0.0.1:1/x.git)" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_what_is_looked_at_is_what_is_pushed_to(project: Project, tmp_path: Path) -> None:
    """Not what is fetched from, where that is another repository."""
    fork = tmp_path / "fork.git"
    project.git("clone", "--quiet", "--bare", str(project.remote), str(fork), cwd=tmp_path)
    project.git("remote", "set-url", "--push", "origin", str(fork))
    theirs = project.push_from_elsewhere()
    project.remote, mirror = fork, project.remote
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == 0, done.stderr
    assert project.remote_commit("refs/tags/v1.3.0") == project.remote_commit("refs/heads/main") != theirs
    assert not project.git("tag", cwd=mirror)

    project.git("tag", "-d", "v1.3.0")
    another = project.git("commit-tree", "-p", "main", "-m", "Another's", "main^{tree}")
    project.git("push", "--quiet", str(fork), f"{another}:refs/heads/main")
    before = project.state()
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == REFUSED
    assert "the tag v1.3.0 exists on origin" in done.stderr
    assert f"git pull --ff-only {fork} main" in done.stderr
    assert project.state() == before


def test_several_push_addresses_are_refused(project: Project, tmp_path: Path) -> None:
    """A push to several is no whole: one may take it and another not."""
    second = tmp_path / "second.git"
    project.git("clone", "--quiet", "--bare", str(project.remote), str(second), cwd=tmp_path)
    for address in (str(project.remote), f"http://painter:{TOKEN}@127.0.0.1:1/x.git", str(second)):
        project.git("remote", "set-url", "--push", "--add", "origin", address)
    before = project.state()
    for more in ([], ["-f"], ["-d"]):
        done = project.deploy("release", *more)
        assert done.returncode == REFUSED
        shown = f"({project.remote} http://127.0.0.1:1/x.git {second})"
        assert f'the remote "origin" is pushed to several addresses {shown}: a release goes to one' in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert project.state() == before
    assert not project.git("tag", cwd=second)


@pytest.mark.parametrize("existing", [False, True])
def test_a_push_that_fails_leaves_the_tags_as_they_were(project: Project, existing: bool) -> None:
    if existing:
        project.git("tag", "v1.2.3")
        project.git("push", "--quiet", "origin", "v1.2.3")
        project.commit("A repair")
        project.git("push", "--quiet")
    hook = project.remote / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'tags are protected' >&2\nexit 1\n")
    hook.chmod(0o755)
    before = project.state()
    done = project.deploy("release", "-f")
    assert done.returncode == FAILED
    assert "tags are protected" in done.stderr
    assert "the tag v1.2.3 could not be pushed to origin" in done.stderr
    assert "main, its files and the tags here are as before" in done.stderr
    assert project.state() == before


def test_a_tag_that_somebody_else_moves_meanwhile_stays_theirs(project: Project) -> None:
    project.git("tag", "v1.2.3")
    project.git("push", "--quiet", "origin", "v1.2.3")
    project.commit("A repair")
    project.git("push", "--quiet")
    theirs = project.push_from_elsewhere()
    project.git("update-ref", "refs/heads/main", project.git("rev-parse", "HEAD"), cwd=project.remote)
    git = project.programs / "git"
    git.write_text(
        f"#!/bin/bash\n[[ $1 != push ]] || {shutil.which('git')} -C {project.remote} update-ref refs/tags/v1.2.3 {theirs}\n"
        f'exec {shutil.which("git")} "$@"\n'
    )
    git.chmod(0o755)
    before = project.git("rev-parse", "v1.2.3")
    done = project.deploy("release", "-f")
    assert done.returncode == FAILED
    assert "stale info" in done.stderr
    assert project.remote_commit("refs/tags/v1.2.3") == theirs
    assert project.git("rev-parse", "v1.2.3") == before


def test_an_unreadable_version_is_told(project: Project) -> None:
    (project.clone / "src" / "img_serving" / "__init__.py").write_text("VERSION = 1\n")
    done = project.deploy("release")
    assert done.returncode == FAILED
    assert 'should have one line __version__ = "1.2.3"' in done.stderr


# --- release: the commit


def with_entries(project: Project) -> str:
    """Put an entry under Unreleased and push it; the commit."""
    project.write_notes(
        CHANGELOG.format(version="1.2.3").replace("[Unreleased]\n", "[Unreleased]\n\n- Pictures of seas.\n")
    )
    (project.clone / ".env").write_text("DOCKER_HUB_TOKEN=x\n")
    head = project.commit("Seas")
    project.git("push", "--quiet")
    return head


def write_hook(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def planned_by_github(project: Project, tag: str) -> subprocess.CompletedProcess[str]:
    """What the workflow makes of `tag`."""
    return subprocess.run(
        [project.clone / ".github" / "publish-plan"],
        env={
            **project.environment, "GITHUB_OUTPUT": "/dev/null",
            "GITHUB_EVENT_NAME": "push", "GITHUB_REF": f"refs/tags/{tag}",
        },
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["1.2.4", "1.3.0rc1", "1.10.0", "2.0.0"])
def test_a_new_version_is_one_commit_and_its_tag(project: Project, version: str) -> None:
    head = with_entries(project)
    days = {project.run_date()}
    done = project.deploy("release", "-v", version)
    days.add(project.run_date())
    assert done.returncode == 0, done.stderr
    made = project.git("rev-parse", "main")
    assert f"Pushed main and v{version} ({made[:12]}) together to origin" in done.stdout
    assert project.remote_commit("refs/heads/main") == project.remote_commit(f"refs/tags/v{version}") == made
    assert project.git("log", "-1", "--format=%P|%an <%ae>|%cn|%B") == (
        f"{head}|A Maintainer <maintainer@example.com>|A Maintainer|Release {version}"
    )
    assert project.git("diff", "--name-only", head, made).split() == ["CHANGELOG.md", "src/img_serving/__init__.py"]
    source = (project.clone / "src" / "img_serving" / "__init__.py").read_text()
    assert source == f'"""The program."""\n\n__version__ = "{version}"\n'
    changelog = CHANGELOG.format(version="1.2.3").removeprefix("# Changelog\n\n## [Unreleased]\n\n")
    assert (project.clone / "CHANGELOG.md").read_text() in {
        f"# Changelog\n\n## [Unreleased]\n\n## [{version}] - {day}\n\n- Pictures of seas.\n\n{changelog}"
        for day in days
    }
    message = project.git("tag", "-l", "--format=%(contents)", f"v{version}", cwd=project.remote)
    assert message.strip() == f"img-serving {version}\n\n- Pictures of seas."
    assert project.git("status", "--porcelain", "--untracked-files=all") == ""
    assert (plan := planned_by_github(project, f"v{version}")).returncode == 0, plan.stdout


def test_the_sources_version_gets_its_missing_section_in_a_commit(project: Project) -> None:
    project.write_notes("# Changelog\n\n## [Unreleased]\n\n- The first.\n")
    head = project.commit("Notes")
    done = project.deploy("release")
    assert done.returncode == 0, done.stderr
    assert project.git("diff", "--name-only", head, "main").split() == ["CHANGELOG.md"]
    assert project.remote_commit("refs/heads/main") == project.remote_commit("refs/tags/v1.2.3") != head


def test_a_section_that_is_there_already_is_taken_as_it_is(project: Project) -> None:
    project.write_notes(CHANGELOG.format(version="1.3.0"))
    head = project.commit("Notes")
    assert project.deploy("release", "-v", "1.3.0").returncode == 0
    assert project.git("diff", "--name-only", head, "v1.3.0^{commit}").split() == ["src/img_serving/__init__.py"]


def test_a_release_without_entries_says_so_in_one_line(project: Project) -> None:
    planned = project.deploy("release", "-v", "1.2.4", "-d")
    assert re.search(r'CHANGELOG.md: a new section, "## \[1.2.4\] - [0-9-]{10}", says that nothing has', planned.stdout)
    done = project.deploy("release", "-v", "1.2.4")
    assert done.returncode == 0
    assert 'note: CHANGELOG.md has nothing under "Unreleased"' in done.stderr
    message = project.git("tag", "-l", "--format=%(contents)", "v1.2.4", cwd=project.remote)
    assert message.strip() == "img-serving 1.2.4\n\nNothing has changed that users notice."
    assert (plan := planned_by_github(project, "v1.2.4")).returncode == 0, plan.stdout


def test_a_dry_run_tells_the_commit_in_words_and_leaves_no_trace(project: Project) -> None:
    head = with_entries(project)
    before = project.state()
    done = project.deploy("release", "-v", "1.3.0", "-d")
    assert done.returncode == 0, done.stderr
    for said in (
        f'make the commit "Release 1.3.0" on main, after {head[:12]} (Seas):',
        'src/img_serving/__init__.py: __version__ = "1.2.3" becomes "1.3.0"',
        'CHANGELOG.md: what is under "## [Unreleased]" goes below a new heading, "## [1.3.0] - ',
        "make the annotated tag v1.3.0 of that commit",
        f"push main and the tag together, both or neither, to origin ({project.remote})\n",
        "| - Pictures of seas.", "Nothing is in the way.",
    ):  # fmt: skip
        assert said in done.stdout
    assert project.state() == before


@pytest.mark.parametrize(
    ("source", "lower"),
    [("1.2.3", "1.2.2"), ("1.10.0", "1.9.9"), ("1.2.3", "1.2.3rc9"), ("1.2.3rc10", "1.2.3rc9"), ("1.2.3a1", "1.2.2")],
)
def test_a_version_lower_than_the_sources_is_refused_whatever_is_forced(
    project: Project, source: str, lower: str
) -> None:
    project.write_version(source)
    project.commit("Version")
    before = project.state()
    for more in ([], ["-f"], ["-d"]):
        done = project.deploy("release", "-v", lower, *more)
        assert done.returncode == REFUSED
        assert f"{lower} is lower than {source}, which this branch says" in done.stderr
        assert project.state() == before


def test_an_older_series_is_released_from_its_branch(project: Project) -> None:
    project.git("switch", "--quiet", "-c", "series-1.2")
    project.git("tag", "-m", "Newer", "v1.3.0")
    done = project.deploy("release", "-v", "1.2.4")
    assert done.returncode == 0, done.stderr
    assert project.remote_commit("refs/tags/v1.2.4") == project.git("rev-parse", "series-1.2")


def test_a_clone_and_an_empty_remote_are_enough(project: Project, tmp_path: Path) -> None:
    with_entries(project)
    fresh = tmp_path / "fresh"
    project.git("clone", "--quiet", str(project.remote), str(fresh), cwd=tmp_path)
    project.clone = fresh
    assert (done := project.deploy("release", "-v", "1.3.0")).returncode == 0, done.stderr
    assert project.remote_commit("refs/tags/v1.3.0") == project.remote_commit("refs/heads/main")

    project.remote = tmp_path / "empty.git"
    project.git("init", "--quiet", "--bare", str(project.remote))
    project.git("remote", "set-url", "origin", str(project.remote))
    planned = project.deploy("release", "-v", "1.4.0", "-d")
    assert (planned.returncode, "which has no main yet" in planned.stdout) == (0, True)
    assert (done := project.deploy("release", "-v", "1.4.0")).returncode == 0, done.stderr
    assert project.remote_commit("refs/tags/v1.4.0") == project.remote_commit("refs/heads/main")


def test_force_moves_a_tag_to_the_release_commit(project: Project) -> None:
    with_entries(project)
    project.git("tag", "-m", "Too early", "v1.3.0")
    project.git("push", "--quiet", "origin", "v1.3.0")
    assert project.deploy("release", "-v", "1.3.0").returncode == REFUSED
    done = project.deploy("release", "-v", "1.3.0", "-f")
    assert done.returncode == 0, done.stderr
    made = project.git("rev-parse", "main")
    assert project.git("log", "-1", "--format=%s", made) == "Release 1.3.0"
    assert project.remote_commit("refs/heads/main") == project.remote_commit("refs/tags/v1.3.0") == made


@pytest.mark.parametrize("version", ["1.2.3", "1.3.0"])
def test_who_git_does_not_know_is_told_before_anything_changes(project: Project, version: str) -> None:
    with_entries(project)
    (project.home / ".gitconfig").write_text("[user]\nuseConfigOnly = true\n")
    before = project.state()
    done = project.deploy("release", "-v", version)
    assert done.returncode == REFUSED
    (told,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert told.startswith('deploy: refused: git does not know who you are: git config user.name "Your Name" && ')
    assert project.state() == before


def test_an_unfinished_merge_gets_no_release_commit(project: Project) -> None:
    head = project.git("rev-parse", "HEAD")
    project.git("switch", "--quiet", "-c", "side")
    project.commit("Aside")
    project.git("switch", "--quiet", "main")
    project.git("merge", "--quiet", "--no-ff", "--no-commit", "side")
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == REFUSED
    assert "a merge, cherry-pick or revert is under way here (MERGE_HEAD)" in done.stderr
    assert project.git("rev-parse", "main") == head


def test_the_users_hooks_run(project: Project) -> None:
    hooks = project.clone / ".git" / "hooks"
    write_hook(hooks, "pre-commit", "echo '<!-- checked -->' >>CHANGELOG.md && git add CHANGELOG.md")
    write_hook(hooks, "commit-msg", 'echo "Change: 7" >>"$1"')
    write_hook(hooks, "pre-push", "cat >>.git/was-pushed")
    assert project.deploy("release", "-v", "1.3.0").returncode == 0
    assert project.git("log", "-1", "--format=%B", "v1.3.0") == "Release 1.3.0\nChange: 7"
    assert project.git("show", "v1.3.0:CHANGELOG.md").endswith("<!-- checked -->")
    sent = (project.clone / ".git" / "was-pushed").read_text()
    assert "refs/heads/main" in sent
    assert "refs/tags/v1.3.0" in sent


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("hook", "script", "said"),
    [
        ("pre-commit", "echo 'tests fail' >&2; exit 1", 'git could not make the commit "Release 1.3.0"'),
        ("pre-commit", "rm CHANGELOG.md; git add -A; exit 1", 'git could not make the commit "Release 1.3.0"'),
        ("commit-msg", "exit 1", 'git could not make the commit "Release 1.3.0"'),
        ("reference-transaction", "! grep -q refs/tags/", "git could not make the tag v1.3.0"),
        ("pre-push", "exit 1", "main and v1.3.0 could not be pushed to origin"),
        ("pre-receive", "echo no >&2; exit 1", "main and v1.3.0 could not be pushed to origin"),
        ("update", "case $1 in refs/tags/*) exit 1 ;; esac", "main and v1.3.0 could not be pushed to origin"),
        ("update", "case $1 in refs/heads/*) exit 1 ;; esac", "main and v1.3.0 could not be pushed to origin"),
    ],
)
def test_what_fails_after_the_commit_takes_everything_back(
    project: Project, hook: str, script: str, said: str, *, moved: bool
) -> None:
    with_entries(project)
    project.commit("Not pushed yet")
    if moved:
        project.git("tag", "-m", "Too early", "v1.3.0")
        project.git("push", "--quiet", "origin", "v1.3.0")
    write_hook(
        (project.remote if hook in {"pre-receive", "update"} else project.clone / ".git") / "hooks", hook, script
    )
    before = project.state()
    done = project.deploy("release", "-v", "1.3.0", "-f")
    assert done.returncode == FAILED
    assert f"deploy: {said}" in done.stderr
    assert "note: main, its files and the tags here are as before" in done.stderr
    assert "not known" not in done.stderr
    assert project.state() == before
    assert project.git("symbolic-ref", "HEAD") == "refs/heads/main"


def test_what_a_hook_has_changed_besides_is_left_and_named(project: Project) -> None:
    head = with_entries(project)
    write_hook(project.clone / ".git" / "hooks", "pre-commit", "echo '# tidy' >>Dockerfile; exit 1")
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == FAILED
    assert "a hook, or somebody, has changed more, and that was left: Dockerfile" in done.stderr
    assert project.git("status", "--porcelain") == "M Dockerfile"  # the blank before it is stripped
    assert project.git("rev-parse", "main") == head


@pytest.mark.parametrize(("hook", "status"), [("pre-commit", 143), ("pre-push", 0)])
def test_an_interrupted_release_is_taken_back_or_complete(project: Project, hook: str, status: int) -> None:
    with_entries(project)
    file = project.clone.with_name("deploy-pid")
    write_hook(project.clone / ".git" / "hooks", hook, f"kill -TERM $(cat {file})")
    before = project.state()
    done = project.deploy("release", "-v", "1.3.0", before=("bash", "-c", 'echo $$ >"$0"; exec "$@"', str(file)))
    assert done.returncode == status, done.stderr
    if status:
        assert "note: main, its files and the tags here are as before" in done.stderr
        assert project.state() == before
    else:  # bash waits for git, and everything has arrived
        assert project.remote_commit("refs/tags/v1.3.0") == project.git("rev-parse", "main")


def test_a_connection_that_breaks_after_everything_arrived_is_no_failure(project: Project) -> None:
    with_entries(project)
    git = project.programs / "git"
    git.write_text(f'#!/bin/bash\n{shutil.which("git")} "$@" || exit\n[[ $1 != push ]]\n')
    git.chmod(0o755)
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == 0, done.stderr
    git.unlink()
    assert project.remote_commit("refs/tags/v1.3.0") == project.git("rev-parse", "main")


def test_a_branch_that_somebody_else_pushes_meanwhile_is_no_half_release(project: Project) -> None:
    with_entries(project)
    theirs = project.push_from_elsewhere()
    project.git("update-ref", "refs/heads/main", project.git("rev-parse", "HEAD"), cwd=project.remote)
    git = project.programs / "git"
    git.write_text(
        f"#!/bin/bash\n[[ $1 != push ]] || {shutil.which('git')} -C {project.remote} update-ref refs/heads/main {theirs}\n"
        f'exec {shutil.which("git")} "$@"\n'
    )
    git.chmod(0o755)
    before = project.state()
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == FAILED
    assert project.remote_commit("refs/heads/main") == theirs
    assert project.remote_commit("refs/tags/v1.3.0") is None
    assert {**project.state(), "remote": None} == {**before, "remote": None}


# --- release: what others do meanwhile


def start(project: Project, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(project.clone / "scripts" / "deploy.sh"), *words], cwd=project.clone, env=project.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_second_release_is_refused_while_one_is_under_way_and_takes_nothing_back(project: Project) -> None:
    with_entries(project)
    pushes, go = project.clone.with_name("pushes"), project.clone.with_name("go")
    write_hook(project.clone / ".git" / "hooks", "pre-push", f": >{pushes}\nuntil [ -e {go} ]; do sleep 0.05; done")
    first = start(project, "release", "-v", "1.3.0")
    try:
        until = time.monotonic() + 60
        while not pushes.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        before = project.state()
        for more in ([], ["-f"]):
            second = project.deploy("release", "-v", "1.3.0", *more)
            assert second.returncode == REFUSED
            assert second.stderr == (
                "deploy: refused: another release is under way in this repository: wait until it has ended\n"
            )
            assert project.state() == before
    finally:
        go.touch()
        said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert project.remote_commit("refs/tags/v1.3.0") == project.git("rev-parse", "main", "v1.3.0^{}").split()[0]
    assert project.deploy("release", "-d", "-v", "1.4.0").returncode == 0


def test_what_a_hook_leaves_running_does_not_keep_the_next_release_out(project: Project) -> None:
    file = project.clone.with_name("left-pid")
    write_hook(project.clone / ".git" / "hooks", "pre-push", f"sleep 60 >/dev/null 2>&1 &\necho $! >{file}")
    try:
        assert project.deploy("release", "-v", "1.3.0").returncode == 0
        write_hook(project.clone / ".git" / "hooks", "pre-push", "exit 0")
        done = project.deploy("release", "-v", "1.4.0")
    finally:
        os.kill(int(file.read_text()), signal.SIGKILL)
    assert done.returncode == 0, done.stderr


def test_what_others_made_meanwhile_is_not_taken_back(project: Project) -> None:
    head = with_entries(project)
    write_hook(
        project.clone / ".git" / "hooks",
        "pre-push",
        f"git reset -q --hard {head}; git commit -q --allow-empty -m Theirs; git tag -f -m Theirs v1.3.0; exit 1",
    )
    done = project.deploy("release", "-v", "1.3.0")
    assert done.returncode == FAILED
    assert "as before" not in done.stderr
    theirs = project.git("rev-parse", "main")
    assert project.git("log", "-1", "--format=%P|%s", "v1.3.0") == f"{head}|Theirs"
    assert "the tag v1.3.0 is no longer what it was, and not of this run: it was left" in done.stderr
    assert f"main is at {theirs[:12]}, which is not of this run: it was left" in done.stderr


# --- direct


def test_an_image_is_built_and_pushed_as_its_version_series_and_latest(project: Project) -> None:
    done = project.deploy("direct", env=LOGIN)
    assert done.returncode == 0, done.stderr
    tags = [f"{IMAGE}:1.2.3", f"{IMAGE}:1.2", f"{IMAGE}:latest"]
    (build,) = [call for call in project.calls() if call.words[0] == "build"]
    assert build.values_of("--tag") == tags
    arguments = dict(value.split("=", 1) for value in build.values_of("--build-arg"))
    assert arguments["VERSION"] == "1.2.3"
    assert arguments["REVISION"] == project.git("rev-parse", "HEAD")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", arguments["CREATED"])
    assert build.words[-1] == "."
    assert Path(build.env["PWD"]) == project.clone
    assert pushed(project) == tags
    assert f"Pushed: {' '.join(tags)}" in done.stdout


@pytest.mark.parametrize("version", ["1.3.0rc1", "2.0.0a1", "2.0.0b12"])
def test_a_pre_release_is_pushed_only_as_itself(project: Project, version: str) -> None:
    done = project.deploy("direct", "-v", version, env=LOGIN)
    assert done.returncode == 0, done.stderr
    assert pushed(project) == [f"{IMAGE}:{version}"]
    assert f"the image is tagged {version}, and the program in it will say 1.2.3" in done.stderr


def test_an_older_release_does_not_take_latest_back(project: Project) -> None:
    project.git("tag", "v2.0.0")
    project.git("tag", "v1.2.4")
    project.git("tag", "v1.10.0rc1")
    project.deploy("direct", env=LOGIN)
    assert pushed(project) == [f"{IMAGE}:1.2.3"]
    project.deploy("direct", "-v", "1.2.10", env=LOGIN)
    assert pushed(project)[1:] == [f"{IMAGE}:1.2.10", f"{IMAGE}:1.2"]


@pytest.mark.parametrize("spelled", ["-b", "--build-only"])
def test_build_only_needs_no_credentials_and_pushes_nothing(project: Project, spelled: str) -> None:
    done = project.deploy("direct", spelled, "-v", "v3.2.1")
    assert done.returncode == 0, done.stderr
    (build,) = project.calls()
    assert build.values_of("--tag") == [f"generative-img-serving:{tag}" for tag in ("3.2.1", "3.2", "latest")]
    assert "Built, and not pushed" in done.stdout


def test_the_token_goes_to_the_login_alone_and_stays_nowhere(project: Project) -> None:
    before = project.state()
    done = project.deploy("direct", env=LOGIN)
    assert TOKEN not in done.stdout + done.stderr
    for call in project.calls():
        assert TOKEN not in " ".join(call.words)
        assert TOKEN not in call.env.values()
        assert (call.stdin == TOKEN) == (call.words[0] == "login")
    (login,) = [call for call in project.calls() if call.words[0] == "login"]
    assert login.words == ["login", "--username", "painter", "--password-stdin"]
    session = Path(login.env["DOCKER_CONFIG"])
    assert login.config_files is not None
    assert set(login.config_files) == {"config.json"}
    assert json.loads(login.config_files["config.json"])["auths"]  # docker uses a keyring where no registry is named
    assert [call.words[0] for call in project.calls() if call.env.get("DOCKER_CONFIG") == str(session)] == [
        "login", "push", "push", "push", "logout",
    ]  # fmt: skip
    assert not session.exists()
    assert project.state() == before


@pytest.mark.parametrize("fails", ["login", "build", "push"])
def test_no_credential_is_left_after_a_failure(project: Project, fails: str) -> None:
    before = project.state()
    done = project.deploy("direct", env={**LOGIN, "FAKE_DOCKER_FAILS": fails})
    assert done.returncode == FAILED
    assert TOKEN not in done.stdout + done.stderr
    assert project.state() == before
    said = {
        "login": "the login to Docker Hub as painter failed",
        "build": "the image could not be built; nothing was pushed",
        "push": f"{IMAGE}:1.2.3 could not be pushed; pushed before it: nothing",
    }
    assert said[fails] in done.stderr
    assert [call.words[0] for call in project.calls()][-1] == "logout"
    if fails == "login":
        assert "unauthorized: ***" in done.stderr
        assert "build" not in [call.words[0] for call in project.calls()]


def test_a_push_that_fails_half_way_says_what_is_published(project: Project) -> None:
    done = project.deploy("direct", env={**LOGIN, "FAKE_DOCKER_FAILS": "latest"})
    assert done.returncode == FAILED
    assert f"{IMAGE}:latest could not be pushed; pushed before it: {IMAGE}:1.2.3 {IMAGE}:1.2" in done.stderr


@pytest.mark.parametrize("before", [("bash", "-x"), ("bash", "-xa"), ("bash", "-v")])
def test_a_trace_does_not_show_the_token(project: Project, before: tuple[str, ...]) -> None:
    (project.clone / ".env").write_text(f"DOCKER_HUB_TOKEN={TOKEN}\nDOCKER_HUB_USERNAME=painter\n")
    for environment in ({}, LOGIN, {**LOGIN, "FAKE_DOCKER_FAILS": "login"}):
        done = project.deploy("direct", before=before, env=environment)
        assert done.returncode == (FAILED if "FAKE_DOCKER_FAILS" in environment else 0)
        assert "docker build" in done.stderr or environment.get("FAKE_DOCKER_FAILS")
        assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN not in call.env.values() for call in project.calls())


def test_the_users_own_docker_configuration_is_used_and_kept(project: Project) -> None:
    own = project.home / ".docker"
    (own / "contexts").mkdir(parents=True)
    (own / "config.json").write_text('{"currentContext": "rootless", "credsStore": "keyring"}')
    before = project.state()
    done = project.deploy("direct", env={**LOGIN, "FAKE_DOCKER_CONTEXT": "rootless"})
    assert done.returncode == 0, done.stderr
    calls = {call.words[0]: call for call in project.calls()}
    assert "DOCKER_CONFIG" not in calls["build"].env
    assert calls["push"].env["DOCKER_CONTEXT"] == "rootless"
    assert set(calls["push"].config_files or ()) == {"config.json", "contexts"}
    assert (own / "config.json").read_text() == '{"currentContext": "rootless", "credsStore": "keyring"}'
    assert project.state() == before


def test_a_dirty_tree_is_built_and_never_pushed(project: Project) -> None:
    (project.clone / "draft.txt").write_text("…")
    done = project.deploy("direct", env=LOGIN)
    assert done.returncode == REFUSED
    assert "refused: there are changes that no commit has (draft.txt)" in done.stderr
    assert project.calls() == []
    done = project.deploy("direct", "-b")
    assert done.returncode == 0
    assert "its revision is said to be dirty" in done.stderr
    assert f"REVISION={project.git('rev-parse', 'HEAD')}-dirty" in project.calls()[0].words


def test_without_a_repository_the_revision_is_unknown(project: Project) -> None:
    shutil.rmtree(project.clone / ".git")
    assert project.deploy("direct", env=LOGIN).returncode == 0
    (build,) = [call for call in project.calls() if call.words[0] == "build"]
    assert "REVISION=unknown" in build.words


def test_without_docker_one_line_says_so(project: Project, tmp_path: Path) -> None:
    alone = tmp_path / "without-docker"
    alone.mkdir()
    for name in ("bash", "env", "sed", "git", "dirname", "sort", "tail", "head", "cat"):
        found = shutil.which(name)
        assert found
        (alone / name).symlink_to(found)
    done = project.deploy("direct", env={**LOGIN, "PATH": str(alone)})
    assert done.returncode == LACKING
    assert len(done.stderr.splitlines()) == 1
    assert "docker is not on PATH: install Docker Engine" in done.stderr


def test_missing_credentials_are_a_line_each(project: Project) -> None:
    done = project.deploy("direct")
    assert done.returncode == LACKING
    assert [line.split(" is not set")[0] for line in done.stderr.splitlines()] == [
        "deploy: DOCKER_HUB_USERNAME", "deploy: DOCKER_HUB_TOKEN",
    ]  # fmt: skip
    done = project.deploy("direct", env={"DOCKER_HUB_USERNAME": "painter", "DOCKER_HUB_TOKEN": ""})
    assert done.returncode == LACKING
    assert len(done.stderr.splitlines()) == 1
    assert project.calls() == []


@pytest.mark.parametrize("build_only", [False, True])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Painter", "is no name that images have"),
        ("painter@example.com", "is no name that images have"),
        ("pain ter", "is no name that images have"),
        ("-painter", "is no name that images have"),
        (TOKEN, "looks like an access token"),
        ("dckr_oat_short", "looks like an access token"),
        ("0f3c9a52-6f0e-4c1e-9d53-0a4f7be0c1d2", "looks like an access token"),  # as tokens were before dckr_pat_
    ],
)
def test_a_username_that_no_image_can_be_named_by_is_told_and_not_shown(
    project: Project, name: str, why: str, *, build_only: bool
) -> None:
    """It may be the token, where the two were swapped."""
    more = ["-b"] if build_only else []
    for before in ((), ("bash", "-x")):
        done = project.deploy("direct", *more, env={**LOGIN, "DOCKER_HUB_USERNAME": name}, before=before)
        assert done.returncode == MISUSED
        assert f"deploy: DOCKER_HUB_USERNAME, which is not shown here, {why}" in done.stderr
        assert name not in done.stdout + done.stderr
    (project.clone / ".env").write_text(f"DOCKER_HUB_USERNAME={name}\nDOCKER_HUB_TOKEN=painter\n")
    done = project.deploy("direct", *more)
    assert (done.returncode, name in done.stdout + done.stderr) == (MISUSED, False)
    assert project.calls() == []


# --- .env


@pytest.mark.parametrize(
    ("line", "token"),
    [
        ("DOCKER_HUB_TOKEN=plain", "plain"),
        ("DOCKER_HUB_TOKEN=plain\r", "plain"),
        ("\ufeffDOCKER_HUB_TOKEN=plain", "plain"),
        ("export DOCKER_HUB_TOKEN=plain", "plain"),
        ("  export   DOCKER_HUB_TOKEN = plain  ", "plain"),
        ("DOCKER_HUB_TOKEN=a=b==", "a=b=="),
        ("DOCKER_HUB_TOKEN=two words # a comment", "two words"),
        ("DOCKER_HUB_TOKEN=a#b", "a#b"),
        ("DOCKER_HUB_TOKEN=#b", "#b"),
        ("DOCKER_HUB_TOKEN='a b # c $HOME'", "a b # c $HOME"),
        ("DOCKER_HUB_TOKEN='a' # b", "a"),
        (r'DOCKER_HUB_TOKEN="a b # \"c\" \$d \\ \n"', r'a b # "c" $d \ \n'),
        ('DOCKER_HUB_TOKEN="a"\r', "a"),
        ("DOCKER_HUB_TOKEN=$(touch hacked)`touch hacked`;touch hacked", "$(touch hacked)`touch hacked`;touch hacked"),
        ("DOCKER_HUB_TOKEN=first\nDOCKER_HUB_TOKEN=last", "last"),
        ("#DOCKER_HUB_TOKEN=x\nMY_DOCKER_HUB_TOKEN=y\nDOCKER_HUB_TOKEN_OLD=z\nDOCKER_HUB_TOKEN=right", "right"),
        ("no line = at all (\nDOCKER_HUB_TOKEN=비밀", "비밀"),
    ],
)
def test_the_env_file_is_read_as_a_shell_would_and_never_run(project: Project, line: str, token: str) -> None:
    (project.clone / ".env").write_text(
        f"{line}\nIMG_SERVING_API_KEY=sk-other\nDOCKER_HUB_USERNAME=painter", newline=""
    )
    done = project.deploy("direct")
    assert done.returncode == 0, done.stderr
    (login,) = [call for call in project.calls() if call.words[0] == "login"]
    assert login.stdin == token
    assert not (project.clone / "hacked").exists()
    assert "sk-other" not in done.stdout + done.stderr + str([call.env for call in project.calls()])


@pytest.mark.parametrize("line", ["DOCKER_HUB_TOKEN='open", 'DOCKER_HUB_TOKEN="open', 'DOCKER_HUB_TOKEN="a"b'])
def test_an_unfinished_quotation_is_told_by_its_line_and_not_its_value(project: Project, line: str) -> None:
    (project.clone / ".env").write_text(f"DOCKER_HUB_USERNAME=painter\n{line}\n")
    done = project.deploy("direct")
    assert done.returncode == MISUSED
    assert ".env, line 2: what follows DOCKER_HUB_TOKEN=" in done.stderr
    assert "open" not in done.stderr
    assert project.calls() == []


@pytest.mark.parametrize("line", ["DOCKER_HUB_TOKEN=", "DOCKER_HUB_TOKEN= # none yet", "DOCKER_HUB_TOKEN=''", ""])
def test_an_empty_value_is_none(project: Project, line: str) -> None:
    (project.clone / ".env").write_text(f"DOCKER_HUB_USERNAME=painter\n{line}\n")
    done = project.deploy("direct")
    assert done.returncode == LACKING
    assert "DOCKER_HUB_TOKEN is not set" in done.stderr


def test_the_environment_wins_over_the_env_file(project: Project) -> None:
    (project.clone / ".env").write_text("DOCKER_HUB_USERNAME=other\nDOCKER_HUB_TOKEN=another\n")
    project.deploy("direct", env=LOGIN)
    (login,) = [call for call in project.calls() if call.words[0] == "login"]
    assert (login.words[2], login.stdin) == ("painter", TOKEN)


def test_a_token_that_others_may_read_is_mentioned(project: Project) -> None:
    file = project.clone / ".env"
    file.write_text(f"DOCKER_HUB_USERNAME=painter\nDOCKER_HUB_TOKEN={TOKEN}\n")
    for mode, mentioned in ((0o644, True), (0o600, False)):
        file.chmod(mode)
        assert ("chmod 600 .env" in project.deploy("direct").stderr) == mentioned


def test_the_example_is_safe_as_it_is(project: Project) -> None:
    shutil.copy(ROOT / ".env.example", project.clone / ".env")
    done = project.deploy("direct")
    assert done.returncode == LACKING
    assert len(done.stderr.splitlines()) == 2
    shell = subprocess.run(
        ["sh", "-euc", '. ./.env; printf "%s|%s|%s" "$DOCKER_HUB_USERNAME" "$DOCKER_HUB_TOKEN" "${IMG_SERVING_API_KEY-unset}"'],
        cwd=project.clone, env={"PATH": os.environ["PATH"]}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (shell.stdout, shell.stderr) == ("||unset", "")


def test_the_example_names_what_compose_reads() -> None:
    compose = ROOT / "compose.yaml"
    section = (ROOT / ".env.example").read_text().partition("# `docker compose` (")[2]
    named = re.findall(r"^#([A-Z_]+)=", section, re.MULTILINE)
    assert len(named) > 3
    for name in named:
        assert re.search(rf"\$\{{{name}\b|^\s+{name}:", compose.read_text(), re.MULTILINE), name


# --- the script itself


def test_it_runs_from_any_directory(project: Project, tmp_path: Path) -> None:
    assert project.deploy("release", cwd=tmp_path).returncode == 0
    assert project.deploy("direct", "-b", cwd=Path("/")).returncode == 0
    assert Path(project.calls()[0].env["PWD"]) == project.clone


@pytest.mark.parametrize(
    ("environment", "coloured"), [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False)]
)
def test_colour_is_for_terminals(project: Project, environment: dict[str, str], coloured: bool) -> None:
    assert "\x1b" not in "".join((done := project.deploy("release", "-d", env=environment)).stdout + done.stderr)
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [str(project.clone / "scripts" / "deploy.sh"), "release", "-d"],
            env={**project.environment, **environment}, stdout=theirs, stderr=theirs, check=True, timeout=120,
        )  # fmt: skip
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "A dry run" in shown
    assert ("\x1b[1m" in shown) == coloured


def test_shellcheck_has_no_complaint() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("NO SHELLCHECK: the shell scripts of a release are not checked")
    scripts = [ROOT / "scripts" / name for name in SCRIPTS if name != "release-notes"]
    options = (
        "add-default-case,avoid-nullary-conditions,check-unassigned-uppercase,deprecate-which,quote-safe-variables"
    )
    done = subprocess.run([shellcheck, "-o", options, *scripts], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
