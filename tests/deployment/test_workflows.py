"""The workflows: what they publish when, which secrets they see, and what three validators say of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.support.releases import CHANGELOG, ROOT, Project

FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github" / name).read_text()
    document: dict[Any, Any] = yaml.safe_load(text)
    return {"on" if key is True else key: value for key, value in document.items()}  # YAML 1.1 reads `on` as true


@pytest.fixture
def ci() -> dict[str, Any]:
    return read("workflows/ci.yml")


@pytest.fixture
def publish() -> dict[str, Any]:
    return read("workflows/docker-publish.yml")


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", ())]


def validator(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"NO {name.upper()}: the workflows were not checked by it")
    return found


# --- validators


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_workflow_is_of_githubs_form(file: Path) -> None:
    command = [validator("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dependabots_file_is_of_its_form() -> None:
    command = [
        validator("check-jsonschema"),
        "--builtin-schema",
        "vendor.dependabot",
        str(ROOT / ".github" / "dependabot.yml"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_finds_nothing() -> None:
    command = [validator("zizmor"), "--offline", "--no-progress", "--no-config", str(ROOT / ".github")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No findings" in done.stdout + done.stderr


def test_shellcheck_has_no_complaint_about_what_is_run(ci: dict[str, Any], publish: dict[str, Any]) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("NO SHELLCHECK: what the workflows run is not checked")
    texts = ["#!/bin/bash\n" + step["run"] for step in [*steps_of(ci), *steps_of(publish)] if "run" in step]
    texts.append((ROOT / ".github" / "publish-plan").read_text())
    for text in texts:
        done = subprocess.run([shellcheck, "-"], input=text, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# --- safety


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_action_is_pinned_by_commit_and_says_its_version(file: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", file.read_text())
    assert used
    versions: dict[str, set[str]] = {}
    for action, comment in used:
        if action == "./.github/workflows/ci.yml":
            continue
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)
        versions.setdefault(action.partition("@")[0], set()).add(action + comment)
    assert all(len(each) == 1 for each in versions.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_from_outside_becomes_part_of_a_script(file: Path) -> None:
    for step in steps_of(read(f"workflows/{file.name}")):
        assert not EXPRESSION.search(step.get("run", ""))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_job_may_do_no_more_than_it_needs(file: Path) -> None:
    workflow = read(f"workflows/{file.name}")
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        expected = {"contents": "write"} if name == "release" else {"contents": "read"}
        assert job["permissions"] == expected
        assert "uses" in job or 0 < job["timeout-minutes"] <= 60
    for step in steps_of(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_the_secrets_are_two_and_only_what_pushes_sees_them(publish: dict[str, Any]) -> None:
    assert "secrets" not in (FOLDER / "ci.yml").read_text()
    text = (FOLDER / "docker-publish.yml").read_text()
    assert set(re.findall(r"secrets\.(\w+)", text)) == {"DOCKER_USERNAME", "DOCKER_ACCESS_TOKEN"}
    assert "pull_request_target" not in text
    when_pushing = "needs.plan.outputs.push == 'true'"
    seeing = [step for step in steps_of(publish) if "secrets." in str(step)]
    assert len(seeing) == 2
    for step in seeing:
        if step.get("if") != when_pushing:
            used = [found for found in EXPRESSION.findall(str(step["env"]).replace('"', "'")) if "secrets." in found]
            assert used
            assert all(found.strip().startswith(f"{when_pushing} && ") for found in used)
    (login,) = [step for step in steps_of(publish) if step.get("uses", "").startswith("docker/login-action@")]
    assert login["with"] == {
        "username": "${{ secrets.DOCKER_USERNAME }}",
        "password": "${{ secrets.DOCKER_ACCESS_TOKEN }}",
    }
    assert "secrets" not in str(publish["jobs"]["tests"])  # nor are they inherited


def test_nothing_that_another_run_left_is_published() -> None:
    text = (FOLDER / "docker-publish.yml").read_text()
    assert "cache-from" not in text
    assert "cache: pip" not in text
    assert "cache-image: false" in text
    assert "cache-binary: false" in text


# --- what runs when


def test_ci_runs_for_main_and_every_pull_request_and_before_a_release(
    ci: dict[str, Any], publish: dict[str, Any]
) -> None:
    assert ci["on"] == {
        "push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None, "workflow_call": None,
    }  # fmt: skip
    assert publish["jobs"]["tests"]["uses"] == "./.github/workflows/ci.yml"
    assert publish["jobs"]["tests"]["if"] == "needs.plan.outputs.release == 'true'"
    assert "tests" in publish["jobs"]["image"]["needs"]
    assert ci["concurrency"]["group"] == "ci-${{ github.ref }}"  # not its caller's
    for workflow in (ci, publish):
        assert workflow["concurrency"]["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"


def test_the_suite_runs_on_every_python_that_is_promised(ci: dict[str, Any]) -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    promised = [each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)]
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == promised
    assert "make test PYTHON=python" in [step.get("run") for step in ci["jobs"]["test"]["steps"]]


def test_every_make_target_that_ci_names_is_there(ci: dict[str, Any], publish: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        name
        for step in [*steps_of(ci), *steps_of(publish)]
        for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
    }
    assert {"install", "lint", "test", "test-clients"} <= named
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named)


def test_ci_builds_every_target_of_the_image_and_pushes_none(ci: dict[str, Any]) -> None:
    (build,) = [step for step in steps_of(ci) if step.get("uses", "").startswith("docker/build-push-action@")]
    assert build["with"]["push"] is False
    assert ci["jobs"]["image"]["strategy"]["matrix"]["target"] == ["gateway", "worker"]


def test_publishing_starts_at_main_at_tags_for_pull_requests_and_by_hand(publish: dict[str, Any]) -> None:
    assert publish["on"]["push"] == {"branches": ["main"], "tags": ["v*"]}
    assert publish["on"]["pull_request"] is None
    assert publish["on"]["workflow_dispatch"]["inputs"]["push"] == {
        "description": "Push the image to Docker Hub", "type": "boolean", "default": False,
    }  # fmt: skip
    assert set(publish["on"]) == {"push", "pull_request", "workflow_dispatch"}


def test_the_image_is_for_two_architectures_and_says_what_it_is_made_of(publish: dict[str, Any]) -> None:
    (build,) = [step for step in steps_of(publish) if step.get("uses", "").startswith("docker/build-push-action@")]
    options = build["with"]
    assert options["platforms"] == "linux/amd64,linux/arm64"
    assert (options["sbom"], options["provenance"], options["target"]) == (True, "mode=max", "gateway")
    assert options["push"] == "${{ needs.plan.outputs.push == 'true' }}"
    assert options["tags"] == "${{ steps.name.outputs.names }}"
    arguments = dict(line.split("=", 1) for line in options["build-args"].splitlines())
    assert arguments["VERSION"] == "${{ needs.plan.outputs.version }}"
    assert arguments["REVISION"] == "${{ needs.plan.outputs.revision }}"
    assert {"CREATED", "SOURCE"} <= set(arguments)


# --- the plan, really run


def plan(project: Project, event: str, ref: str, **inputs: str) -> tuple[dict[str, str], str]:
    """What .github/publish-plan decides for the commit that is checked out; nothing, and its error, where it refuses."""
    output = project.temporary / "output"
    output.write_text("")
    done = subprocess.run(
        [project.clone / ".github" / "publish-plan"], cwd="/", check=False, capture_output=True, text=True,
        env={
            **project.environment, "GITHUB_EVENT_NAME": event, "GITHUB_REF": ref, "GITHUB_OUTPUT": str(output), **inputs,
        },
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    if done.returncode == 1:
        assert output.read_text() == ""
        assert done.stdout.startswith("::error title=Nothing is published::")
        return {}, done.stdout
    return dict(line.split("=", 1) for line in output.read_text().splitlines()), ""


@pytest.mark.parametrize(
    ("event", "ref", "inputs", "expected"),
    [
        ("push", "refs/heads/main", {}, ("edge", "true", "false")),
        ("push", "refs/tags/v1.2.3", {}, ("1.2.3 1.2 latest", "true", "true")),
        ("pull_request", "refs/pull/7/merge", {}, ("try", "false", "false")),
        ("workflow_dispatch", "refs/heads/main", {"INPUT_PUSH": "false"}, ("edge", "false", "false")),
        ("workflow_dispatch", "refs/heads/main", {"INPUT_PUSH": "true"}, ("edge", "true", "false")),
        ("workflow_dispatch", "refs/heads/sketch", {"INPUT_PUSH": "false"}, ("try", "false", "false")),
        ("workflow_dispatch", "refs/tags/v1.2.3", {"INPUT_PUSH": "true"}, ("1.2.3 1.2 latest", "true", "false")),
        (
            "workflow_dispatch",
            "refs/heads/main",
            {"INPUT_PUSH": "true", "INPUT_TAG": "v1.2.3"},
            ("1.2.3 1.2 latest", "true", "false"),
        ),
    ],
)
def test_each_event_publishes_its_tags(
    project: Project, event: str, ref: str, inputs: dict[str, str], expected: tuple[str, str, str]
) -> None:
    tags, push, release = expected
    project.git("tag", "v1.2.3")
    decided, _ = plan(project, event, ref, **inputs)
    assert decided == {
        "version": "1.2.3", "tags": tags, "push": push, "release": release, "prerelease": "false",
        "latest": "true" if "latest" in tags else "false", "revision": project.git("rev-parse", "HEAD"),
    }  # fmt: skip


def test_a_pre_release_is_no_latest(project: Project) -> None:
    project.write_version("1.3.0rc1")
    project.write_notes(CHANGELOG.format(version="1.3.0rc1"))
    project.commit("A candidate")
    project.git("tag", "v1.3.0rc1")
    decided, _ = plan(project, "push", "refs/tags/v1.3.0rc1")
    assert (decided["tags"], decided["prerelease"], decided["latest"]) == ("1.3.0rc1", "true", "false")


def test_a_repair_of_an_older_release_is_no_latest(project: Project) -> None:
    project.git("tag", "v1.2.3")
    project.git("tag", "v1.3.0")
    decided, _ = plan(project, "push", "refs/tags/v1.2.3")
    assert (decided["tags"], decided["prerelease"], decided["latest"]) == ("1.2.3 1.2", "false", "false")


@pytest.mark.parametrize("tag", ["v1.2.4", "v1.2", "vanilla", "v1.2.3-1"])
def test_a_tag_that_is_not_the_projects_version_is_refused(project: Project, tag: str) -> None:
    project.git("tag", tag)
    _, error = plan(project, "push", f"refs/tags/{tag}")
    assert f"the tag is {tag}, and the project's version 1.2.3" in error


def test_a_tag_without_notes_is_refused(project: Project) -> None:
    project.write_notes("# Changelog\n\n## [Unreleased]\n")
    project.commit("No notes")
    project.git("tag", "v1.2.3")
    _, error = plan(project, "push", "refs/tags/v1.2.3")
    assert "CHANGELOG.md has no notes of 1.2.3" in error


def test_a_tag_of_another_commit_is_refused(project: Project) -> None:
    for tags in ([], [("tag", "v1.2.3")]):
        for words in tags:
            project.git(*words)
        project.commit("Another")
        _, error = plan(project, "workflow_dispatch", "refs/heads/main", INPUT_TAG="v1.2.3", INPUT_PUSH="true")
        assert "v1.2.3 is no tag of the commit that is checked out" in error


@pytest.mark.parametrize("event", ["workflow_dispatch", "push"])
def test_only_main_is_edge(project: Project, event: str) -> None:
    _, error = plan(project, event, "refs/heads/sketch", INPUT_PUSH="true")
    assert "refs/heads/sketch is neither main nor a tag" in error
    _, error = plan(project, "schedule", "refs/heads/main")
    assert "the event schedule is none that publishes" in error


def run_step(step: dict[str, Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step's script as GitHub does."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"PUSH": "true", "TAGS": "1.2.3 1.2 latest", "DOCKER_USERNAME": "painter", "HAS_TOKEN": "true"}, "painter"),
        ({"PUSH": "false", "TAGS": "1.2.3 1.2 latest", "DOCKER_USERNAME": "", "HAS_TOKEN": "false"}, "nobody"),
        ({"PUSH": "true", "TAGS": "edge", "DOCKER_USERNAME": "", "HAS_TOKEN": "true"}, None),
        ({"PUSH": "true", "TAGS": "edge", "DOCKER_USERNAME": "painter", "HAS_TOKEN": "false"}, None),
    ],
)
def test_the_image_is_named_by_the_account_which_must_be_there_to_push(
    project: Project, publish: dict[str, Any], environment: dict[str, str], names: str | None
) -> None:
    (step,) = [step for step in steps_of(publish) if step.get("id") == "name"]
    output = project.temporary / "output"
    done = run_step(step, project.clone, **project.environment, GITHUB_OUTPUT=str(output), **environment)
    if names is None:
        assert done.returncode == 1
        assert "needs the secrets DOCKER_USERNAME and DOCKER_ACCESS_TOKEN" in done.stdout
        return
    assert done.returncode == 0, done.stderr
    lines = output.read_text().splitlines()
    assert re.fullmatch(r"created=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[0])
    named = [f"{names}/generative-img-serving:{tag}" for tag in ("1.2.3", "1.2", "latest")]
    assert lines[1:] == ["names<<END", *named, "END"]


@pytest.mark.parametrize("there", [False, True])
def test_the_release_has_the_notes_and_both_packages(project: Project, publish: dict[str, Any], there: bool) -> None:
    step = publish["jobs"]["release"]["steps"][-1]
    gh = project.programs / "gh"
    gh.write_text(
        f'#!/bin/bash\necho "$*" >>"{project.temporary}/calls"\n[[ $2 != view ]] || exit {0 if there else 1}\n'
    )
    gh.chmod(0o755)
    (project.clone / "dist").mkdir()
    for name in ("img_serving-1.2.3.tar.gz", "img_serving-1.2.3-py3-none-any.whl"):
        (project.clone / "dist" / name).touch()
    done = run_step(step, project.clone, **project.environment, VERSION="1.2.3", PRERELEASE="false", LATEST="true")
    assert done.returncode == 0, done.stderr
    assert (project.clone / "notes.md").read_text().startswith("### Added\n\n- Pictures of lakes.")
    calls = (project.temporary / "calls").read_text().splitlines()
    packages = "dist/img_serving-1.2.3-py3-none-any.whl dist/img_serving-1.2.3.tar.gz"
    options = "--title img-serving 1.2.3 --notes-file notes.md --prerelease=false --latest=true --verify-tag"
    assert calls[1:] == (
        [f"release edit v1.2.3 {options}", f"release upload v1.2.3 {packages} --clobber"]
        if there
        else [f"release create v1.2.3 {packages} {options}"]
    )
