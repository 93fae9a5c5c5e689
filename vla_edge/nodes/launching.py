"""What the launch files share: arguments made from a node's own parameter table, managed nodes, codes that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler, Shutdown
from launch.event_handlers import OnProcessExit, OnProcessStart
from launch.events import matches_action
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

from vla_edge.nodes.params import Parameter
from vla_edge.resources import share_directory

PACKAGE = "vla_edge"


def parameter_file(name: str) -> str:
    """A file of node parameters that comes with the package."""
    return str(share_directory() / "config" / name)


def arguments(rows: Iterable[Parameter], defaults: Mapping[str, str] | None = None) -> list[DeclareLaunchArgument]:
    """One launch argument for each row of a node's parameter table."""
    return [
        DeclareLaunchArgument(
            row.name,
            default_value=str((defaults or {}).get(row.name, _text(row.default))),
            description=f"{row.description} ({row.allowed})",
            choices=list(row.choices) or None,
        )
        for row in rows
    ]


def values(rows: Iterable[Parameter], context) -> dict[str, object]:
    """The arguments of `arguments`, in the types of their parameters."""
    return {row.name: _typed(row, context.launch_configurations[row.name]) for row in rows}


def node(executable: str, name: str, parameters: Sequence = (), **options) -> Node:
    """A node of this package, its log on the screen."""
    return Node(package=PACKAGE, executable=executable, name=name, parameters=list(parameters), output="screen", **options)


def managed(executable: str, name: str, parameters: Sequence = (), namespace="", **options) -> list:
    """A lifecycle node that is configured and activated as it starts, on every distribution from Humble on."""
    managed_node = LifecycleNode(
        package=PACKAGE, executable=executable, name=name, namespace=namespace, parameters=list(parameters),
        output="screen", **options,
    )

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(managed_node), transition_id=transition))

    return [
        RegisterEventHandler(
            OnProcessStart(target_action=managed_node, on_start=[change(Transition.TRANSITION_CONFIGURE)])
        ),
        # Only from configuring: a node that somebody deactivates stays so.
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=managed_node, start_state="configuring", goal_state="inactive",
                entities=[change(Transition.TRANSITION_ACTIVATE)],
            )
        ),
        managed_node,
    ]


def record_arguments(directory: str = "recording") -> list[DeclareLaunchArgument]:
    """`record`, and `directory`, the name of the argument that says where to."""
    return [
        DeclareLaunchArgument("record", default_value="false", description="record what a later evaluation needs"),
        DeclareLaunchArgument(directory, default_value="recording", description="directory of that recording"),
    ]


def recorder(output: str, file: str | None = None, bundle: str = "", namespace: str = "") -> Node:
    """The recorder, with the manifest of the served engine in the bag's metadata; `file` holds node parameters."""
    parameters = [{"output": output, "bundle": bundle}]
    return node("recorder_node", "recorder", [file, *parameters] if file else parameters, namespace=namespace)


def ends_with(action, then: Callable[[], list] | None = None) -> RegisterEventHandler:
    """When `action` ends with code 0: start what `then` gives, or end the launch. With another code: fail the launch."""

    def on_exit(event, context):
        if event.returncode:
            # An exception is the one way to have `ros2 launch` itself end with a code.
            raise RuntimeError(f"{event.process_name} ended with code {event.returncode}")
        return then() if then is not None else [Shutdown(reason=f"{event.process_name} is done")]

    return RegisterEventHandler(OnProcessExit(target_action=action, on_exit=on_exit))


def description(rows: Iterable, make: Callable) -> LaunchDescription:
    """Declared arguments, and actions that `make(context)` builds from their values."""
    return LaunchDescription([*rows, OpaqueFunction(function=make)])


def flag(context, name: str) -> bool:
    """A launch argument that is true or false."""
    return context.launch_configurations[name].strip().lower() in ("true", "1", "yes", "on")


def _text(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)


def _typed(row: Parameter, text: str):
    kind = type(row.default)
    if kind is str:
        return text
    import yaml

    value = yaml.safe_load(text)
    return float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value
