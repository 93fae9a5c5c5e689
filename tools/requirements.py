"""Prints the requirements of setup.py, with those of every extra, one a line; of providers and cluster only with --all."""

import sys

from setuptools.dist import Distribution  # noqa: F401  (before distutils: setuptools brings its own)
from distutils.core import run_setup

distribution = run_setup("setup.py", stop_after="init")
names = list(distribution.install_requires)
for key, extra in distribution.extras_require.items():
    if (key.startswith("provider-") or key == "cluster") and "--all" not in sys.argv:
        continue
    names += [name for name in extra if name not in names]
print("\n".join(names))
