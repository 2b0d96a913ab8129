"""Runs `zephyr doctor`: checks whether the cluster can run a recipe, and prints a table."""

from collections.abc import Callable, Iterator

from zephyr_ray.cluster import checks, limits, profile_checks, services
from zephyr_ray.cluster.checks import CheckResult, bad, unknown
from zephyr_ray.cluster.kube import Forbidden, Kube, Unauthorized
from zephyr_ray.cluster.profile import Profile
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.masking import masked
from zephyr_ray.recipe import Recipe

MARKS = {"good": "[green]✓[/]", "bad": "[red]✗[/]", "unknown": "[yellow]–[/]"}


def doctor(profile: Profile, recipe: Recipe | None, pull: bool) -> int:
    """Prints the table. Returns 1 if any check failed, else 0."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    kube = Kube(profile.context, profile.namespace)
    columns = [Column(heading, overflow="fold") for heading in ("", "what", "seen", "fix")]
    table = Table(*columns, box=None, pad_edge=False)
    failures = 0
    for subject, result in examine(kube, profile, recipe, pull):
        failures += result.state == "bad"
        table.add_row(MARKS[result.state], subject, Text(result.observation), Text(result.fix))
    Console().print(table)
    return 1 if failures else 0


def examine(
    kube: Kube, profile: Profile, recipe: Recipe | None, pull: bool
) -> Iterator[tuple[str, CheckResult]]:
    """Runs the checks, even if earlier ones failed, and yields (subject, result). Stops early only
    if the API server rejects the credentials or does not answer."""
    subjects: list[tuple[str, Callable[[], Iterator[CheckResult]]]] = [
        ("versions", lambda: checks.check_versions(kube)),
        ("operator", lambda: checks.check_operator(kube)),
        ("policies", lambda: checks.check_policies(kube)),
        ("namespace", lambda: checks.check_namespace(kube)),
        ("permissions", lambda: checks.check_permissions(kube)),
        ("nodes", lambda: profile_checks.check_nodes(kube, profile)),
        ("quotas", lambda: limits.check_quotas(kube, profile)),
        ("limits", lambda: limits.check_limit_ranges(kube, profile)),
        ("queue", lambda: limits.check_queue(kube, profile)),
        ("storage", lambda: profile_checks.check_storage(kube, profile)),
        ("secrets", lambda: profile_checks.check_secret_keys(kube, profile, recipe)),
        ("image", lambda: profile_checks.check_image(kube, profile)),
        ("MLflow", lambda: services.check_mlflow(kube, profile)),
        ("Ray", lambda: services.check_dashboards(kube)),
    ]
    if pull:
        subjects.append(("pull", lambda: profile_checks.check_pulls(kube, profile)))
    for subject, check in subjects:
        try:
            for result in check():
                yield subject, result
        except Unauthorized as error:
            yield subject, bad(str(error), "log in again; kubectl auth whoami must succeed")
            return  # every other check would fail the same way
        except Forbidden as error:
            yield subject, unknown(str(error), "get that permission, or ask someone who has it")
        except Permanent as error:
            yield subject, bad(str(error))
        except Temporary as error:
            if services.UNREACHABLE in str(error):
                fix = "a network policy may block the API server; check with kubectl port-forward"
                yield subject, unknown(str(error), fix)
                continue
            yield subject, bad(str(error), "check the address and the VPN, then try again")
            if subject == "versions":
                return  # the API server does not answer at all
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = masked(f"{type(error).__name__}: {error}")
            yield subject, unknown(f"unexpected answer from the cluster ({reason})")
