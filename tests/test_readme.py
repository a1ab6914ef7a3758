"""The README's links to lines hold what they name, and its worked examples apply and run. `python tests/test_readme.py` renews the links."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[`([^`\]]+)`\]\((\w+\.py)#L(\w+)\)")
README = (ROOT / "README.md").read_text()


def line_of(name, file):
    """The line that a link should point to: a definition of the name if there is one, else its first mention outside a docstring."""
    lines = (ROOT / file).read_text().splitlines()
    if name == file:
        return 1
    wanted = [n for n, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {re.escape(name)}\b", line)]
    wanted += [n for n, line in enumerate(lines, 1) if name in line]
    assert wanted, f"{file} has no {name}"
    return wanted[0]


@pytest.mark.parametrize("name, file, number", LINK.findall(README))
def test_link_points_to_the_line_that_it_names(name, file, number):
    assert int(number) == line_of(name, file), "renew the links: python tests/test_readme.py"


def test_there_are_links_to_both_scripts_and_the_helpers():
    assert {file for _, file, _ in LINK.findall(README)} == {"grpo.py", "ppo.py", "common.py"}


def logged_names():
    """The scalars and texts that the sources log; <...> stands for what they fill in."""
    sources = "".join((ROOT / file).read_text() for file in ("grpo.py", "ppo.py", "common.py"))
    names = re.findall(r'"((?:reward|objective|losses|charts|completions|eval|perf)/[^" ]+)"', sources)
    return sorted({re.sub(r"{.*}", "<>", name) for name in names})


@pytest.mark.parametrize("name", logged_names())
def test_everything_logged_is_explained(name):
    table = README.split("## What is logged")[1].split("\n## ")[0]
    explained = re.findall(r"`([\w/@<>*]+)`", "\n".join(row.split("|")[1] for row in re.findall(r"^\|.*", table, re.MULTILINE)))
    same = {"perf/<>_seconds": "perf/*_seconds", "eval/pass@<>": "eval/pass@k"}.get(name, name)
    assert same in [re.sub(r"<.*>", "<>", name) for name in explained]


EXAMPLE = re.compile(r"```diff\n(--- (\w+\.py)\n.*?)```", re.DOTALL)


def with_line_numbers(diff, file):
    """The diff with the header of its one hunk as `file` is now; its old lines stand there exactly once."""
    names, lines = diff.splitlines()[:2], diff.splitlines()[3:]
    old, new = ([line[1:] for line in lines if line[:1] != other] for other in "+-")
    source = "\n" + (ROOT / file).read_text()
    text = "\n" + "\n".join(old) + "\n"
    assert source.count(text) == 1, "\n".join(old)
    first = source[: source.index(text)].count("\n") + 1
    return "\n".join([*names, f"@@ -{first},{len(old)} +{first},{len(new)} @@", *lines]) + "\n"


def test_there_are_four_examples_of_ten_lines_or_fewer():
    examples = EXAMPLE.findall(README)
    assert len(examples) == 4 and all(len(diff.splitlines()) <= 10 for diff, _ in examples)


@pytest.mark.parametrize("diff, script", EXAMPLE.findall(README))
def test_worked_example_applies_and_runs(diff, script, tmp_path):
    assert diff == with_line_numbers(diff, script), "renew the line numbers: python tests/test_readme.py"
    for file in ("grpo.py", "ppo.py", "common.py"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    applied = subprocess.run(["git", "apply", "-p0"], cwd=tmp_path, input=diff, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    assert (tmp_path / script).read_text() != (ROOT / script).read_text()
    command = [sys.executable, script, "--steps", "2", "--eval-every", "0", "--eval-prompts", "20", "--output-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done steps=2 ")


def test_step_with_numbers():
    """The Python session of the README gives what stands there."""
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 9 and result.failed == 0


if __name__ == "__main__":
    renewed = EXAMPLE.sub(lambda m: f"```diff\n{with_line_numbers(m[1], m[2])}```", README)
    renewed = LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], m[2])})", renewed)
    (ROOT / "README.md").write_text(renewed)
