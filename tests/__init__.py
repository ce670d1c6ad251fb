from . import shapes as shapes  # jaxtyping imports no more than the package
