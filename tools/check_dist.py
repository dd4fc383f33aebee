"""Compares wheel and sdist with the files of the project; `make package` runs it."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
(wheel_path,) = (ROOT / "dist").glob("*.whl")
(sdist_path,) = (ROOT / "dist").glob("*.tar.gz")


def sources(*folders: str) -> set[str]:
    """The files below folders of the project, without Python's caches."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix != ".pyc"}


with zipfile.ZipFile(wheel_path) as wheel:
    names = set(wheel.namelist())
info = f"{'-'.join(wheel_path.name.split('-')[:2])}.dist-info"
described = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
with tarfile.open(sdist_path) as sdist:
    packed = {member.name.partition("/")[2] for member in sdist if member.isfile()}

faults = {
    "wheel lacks": (sources("separate_loss") | described) - names,
    "wheel has beside them": names - sources("separate_loss") - described,
    "sdist lacks": sources("separate_loss", "tests") - packed,
}
for fault, files in faults.items():
    if files:
        sys.exit(f"{fault}: {sorted(files)}")
print(f"{wheel_path.name}: {len(names)} files; {sdist_path.name}: {len(packed)} files")
