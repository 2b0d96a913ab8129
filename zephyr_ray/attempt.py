"""Connects a run to the RayJob that started it as one of its attempts."""

import json
import os
import sys
import time

JOB_VARIABLE = "ZEPHYR_JOB"
"""Environment variable that holds the name of the RayJob; unset elsewhere."""
NOT_RETRIED = "this job stops itself, because a retry on a new cluster would fail in the same way"
"""Line of the log by which the client recognizes a job that a user error has stopped."""
STOP_SECONDS = 60
"""Maximum seconds until Ray ends a process whose job is stopped."""


def job_name() -> str:
    """Returns the name of the RayJob that this process is an attempt of, or an empty string."""
    return os.environ.get(JOB_VARIABLE, "")


def stop_own_job() -> None:
    """Stops the Ray job that this process drives for a RayJob, after a user error. KubeRay retries
    every job that fails, whatever its exit code, but none that is stopped."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission = config.get("metadata", {}).get("job_submission_id")
    if not job_name() or not submission:
        return
    from ray.job_submission import JobSubmissionClient

    print(NOT_RETRIED, file=sys.stderr, flush=True)
    try:
        JobSubmissionClient().stop_job(submission)
    except Exception as error:  # the dashboard may be down; then the job is retried
        print(f"cannot stop this job: {' '.join(str(error).split())[:300]}", file=sys.stderr)
    else:
        time.sleep(STOP_SECONDS)
