"""vla_edge: a Vision-Language-Action policy on the robot's own computer."""

__version__ = "0.1.0"
