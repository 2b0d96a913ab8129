"""Tests that the chart rejects secrets in its values."""

import re

import pytest
from chart_tools import CLUSTER, template

OWN = ("mlflow.enabled=false",)
SECRET = "hunter2hunter2"
AUTH = "trackingUri contains credentials, .* remove them, and set mlflow.auth.existingSecret to a"
REFUSED = {
    "user and password": ((*OWN, f"mlflow.trackingUri=http://zed:{SECRET}@mlflow:5000"), AUTH),
    "a password with a slash": ((*OWN, f"mlflow.trackingUri=http://z:a/{SECRET}@m"), AUTH),
    "a token as user": ((*OWN, f"mlflow.trackingUri=https://{SECRET}@m"), AUTH),
    "a parameter": ((*OWN, f"mlflow.trackingUri=http://m/?api_key={SECRET}"), AUTH),
    "another scheme": ((*OWN, f"mlflow.trackingUri=postgresql://u:{SECRET}@h/db"), AUTH),
    "no scheme": ((*OWN, f"mlflow.trackingUri=u:{SECRET}@h:5000"), AUTH),
    "the bucket": (
        (*CLUSTER, f"mlflow.artifacts.destination=s3://id:{SECRET}@bucket"),
        "set mlflow.artifacts.existingSecret",
    ),
    "its endpoint": (
        (*CLUSTER, f"mlflow.artifacts.endpointUrl=http://id:{SECRET}@minio:9000"),
        "set mlflow.artifacts.existingSecret",
    ),
    "Redis": (
        (*CLUSTER, f"ray.gcsFaultTolerance.redisAddress=redis://:{SECRET}@redis:6379"),
        "set ray.gcsFaultTolerance.existingSecret",
    ),
    "a proxy": ((*CLUSTER, f"ray.env.HTTPS_PROXY=http://me:{SECRET}@proxy:1"), "in ray.secretEnv"),
    "a variable": ((*CLUSTER, f"ray.env.HF_TOKEN={SECRET}"), "use ray.secretEnv with an existing"),
    "an override": (
        (*CLUSTER, f"pipeline.set[0]=models.judge.base_url=http://me:{SECRET}@judge"),
        "set api_key_env to the name of the variable that holds the key",
    ),
    "a recipe": (
        (*CLUSTER, f"recipes.my\\.yaml=base_url: http://me:{SECRET}@judge"),
        "recipes.my.yaml contains credentials",
    ),
    "an annotation": (
        (*CLUSTER, f"serviceAccountAnnotations.hook=https://{SECRET}@hooks"),
        "serviceAccountAnnotations.hook contains credentials",
    ),
    "in place of a name": (
        (f"mlflow.auth.existingSecret={SECRET}!",),
        "mlflow.auth.existingSecret is not the name of a Secret",
    ),
    "in place of another name": (
        (
            *CLUSTER, "ray.secretEnv[0].name=KEY", f"ray.secretEnv[0].secret=SK-{SECRET}",
            "ray.secretEnv[0].key=k",
        ),
        r"ray.secretEnv\[0\].secret is not the name of a Secret",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_secret_in_the_values_is_one_line_that_does_not_quote_it(case: str) -> None:
    sets, expected = REFUSED[case]
    done = template(sets=sets)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert re.search(expected, line) and SECRET not in done.stderr


def test_addresses_without_secrets_are_accepted() -> None:
    sets = (*OWN, "mlflow.trackingUri=https://mlflow.example:5000/@team?x=1&keys")
    assert template(sets=sets).returncode == 0
