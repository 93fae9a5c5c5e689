"""Fails unless a JUnit file shows tests that passed in every directory of test/, and hardly any that were skipped.

A test run can end with code 0 because it collected nothing, or because an import guard skipped a whole directory.

    python tools/check_tests_ran.py out/ci/tests.xml
    python tools/check_tests_ran.py --any out/ci/peers-nncf.xml     one test that passed will do
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

LEAST = 2_000
"""Tests that have to pass; raised now and then, as the suite grows."""
MOST_SKIPPED = 10


def problems(report: Path, tests: Path, *, any_will_do: bool = False) -> list[str]:
    """What is wrong with a run, one sentence each."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return [f"{report} cannot be read ({error})"]
    passed: Counter[str] = Counter()
    failed = skipped = 0
    for case in cases:
        outcome = {child.tag for child in case} & {"failure", "error", "skipped"}
        failed += bool(outcome & {"failure", "error"})
        skipped += outcome == {"skipped"}
        if not outcome:
            passed[".".join(case.get("classname", "").split(".")[:2])] += 1
    if any_will_do:
        return [] if passed else ["no test passed"]
    wanted = {f"test.{path.parent.relative_to(tests)}" for path in tests.glob("*/test_*.py")}
    found = [f"no test passed in {name.replace('.', '/')}" for name in sorted(wanted) if not passed[name]]
    if failed:
        found.append(f"{failed} tests failed")
    if sum(passed.values()) < LEAST:
        found.append(f"{sum(passed.values())} tests passed, at least {LEAST} have to")
    if skipped > MOST_SKIPPED:
        found.append(f"{skipped} tests were skipped, at most {MOST_SKIPPED} may be")
    return found


def main() -> int:
    report = Path(sys.argv[-1])
    found = problems(report, Path(__file__).resolve().parents[1] / "test", any_will_do="--any" in sys.argv)
    for problem in found:
        print(f"tests: {problem}", file=sys.stderr)
    if not found:
        print("tests: they ran")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
