"""Numbers as people read them."""

from zephyr_ray.demand import GIB


def gib(size: float) -> str:
    """Returns bytes in GiB, with three digits at most."""
    value = size / GIB
    digits = 0 if value >= 99.5 else 1 if value >= 0.95 else 2
    return f"{value:.{digits}f} GiB"


def millions(count: float) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M"


def hours(value: float) -> str:
    return f"{value:.1f} h" if value >= 1 else f"{value * 60:.0f} min"
