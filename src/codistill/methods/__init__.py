"""Ways of training a cohort together; one method a file."""

from codistill.methods.cohort import Outputs
from codistill.methods.method import METHODS, Method, MethodSettings, ParameterGroup

__all__ = ["METHODS", "Method", "MethodSettings", "Outputs", "ParameterGroup"]
