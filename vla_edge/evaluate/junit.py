"""Verdicts as JUnit XML, the form in which build servers take test results: one case for every limit."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from vla_edge.evaluate.page import write_text
from vla_edge.evaluate.suite import Outcome


def write_junit(outcomes: Sequence[Outcome], path: str | Path) -> Path:
    """Writes one test suite for each engine on each bag; a pair that could not be evaluated is an error in it."""
    root = ElementTree.Element("testsuites", name="vla-edge evaluate")
    for outcome in outcomes:
        checks = outcome.verdict.checks if outcome.verdict else ()
        name = f"{outcome.engine} on {outcome.bag}"
        failed = sum(not check.passed for check in checks)
        suite = ElementTree.SubElement(
            root, "testsuite", name=name, tests=str(len(checks) or 1), failures=str(failed),
            errors=str(int(outcome.verdict is None)),
        )  # fmt: skip
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=name, name=check.name)
            if not check.passed:
                told = f"{check.value:g} is not {check.relation} {check.limit:g} {check.unit}".rstrip()
                ElementTree.SubElement(case, "failure", message=told, type="limit").text = check.sentence
        if outcome.verdict is None:
            case = ElementTree.SubElement(suite, "testcase", classname=name, name="evaluation")
            ElementTree.SubElement(case, "error", message=outcome.error, type="error")
    ElementTree.indent(root)
    return write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")
