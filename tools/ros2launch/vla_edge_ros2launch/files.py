"""Which launch file the command line means."""

from __future__ import annotations

import os

from ament_index_python.packages import PackageNotFoundError, get_package_prefix, get_package_share_directory


def find(package_or_path: str, name: str | None) -> tuple[str, list[str]]:
    """Path of the launch file, and the launch arguments that were parsed as a file name.

    `ros2 launch <package> <file>` looks anywhere under the package's share directory. `ros2 launch <path>` takes a file,
    and then what stands second is already an argument.

    Raises:
        RuntimeError: no such package, no such file, or several of that name.
    """
    if name is None or (os.path.isfile(package_or_path) and not _is_package(package_or_path)):
        if not os.path.isfile(package_or_path):
            raise RuntimeError("No launch file supplied")
        return package_or_path, [] if name is None else [name]
    try:
        share = get_package_share_directory(package_or_path)
    except PackageNotFoundError as error:
        raise RuntimeError(f"Package '{package_or_path}' not found: {error}") from None
    found = [os.path.join(root, name) for root, _, files in os.walk(share) if name in files]
    where = f"in the share directory of package '{package_or_path}'"
    if not found:
        raise RuntimeError(f"file '{name}' was not found {where} which is at '{share}'")
    if len(found) > 1:
        raise RuntimeError(f"file '{name}' was found more than once {where}: {found}")
    return found[0], []


def _is_package(name: str) -> bool:
    try:
        get_package_prefix(name)
    except (PackageNotFoundError, ValueError):
        return False
    return True
