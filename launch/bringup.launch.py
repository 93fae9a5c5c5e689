"""On the robot: the VLA node and the controller, configured and active; topics as in doc/, remap them as usual.

ros2 launch vla_edge bringup.launch.py bundle:=... robot:=g1 record:=true
"""

from launch.actions import DeclareLaunchArgument

from vla_edge.nodes.launching import description, flag, managed, parameter_file, record_arguments, recorder


def actions(context):
    said = context.launch_configurations
    namespace, file = said["namespace"], said["params"]
    vla = {name: said[name] for name in ("bundle", "image_transport") if said[name]}
    vla["start_on_activate"] = flag(context, "start")
    controller = {"robot": said["robot"], "sink": said["sink"], "rearm_on_activate": flag(context, "rearm")}
    made = [
        *managed("controller_node", "controller", [file, controller], namespace),
        *managed("vla_node", "vla", [file, vla], namespace),
    ]
    if flag(context, "record"):
        made.append(recorder(said["bag"], file, said["bundle"], namespace))
    return made


def generate_launch_description():
    return description(
        [
            DeclareLaunchArgument("bundle", description="engine bundle, or a checkpoint to serve in full precision"),
            DeclareLaunchArgument("robot", default_value="g1", description="'g1', 'g1:<mode>', or a YAML or URDF file"),
            DeclareLaunchArgument("sink", default_value="joint_state", description="message joint_command carries"),
            DeclareLaunchArgument("image_transport", default_value="raw", choices=["raw", "compressed"],
                                  description="form in which images are subscribed to"),
            DeclareLaunchArgument("start", default_value="true", description="serve chunks at once; otherwise ~/start"),
            DeclareLaunchArgument("rearm", default_value="false",
                                  description="arm the controller at once; otherwise call controller/rearm"),
            DeclareLaunchArgument("namespace", default_value="", description="of the robot's topics and nodes"),
            DeclareLaunchArgument("params", default_value=parameter_file("bringup.yaml"), description="node parameters"),
            *record_arguments("bag"),
        ],
        actions,
    )
