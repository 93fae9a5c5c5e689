"""`ros2 launch`: the arguments, output and exit codes of the verb of the same name in a ROS 2 distribution."""

from __future__ import annotations

import os

from ros2cli.command import CommandExtension


class LaunchCommand(CommandExtension):
    """Run a launch file."""

    def add_arguments(self, parser, cli_name):
        """The options of ros2launch that need no other package of it."""
        parser.add_argument(
            "-n", "--noninteractive", action="store_true", help="Run the launch system without a terminal."
        )
        parser.add_argument("-d", "--debug", action="store_true", help="Put the launch system in debug mode.")
        instead = parser.add_mutually_exclusive_group()
        instead.add_argument(
            "-p", "--print", "--print-description", action="store_true",
            help="Print the launch description to the console without launching it.",
        )
        instead.add_argument(
            "-s", "--show-args", "--show-arguments", action="store_true",
            help="Show arguments that may be given to the launch file.",
        )
        parser.add_argument(
            "-a", "--show-all-subprocesses-output", action="store_true",
            help="Show all launched subprocesses' output, whatever the launch file says.",
        )
        parser.add_argument("package_name", help="Name of the ROS package which contains the launch file, or a path")
        parser.add_argument("launch_file_name", nargs="?", help="Name of the launch file")
        parser.add_argument(
            "launch_arguments", nargs="*",
            help="Arguments to the launch file; '<name>:=<value>' (for duplicates, last one wins)",
        )

    def main(self, *, parser, args):
        """Exit code of the launch: 0, or 1 when it failed to begin or a handler of it raised."""
        # Imported here: `ros2 --help` imports every command.
        from vla_edge_ros2launch.files import find

        path, arguments = find(args.package_name, args.launch_file_name)
        arguments += args.launch_arguments
        if args.show_all_subprocesses_output:
            os.environ["OVERRIDE_LAUNCH_PROCESS_OUTPUT"] = "both"
        from vla_edge_ros2launch.run import print_arguments, print_description, run

        if args.print:
            return print_description(path)
        if args.show_args:
            return print_arguments(path)
        return run(path, arguments, debug=args.debug, noninteractive=args.noninteractive)
