import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_tests_ran.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_tests_ran", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tests(tmp_path):
    for name in ("control", "nodes"):
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "test_it.py").touch()
    return tmp_path / "test"


def write(tests: Path, *cases: tuple[str, int, str]) -> Path:
    rows = [f'<testcase classname="{name}" name="t">{inside}</testcase>' for name, n, inside in cases for _ in range(n)]
    report = tests.parent / "tests.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(rows)}</testsuite></testsuites>")
    return report


def test_a_whole_run_is_good(tool, tests):
    report = write(tests, ("test.control.test_it", tool.LEAST, ""), ("test.nodes.test_it", 1, ""))
    assert tool.problems(report, tests) == []


def test_a_run_that_tested_nothing_or_left_no_report_is_not(tool, tests):
    assert any("at least" in problem for problem in tool.problems(write(tests), tests))
    assert any("cannot be read" in problem for problem in tool.problems(tests / "absent.xml", tests))


def test_a_directory_that_was_skipped_or_not_collected_is_named(tool, tests):
    skipped = ("test.nodes.test_it", tool.MOST_SKIPPED + 1, "<skipped/>")
    found = tool.problems(write(tests, ("test.control.test_it", tool.LEAST, ""), skipped), tests)
    assert "no test passed in test/nodes" in found
    assert any("skipped" in problem for problem in found[1:])


def test_failures_are_counted(tool, tests):
    report = write(tests, ("test.control.test_it", tool.LEAST, ""), ("test.nodes.test_it", 1, ""),
                   ("test.nodes.test_it", 2, "<failure/>"), ("test.nodes.test_it", 1, "<error/>"))
    assert tool.problems(report, tests) == ["3 tests failed"]


def test_where_any_test_will_do_one_has_to_pass(tool, tests):
    skipped = ("test.nodes.test_it", tool.MOST_SKIPPED + 1, "<skipped/>")
    assert tool.problems(write(tests, skipped), tests, any_will_do=True) == ["no test passed"]
    assert not tool.problems(write(tests, skipped, ("test.nodes.test_it", 1, "")), tests, any_will_do=True)
