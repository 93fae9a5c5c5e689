"""`ros2 launch` where no distribution brings it; installed by `make setup` into .venv, never on a robot."""
