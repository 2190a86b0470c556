"""Environments: what replies to a model's turns, by the name that a recipe gives it, and the
processes that they run in.
"""

from moetrain.environments.base import Environment, Reply, Tool
from moetrain.environments.find import ENVIRONMENTS, check_environment, check_names
from moetrain.environments.service import EnvironmentService

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "EnvironmentService",
    "Reply",
    "Tool",
    "check_environment",
    "check_names",
]
