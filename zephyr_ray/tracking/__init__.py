"""Logs to MLflow, from the driver only: one parent run per pipeline, one nested run per stage.

MLFLOW_TRACKING_URI names the server; the default is SQLite in `<storage>/mlflow.db` with artifacts
in `<storage>/mlartifacts`. A pipeline starts only if MLflow can be opened. Later failures never
stop it: the first one logs a warning, and metrics are kept until the next flush.
"""
