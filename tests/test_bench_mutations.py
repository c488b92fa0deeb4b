"""bench/mutations.py: a mistake that a test notices and one that none does, in a repository of two files."""
import json
import subprocess

import pytest

from bench import common, mutations
from exactgpt.config import UserError
from exactgpt.files import write_json

NOTICED = ("a.py", "x + 1", "x + 2", "test_a.py")
UNNOTICED = ("a.py", '"""Add\none."""', '"""Add two."""', "test_a.py::test_more")
TESTS = """
import pytest

from a import more

@pytest.mark.parametrize("name", ["a b"])
def test_more(name):
    assert more(1) == 2
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('def more(x):\n    """Add\none."""\n    return x + 1\n')
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "untracked.py").write_text("")
    subprocess.run("git init -q . && git add a.py test_a.py", shell=True, check=True, cwd=tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")      # it starts faster
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "WRITE_TO", tmp_path / "results")
    return tmp_path


def try_all(monkeypatch, *table, only=()):
    monkeypatch.setattr(mutations, "MUTATIONS", list(table))
    mutations.main([word for file in only for word in ("--only", file)])


def test_a_survivor_is_status_1_and_what_was_tried_before_is_kept(repository, monkeypatch):
    path, old = repository / "results" / "mutations.json", ("b.py", "1", "2", "test_b.py")
    gone, kept = (dict(file="b.py", change=words, killed=True) for words in ("3 -> 4", "1 -> 2"))
    write_json(path, dict(rows=[gone, kept]))
    with pytest.raises(SystemExit) as caught:
        try_all(monkeypatch, NOTICED, UNNOTICED, old, only=["a.py"])
    assert caught.value.code == 1
    found = json.loads(path.read_text())
    assert found["rows"] == [
        dict(file="a.py", change="x + 1 -> x + 2", tests="test_a.py", killed=True, by="test_a.py::test_more[a b]"),
        dict(file="a.py", change='"""Add one.""" -> """Add two."""', tests=UNNOTICED[-1], killed=False, by=""), kept]
    assert (found["mutations"], found["killed"]) == (3, 2)
    assert "x + 1" in (repository / "a.py").read_text()      # the working tree is as it was


@pytest.mark.parametrize("mutation, only, message", [
    (("a.py", "x -", "y", "test_a.py"), [], "'x - -> y' must occur once in a.py, but occurs 0 times"),
    (("a.py", "x", "y", "test_a.py"), [], "'x -> y' must occur once in a.py, but occurs 2 times"),
    (("b.py", "x", "", "test_a.py"), [], "'x -> nothing' must occur once in b.py, but occurs 0 times"),
    (NOTICED, ["b.py"], "--only: there is no mutation of b.py"),
])
def test_a_mutation_that_cannot_be_tried_is_one_line(repository, monkeypatch, mutation, only, message):
    with pytest.raises(UserError) as caught:
        try_all(monkeypatch, mutation, only=only)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mutation_that_cannot_be_imported_is_not_taken_for_one_that_is_noticed(repository, monkeypatch):
    with pytest.raises(UserError, match=r"pytest could not run test_a\.py: .*invalid syntax"):
        try_all(monkeypatch, ("a.py", "x + 1", "x +", "test_a.py"))


def test_tests_that_fail_without_a_mutation_end_it(repository, monkeypatch):
    (repository / "test_a.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(UserError, match=r"test_a\.py::test_wrong fails without any mutation"):
        try_all(monkeypatch, NOTICED)
