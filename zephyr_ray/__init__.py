"""zephyr_ray: the Zephyr alignment recipe as one resumable program on Ray."""

from zephyr_ray import masking

__version__ = "0.1.0"

# Here, because no process that imports the package, such as an actor of Ray, may lack it.
masking.install()
