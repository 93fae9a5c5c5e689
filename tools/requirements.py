"""Prints the requirements of setup.py, with those of every extra, one a line; of providers, of runtimes, of a cluster
and of Meta-World only with --all, and OpenVINO where it has wheels."""

import platform
import sys

from setuptools.dist import Distribution  # noqa: F401  (before distutils: setuptools brings its own)
from distutils.core import run_setup

distribution = run_setup("setup.py", stop_after="init")
names = list(distribution.install_requires)
for key, extra in distribution.extras_require.items():
    here = key == "runtime-openvino" and platform.machine() == "x86_64"
    if key.startswith(("provider-", "runtime-", "cluster", "metaworld")) and not here and "--all" not in sys.argv:
        continue
    names += [name for name in extra if name not in names]
print("\n".join(names))
