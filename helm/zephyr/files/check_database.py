# Refuses a database whose schema is not the one of this MLflow. `mlflow server` would refuse only
# some of them, and would migrate the others without asking.
import os
import sys
from pathlib import Path

import mlflow
import sqlalchemy
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

with sqlalchemy.create_engine(os.environ["MLFLOW_BACKEND_STORE_URI"]).connect() as connection:
    revision = MigrationContext.configure(connection).get_current_revision()
scripts = Path(mlflow.__file__).parent / "store" / "db_migrations"
revisions = [script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()]
if revision is None or revision == revisions[0]:
    sys.exit()
if revision in revisions:
    fix = "back it up, then set mlflow.database.migrate"
else:
    fix = "a newer MLflow migrated it; use that image, or restore a backup"
sys.exit(f"the database has schema {revision}, MLflow {mlflow.VERSION} needs {revisions[0]}: {fix}")
