"""Release: versions that agree, an sdist with what tests read, and workflows."""

import re
from pathlib import Path

import pytest
import yaml

import recis_lightning

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
RELEASE = yaml.safe_load(
    (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
)
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
LOWEST = dict(
    line.split("==")
    for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert recis_lightning.__version__ == version == CITATION["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[\d.]*)\] - (\S+)$", changes, re.MULTILINE)
    assert newest is not None
    assert newest.groups() == (version, str(CITATION["date-released"]))


def test_every_python_that_is_named_is_tested():
    pattern = r"Python :: (3\.\d+)$"
    named = {m[1] for m in (re.search(pattern, one) for one in PROJECT["classifiers"]) if m}
    assert named == {"3.10", "3.11", "3.12", "3.13", "3.14"}
    assert set(CI["jobs"]["tests"]["strategy"]["matrix"]["python"]) == named
    assert PROJECT["requires-python"] == ">=3.10"


def test_the_lowest_versions_are_the_lower_bounds():
    pattern = r"([\w-]+)[^>]*>=([\d.]+)$"
    bounds = [m.groups() for m in (re.match(pattern, one) for one in PROJECT["dependencies"]) if m]
    assert {name for name, _ in bounds} >= {"lightning", "numba", "torch"}
    for name, bound in bounds:
        assert LOWEST[name].startswith(f"{bound}."), name


def test_all_is_every_extra_of_the_package():
    extras = PROJECT["optional-dependencies"]
    named = set(re.search(r"\[(.*)\]", extras["all"][0])[1].split(","))
    assert named == set(extras) - {"all", "dev", "docs", "examples"}


def test_the_sdist_has_what_tests_read():
    included = SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    folders = {one.strip("/").split("/")[0] for one in included}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    read = {name for name in re.findall(r'ROOT / "([\w.-]+)', tests) if (ROOT / name).exists()}
    assert {"examples", "CITATION.cff", ".github"} <= read
    assert read - folders == {"README.md", "pyproject.toml"}  # of any sdist, as LICENSE is
    for one in included:
        assert list(ROOT.glob(one.strip("/"))), one


def test_a_release_checks_what_it_publishes():
    steps = [step.get("run", "") for step in RELEASE["jobs"]["build"]["steps"]]
    assert any("twine check" in step for step in steps)
    assert any("GITHUB_REF_NAME" in step for step in steps)
    assert RELEASE["jobs"]["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_every_file_of_the_repository_host_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
