"""Compares wheel and sdist with the project, files and links; `make package` runs it."""

import re
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
    (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
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
address = re.search(r"^Project-URL: Repository, (\S+)$", metadata, re.MULTILINE)
version = re.search(r"^Version: (\S+)$", metadata, re.MULTILINE)
if address is None or version is None:
    sys.exit("the metadata name no repository or version")
links = re.findall(r"\]\(([^)\s#]+)", metadata)
inside = re.compile(rf"{re.escape(address[1])}/(?:blob|raw)/v{re.escape(version[1])}/(.+)")
paths = {link: found[1] for link in links if (found := inside.fullmatch(link))}
broken = [link for link, path in paths.items() if not (ROOT / path).exists()]
broken += [link for link in links if not link.startswith("https://")]
if broken or len(paths) < 5:
    sys.exit(f"README's links lead nowhere in the metadata: {broken or links}")
print(f"{wheel_path.name}: {len(names)} files; {sdist_path.name}: {len(packed)} files")
