"""zephyr_ray: the Zephyr alignment recipe as one resumable program on Ray."""

__version__ = "0.1.0"
