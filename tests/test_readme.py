"""The README's commands are the ones that CI runs, and what it names exists."""

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_ci_takes_its_two_commands_from_the_readme() -> None:
    commands = re.findall(r"^    (pip install .*&& .*)$", README, flags=re.MULTILINE)
    assert commands == [
        "pip install -e . && accelerate launch recipes/quickstart.py",
        "pip install -e '.[test]' && pytest",
    ]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci
    assert not any(command in ci for command in commands)


def test_every_file_in_the_tree_exists() -> None:
    tree = re.search(r"## The tree\n+```\n(.*?)```", README, flags=re.DOTALL).group(1)
    parents = [ROOT]
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        path = parents[depth] / line.split()[0]
        parents[depth + 1 :] = [path]
        assert path.exists(), path.relative_to(ROOT)


def test_every_launch_line_names_files_that_exist() -> None:
    for script, config in re.findall(
        r"accelerate launch (recipes/\S+\.py)(?: --config (\S+\.yaml))?", README
    ):
        assert (ROOT / script).is_file(), script
        assert not config or (ROOT / config).is_file(), config
