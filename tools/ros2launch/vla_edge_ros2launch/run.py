"""What can be done with a launch file: run it, print it, list its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import launch
from launch.launch_description_sources import AnyLaunchDescriptionSource, get_launch_description_from_any_launch_file


def run(path: str, arguments: Sequence[str], debug: bool = False, noninteractive: bool = False) -> int:
    """Runs a launch file to its end and returns the exit code.

    Raises:
        RuntimeError: an argument is not of the form <name>:=<value>.
    """
    service = launch.LaunchService(argv=list(arguments), noninteractive=noninteractive, debug=debug)
    # Included rather than loaded, so that substitutions know the file they stand in.
    source = AnyLaunchDescriptionSource(path)
    include = launch.actions.IncludeLaunchDescription(source, launch_arguments=parse(arguments).items())
    service.include_launch_description(launch.LaunchDescription([include]))
    return service.run()


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Launch arguments by name; the last one of a name wins.

    Raises:
        RuntimeError: one of them is malformed.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.partition(":=")
        if not name or not separator or not value:
            raise RuntimeError(f"malformed launch argument '{argument}', expected format '<name>:=<value>'")
        values[name] = value
    return values


def print_description(path: str) -> None:
    """The tree of actions, without running it."""
    description = get_launch_description_from_any_launch_file(path)
    print(launch.LaunchIntrospector().format_launch_description(description))


def print_arguments(path: str) -> None:
    """Name, description and default of every argument the launch file declares."""
    declared = get_launch_description_from_any_launch_file(path).get_launch_arguments()
    print("Arguments (pass arguments as '<name>:=<value>'):")
    conditional = False
    for argument in declared:
        starred = "*" if argument._conditionally_included else ""
        conditional = conditional or bool(starred)
        print(f"\n    '{argument.name}':{starred}\n        {argument.description}")
        if argument.default_value is not None:
            print(f"        (default: {' + '.join(token.describe() for token in argument.default_value)})")
    if not declared:
        print("\n  No arguments.")
    elif conditional:
        print("\n* argument(s) which are only used if specific conditions occur")
