from setuptools import setup

setup(
    name="vla-edge-ros2launch",
    version="0.1.0",
    description="The `ros2 launch` verb for an environment whose ROS 2 comes from wheels, which lack it",
    license="Apache-2.0",
    packages=["vla_edge_ros2launch"],
    entry_points={"ros2cli.command": ["launch = vla_edge_ros2launch.command:LaunchCommand"]},
)
