"""Checks of the machine that need no other process: Python, packages, cores, memory, disk, limits, logdir, clock."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dreamer
from dreamer.doctor.findings import Finding, Level, Request
from dreamer.replay.memory import machine_memory

_GB, _MB = 10**9, 10**6
#: Below the first any run fails, below the second large runs do: bytes of memory, bytes of disk, descriptors.
MEMORY = (1 * _GB, 4 * _GB)
DISK = (1 * _GB, 10 * _GB)
DESCRIPTORS = (128, 1024)
#: Space that is shared by the pictures of many environments, rendering engines and several GPUs.
SHARED_MEMORY = 256 * _MB
#: Files that a run writes: a few hundred, and one per chunk of replay.
FILES = 10_000
#: Seconds that a clock may be off before it should be set.
CLOCK = 300
_SHM = Path("/dev/shm")
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_LESS_MEMORY = (
    "end other programs, or ask for less: --replay.storage disk, a smaller --replay.capacity, --configs size1m, "
    "fewer --env.num_envs"
)


def grade(value: float, limits: tuple[float, float]) -> Level:
    """The level of a value, given the least that works at all and the least that is comfortable."""
    return "fail" if value < limits[0] else "warn" if value < limits[1] else "ok"


def python(request: Request) -> Finding:
    found, seen = platform.python_version(), f"{platform.python_version()}, {sys.executable}"
    wanted = importlib.metadata.metadata("dreamer")["Requires-Python"]
    if found in SpecifierSet(wanted, prereleases=True):
        return Finding("python", "ok", seen)
    return Finding("python", "fail", f"{seen}; expected {wanted}", f"install dreamer into a Python {wanted}")


def packages(request: Request) -> Finding:
    """The packages that dreamer requires, at the required versions."""
    wrong, wanted = [], [Requirement(text) for text in importlib.metadata.requires("dreamer") or []]
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, found or "none"))
    if not wrong:
        return Finding("packages", "ok", f"dreamer {dreamer.__version__} and the {len(needed)} packages it needs")
    seen = "; ".join(f"expected {requirement}, found {found}" for requirement, found in wrong)
    install = " ".join(f"'{requirement}'" for requirement, _ in wrong)
    return Finding("packages", "fail", seen, f"{sys.executable} -m pip install {install}")


def cores(request: Request) -> Finding:
    """Cores of this process against those of the machine, and the share of them that a container grants."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = f"load {os.getloadavg()[0]:.1f}"
    words = _CPU_LIMIT.read_text().split() if _CPU_LIMIT.is_file() else ["max"]
    granted = usable if words[0] == "max" else int(words[0]) / int(words[1])
    seen = f"{usable} of {os.cpu_count()}, {load}"
    if granted < usable:
        seen = f"{usable} cores, time of {granted:.1f} of them granted, {load}"
        last = max(int(granted), 1) - 1
        remedy = f"grant more (docker run --cpus {usable}), or use fewer cores: taskset -c 0-{last} dreamer ..."
        return Finding("cores", "warn", seen, remedy)
    return Finding("cores", "ok", seen)


def memory(request: Request) -> Finding:
    total = machine_memory()
    free = min(total, psutil.virtual_memory().available)
    level = grade(free, MEMORY)
    return Finding("memory", level, f"{_gigabytes(free)} free of {_gigabytes(total)}", _LESS_MEMORY * (level != "ok"))


def disk(request: Request) -> Finding:
    """Bytes and files that still fit on the disk of the logdir."""
    place = existing(request.logdir)
    free = shutil.disk_usage(place).free
    system = os.statvfs(place)
    level, seen = grade(free, DISK), f"{_gigabytes(free)} free in {place}"
    remedy = f"make room in {place}, or write elsewhere: --logdir DIR; the replay is what grows: --replay.capacity"
    if system.f_files and system.f_favail < FILES:
        return Finding("disk", "fail", f"{seen}, but only {system.f_favail} more files", f"delete files in {place}")
    return Finding("disk", level, seen, remedy * (level != "ok"))


def descriptors(request: Request) -> Finding:
    """Open files: four per worker process, and those of the run itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    level = grade(soft, DESCRIPTORS)
    higher = hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS[1]
    remedy = f"ulimit -n {DESCRIPTORS[1]}" if higher else "raise the hard limit: docker run --ulimit nofile=65536, or "
    remedy += "" if higher else "/etc/security/limits.conf"
    return Finding("open files", level, f"at most {soft}", remedy * (level != "ok"))


def shared_memory(request: Request) -> Finding:
    """The memory through which worker processes exchange pictures."""
    size = f"docker run --shm-size {4 * SHARED_MEMORY // _MB}m, or mount -o remount,size=1G {_SHM}"
    if not (_SHM.is_dir() and os.access(_SHM, os.W_OK)):
        return Finding("shared memory", "warn", f"no {_SHM} to write to: workers share files on disk instead", size)
    free = shutil.disk_usage(_SHM).free
    if free < SHARED_MEMORY:
        seen = f"{free / _MB:.0f} MB free in {_SHM}: too little for many environments or several GPUs"
        return Finding("shared memory", "warn", seen, size)
    return Finding("shared memory", "ok", f"{_gigabytes(free)} free in {_SHM}")


def logdir(request: Request) -> Finding:
    """Writes, syncs, renames and locks a file, in the logdir or in the folder where it would be made."""
    place = existing(request.logdir)
    if not place.is_dir():
        return Finding("logdir", "fail", f"{place} is a file", "choose another folder: --logdir DIR")
    if os.path.islink(request.logdir) and not os.path.exists(request.logdir):
        seen = f"{request.logdir} is a link to {os.readlink(request.logdir)}, which is not there"
        return Finding("logdir", "fail", seen, "choose another folder: --logdir DIR")
    try:
        os.path.lexists(request.logdir) or os.stat(request.logdir)
    except FileNotFoundError:
        pass  # it will be made
    except OSError as error:
        seen = f"{request.logdir} cannot be made: {error.strerror}"
        return Finding("logdir", "fail", seen, "choose another folder: --logdir DIR")
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            path = Path(folder) / "written"
            start = time.perf_counter()
            with path.open("wb") as file:
                file.write(bytes(_MB))
                file.flush()
                os.fsync(file.fileno())
            path.rename(path.with_name("renamed"))
            seconds = time.perf_counter() - start
            locks = _locks(path.with_name("renamed"))
    except OSError as error:
        remedy = f"choose a folder you may write to, --logdir DIR, or change its owner: chown {os.getuid()} {place}"
        return Finding("logdir", "fail", f"cannot write to {place}: {error.strerror or error}", remedy)
    if not locks:
        remedy = "make sure that only one run uses a logdir, or choose one on another file system"
        return Finding("logdir", "warn", f"{place} has no file locks", remedy)
    return Finding("logdir", "ok", f"{request.logdir}: 1 MB written to {place} in {seconds:.2f} s")


def clock(request: Request) -> Finding:
    """Compares the clock with the dates of this package's files, and of a file written now."""
    now = time.time()
    newest = max(path.stat().st_mtime for path in Path(dreamer.__file__).parent.rglob("*.py"))
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if now < newest - CLOCK:
        seen = f"{shown}, before the date of dreamer's own files, {time.strftime('%Y-%m-%d', time.localtime(newest))}"
        return Finding("clock", "warn", seen, "set the clock: timedatectl set-ntp true")
    off = _written_at(existing(request.logdir), now) - now
    if abs(off) > CLOCK:
        seen = f"{shown}; the file system of the logdir is {off:+.0f} seconds off"
        return Finding("clock", "warn", seen, "set this clock or the file server's: timedatectl set-ntp true")
    return Finding("clock", "ok", shown)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists (or a file that is in the way)."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def _written_at(place: Path, otherwise: float) -> float:
    """The time stamp of a file written there; `otherwise` if none can be written."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return otherwise


def _locks(path: Path) -> bool:
    """Whether files there can be locked."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _gigabytes(size: float) -> str:
    return f"{size / _GB:.1f} GB"
