"""zephyr_ray: the Zephyr alignment recipe as one resumable program on Ray."""

from zephyr_ray import masking

__version__ = "0.1.0"

# On import, so that every process that uses the package, such as a Ray actor, masks secrets.
masking.install()
