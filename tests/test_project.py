"""The project's own promises: its lists agree, and its parts are where the README says."""

import re
import tomllib
from pathlib import Path

import yaml


def test_conda_environment_and_package_list_the_same_dependencies(project):
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((project / "environment.yaml").read_text())["dependencies"]
    assert conda[-1]["pip"] == metadata["dependencies"] + metadata["optional-dependencies"]["lite0"]
    assert f"python{metadata['requires-python']}" in conda


def test_constraints_pin_every_dependency(project):
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower()
              for line in (project / "constraints.txt").read_text().splitlines()}
    wanted = metadata["dependencies"] + [d for extra in metadata["optional-dependencies"].values()
                                         for d in extra]
    assert {re.match(r"[\w-]+", dependency)[0].lower() for dependency in wanted} <= pinned


def test_every_file_that_the_readme_names_exists(project):
    readme = (project / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", readme)
    for path in linked + re.findall(r"python ((?:code|GSE)/\w+\.py)", readme):
        assert (project / path).exists(), path


def test_code_is_a_folder_of_scripts_not_a_package(project):
    # it would shadow the standard library's `code`
    assert not Path(project, "code", "__init__.py").exists()
