"""`zephyr doctor`: a table of what a run needs of the cluster, each ✓ or ✗ with the fix."""

from collections.abc import Callable, Iterator

from zephyr_ray.cluster import checks, services
from zephyr_ray.cluster.checks import Verdict, bad, unknown
from zephyr_ray.cluster.kube import Forbidden, Kube, Unauthorized
from zephyr_ray.cluster.profile import Profile
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.recipe import Recipe

MARKS = {"good": "[green]✓[/]", "bad": "[red]✗[/]", "unknown": "[yellow]–[/]"}


def doctor(profile: Profile, recipe: Recipe | None, pull: bool) -> int:
    """Prints the table; 0 where nothing is ✗, else 1."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kube = Kube(profile.context, profile.namespace)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "seen", "fix"):
        table.add_column(heading, overflow="fold")
    wrong = 0
    for what, verdict in examine(kube, profile, recipe, pull):
        wrong += verdict.state == "bad"
        table.add_row(MARKS[verdict.state], what, Text(verdict.saw), Text(verdict.fix))
    Console().print(table)
    return 1 if wrong else 0


def examine(
    kube: Kube, profile: Profile, recipe: Recipe | None, pull: bool
) -> Iterator[tuple[str, Verdict]]:
    """Every check, whatever became of those before it."""
    every: list[tuple[str, Callable[[], Iterator[Verdict]]]] = [
        ("versions", lambda: checks.versions(kube)),
        ("operator", lambda: checks.operator(kube)),
        ("namespace", lambda: checks.namespace(kube)),
        ("permissions", lambda: checks.permissions(kube)),
        ("nodes", lambda: checks.gpus(kube, profile)),
        ("storage", lambda: checks.storage(kube, profile)),
        ("secrets", lambda: checks.secrets(kube, profile, recipe)),
        ("image", lambda: checks.image(kube, profile)),
        ("MLflow", lambda: services.mlflow(kube, profile)),
        ("Ray", lambda: services.dashboards(kube)),
    ]
    if pull:
        every.append(("pull", lambda: checks.pull(kube, profile)))
    for what, check in every:
        try:
            for verdict in check():
                yield what, verdict
        except Unauthorized as error:
            yield what, bad(str(error), "kubectl auth whoami must answer; then run this again")
            return  # every other answer would be the same
        except Forbidden as error:
            yield what, unknown(str(error), "ask for that right, or whoever has it")
        except Permanent as error:
            yield what, bad(str(error), "")
        except Temporary as error:
            if services.KEPT_OUT in str(error):
                fix = "a network policy may keep the API server out; ask by kubectl port-forward"
                yield what, unknown(str(error), fix)
                continue
            yield what, bad(str(error), "try again; is the address right, is a VPN needed?")
            if what == "versions":
                return  # nobody answers at all
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield what, unknown(f"an answer of an unknown form ({type(error).__name__}: {error})")
