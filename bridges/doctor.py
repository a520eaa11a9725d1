"""`sparsebridge doctor`: is this machine fit for the recipes, and what is to be done where it is not?

Nothing of torch or of this package is imported before the check that needs it: a broken installation is
what has to be told. Floors and bounds of versions are those of the installed distribution's metadata.
"""

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sqlite3
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bridges.findings import Finding, has_problem, print_findings

DISTRIBUTION = "sparsebridge"
PROBLEM_CODE = 4
# Holes that the floors in pyproject.toml close.
HOLES = {
    "torch": "older ones run code from a checkpoint that weights_only should stop (CVE-2025-32434, "
    "CVE-2026-24747)",
    "transformers": "older ones run code that a config.json names (CVE-2026-4372)",
}
SQLITE_FLOOR = (3, 35)
GIB = 2**30
LITTLE_DISK, LITTLE_MEMORY = 10 * GIB, 4 * GIB  # warned of below
NO_DISK, NO_MEMORY = 1 * GIB, 1 * GIB  # not even the quickstart
PROBE_BYTES = 1 << 20


def doctor(as_json: bool = False) -> int:
    """Print every finding; 0, or 4 where one is a problem."""
    findings = examine()
    code = PROBLEM_CODE if has_problem(findings) else 0
    print_findings(findings, {"exit_code": code}, as_json)
    return code


def examine() -> list[Finding]:
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("versions", check_versions),
        ("optional packages", check_optional),
        ("device", check_device),
        ("cpu", check_cpu),
        ("bitsandbytes", check_bitsandbytes),
        ("disk", check_disk),
        ("temporary folder", check_temporary_folder),
        ("hub cache", check_hub_cache),
        ("sqlite", check_sqlite),
        ("memory", check_memory),
        ("default checkpoint", check_default_checkpoint),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # whatever a broken installation raises is a finding
            line = f"cannot be told: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            findings.append(Finding(name, "problem", line, f"pip install --force-reinstall {DISTRIBUTION}"))
    return findings


# --- versions --------------------------------------------------------------------------------------------


def check_versions() -> Iterator[Finding]:
    """Python and every package that is needed, against the installed distribution's own bounds."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, "problem", "not installed", "in the folder with pyproject.toml: pip install -e ."
        )
        return
    yield Finding(DISTRIBUTION, "ok", metadata["Version"])
    wanted, found = SpecifierSet(metadata["Requires-Python"] or ""), platform.python_version()
    fits = wanted.contains(found, prereleases=True)
    advice = "" if fits else f"make an environment with python {wanted}"
    yield Finding("python", "ok" if fits else "problem", f"{found} ({wanted})", advice)
    for requirement in requirements():
        yield check_requirement(requirement)
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():  # a checkout, whose list may have grown since it was installed
        listed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        if new := {str(Requirement(line)) for line in listed} - {str(r) for r in requirements()}:
            line = f"installed before pyproject.toml asked for {', '.join(sorted(new))}"
            yield Finding("pyproject.toml", "warning", line, f"in '{project.parent}': pip install -e .")


def check_optional() -> Iterator[Finding]:
    """Packages that make something faster or add to it."""
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for extra in extras:
        if extra in ("test", "dev"):
            continue
        for requirement in requirements(extra):
            found = check_requirement(requirement, extra)
            try:
                if found.state == "ok":
                    importlib.import_module(requirement.name.replace("-", "_"))
            except Exception as error:
                line = f"{found.found} cannot be imported ({type(error).__name__}: {error})"
                found = Finding(
                    found.name, "warning", line, f"pip install --force-reinstall {requirement.name}"
                )
            yield found


def requirements(extra: str = "") -> list[Requirement]:
    """Of the installed distribution, on this machine: always needed, or by one extra alone."""
    listed = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]

    def is_needed(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    return [r for r in listed if is_needed(r, extra) and (not extra or not is_needed(r, ""))]


def check_requirement(requirement: Requirement, extra: str = "") -> Finding:
    """Is the package there, in a version that is allowed? What an extra lists may be missing."""
    missing = "warning" if extra else "problem"
    wanted = f"{requirement.name}{requirement.specifier}"
    target = f"'{DISTRIBUTION}[{extra}]'" if extra else f"'{wanted}'"
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, missing, "not installed", f"pip install {target}")
    shown = f"{found} ({requirement.specifier or 'any'})"
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, "ok", shown)
    why = f"; {HOLES[requirement.name]}" if requirement.name in HOLES else ""
    return Finding(requirement.name, missing, f"{shown} is out of bounds{why}", f"pip install {target}")


# --- hardware --------------------------------------------------------------------------------------------


def check_device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
        if has_gpu:
            build = torch.version.cuda or torch.version.hip or "none"
            line = f"a GPU is here, but torch {torch.__version__} (CUDA or ROCm: {build}) cannot use it"
            yield Finding("device", "warning", line, "install the torch build for your driver (pytorch.org)")
        else:
            yield Finding("device", "ok", "no accelerator: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            answer = float(torch.ones(8, 8, device=f"cuda:{index}").sum())  # a kernel really runs
        line = f"{properties.name}, {_gib(free)} of {_gib(total)} free, bf16 {'yes' if bf16 else 'no'}"
        state = "ok" if answer == 64.0 else "problem"
        yield Finding(f"cuda:{index}", state, line, "" if state == "ok" else "its sums are wrong: reboot it")
    triton = importlib.util.find_spec("triton") is not None
    advice = "" if triton else "pip install triton, for the fast selection of weights on a GPU"
    yield Finding("triton", "ok" if triton else "warning", "there" if triton else "not installed", advice)


def check_cpu() -> Iterator[Finding]:
    import torch

    from extractor.machine import has_fast_bf16

    units = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AVX512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }
    found = ", ".join(name for name, there in units.items() if there) or "no AVX2"
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    weak = is_x86 and not units["AVX2"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    precision = "bf16" if has_fast_bf16() else "fp32"
    line = f"{platform.machine()}, {cores} cores, {found}; precision auto means {precision}"
    advice = "products of matrices will be slow; use a CPU with AVX2 or an accelerator" if weak else ""
    yield Finding("cpu", "warning" if weak else "ok", line, advice)


def check_bitsandbytes() -> Iterator[Finding]:
    """A matrix is really quantised to 4 bits and back, on the device that a run would use."""
    name, advice = "bitsandbytes, in use", "use dense.quantization none here"
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # not of kernels it can do without
        import bitsandbytes
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrix = torch.arange(64 * 64, device=device).reshape(64, 64).sin()
        packed, state = bitsandbytes.functional.quantize_4bit(matrix, quant_type="nf4")
        back = bitsandbytes.functional.dequantize_4bit(packed, state)
        error = float((back - matrix).norm() / matrix.norm())
    except Exception as error:
        line = f"does not work ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        yield Finding(name, "warning", line, advice)
        return
    works = error < 0.2  # 4 bits: about 0.1
    line = f"4 bits and back on {device}: relative error {error:.2f}"
    yield Finding(name, "ok" if works else "warning", line, "" if works else advice)


def check_memory() -> Iterator[Finding]:
    free = available_memory()
    state = "problem" if free < NO_MEMORY else "warning" if free < LITTLE_MEMORY else "ok"
    advice = "" if state == "ok" else "end other programs; the quickstart needs about 2 GiB"
    yield Finding("memory", state, f"{_gib(free)} free for this process", advice)


def available_memory() -> int:
    """Bytes of main memory that this process may still take: the machine's, or its control group's."""
    import psutil  # accelerate needs it, too

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max": none
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, free)


# --- files -----------------------------------------------------------------------------------------------


def check_disk() -> Iterator[Finding]:
    """Room and the right to write where runs are, by a real write."""
    here = Path.cwd()
    yield _check_folder("disk", here, "go to a folder of your own, or name one as run")


def check_temporary_folder() -> Iterator[Finding]:
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        yield Finding("temporary folder", "problem", str(error), "set TMPDIR to a folder that can be written")
        return
    asked = os.environ.get("TMPDIR")
    if asked and Path(asked).absolute() != Path(folder).absolute():
        line = f"TMPDIR is '{asked}', which cannot be written; '{folder}' is used"
        yield Finding("temporary folder", "warning", line, "set TMPDIR to a folder that can be written")
        return
    yield _check_folder("temporary folder", Path(folder), "set TMPDIR to a folder with room")


def check_hub_cache() -> Iterator[Finding]:
    """Where models of the hub are kept; it is made when the first one is fetched."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    mode = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online"
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = _gib(shutil.disk_usage(nearest).free)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        line = f"'{cache}' cannot be written ('{nearest}')"
        yield Finding("hub cache", "warning", line, "set HF_HOME to a folder of yours")
        return
    there = "" if cache.exists() else ", made on first use"
    yield Finding("hub cache", "ok", f"'{cache}'{there}, {free} free, {mode}")


def check_sqlite() -> Iterator[Finding]:
    fits = sqlite3.sqlite_version_info >= SQLITE_FLOOR
    floor = ".".join(map(str, SQLITE_FLOOR))
    advice = "" if fits else "use a python that was built with a newer SQLite"
    yield Finding("sqlite", "ok" if fits else "problem", f"{sqlite3.sqlite_version} (>={floor})", advice)


def check_default_checkpoint() -> Iterator[Finding]:
    """The shipped dense checkpoint, which recipes start from where none is named, passes their own checks."""
    from bridges.trust import DenseConfig, Folder, check_folder
    from extractor.errors import InputError

    config = DenseConfig()
    name, beside_code = "default checkpoint", Path(__file__).resolve().parent.parent / config.path
    folder = next((path for path in (Path(config.path), beside_code) if path.is_dir()), None)
    if folder is None:
        advice = "run in a checkout of the repository, or give --dense"
        yield Finding(name, "warning", f"no folder '{config.path}' here", advice)
        return
    try:
        files = check_folder(Folder(folder, None, str(folder)), config)
    except (InputError, OSError) as error:
        yield Finding(name, "problem", str(error), f"check '{config.path}' out again, or give --dense")
        return
    size = sum(file.stat().st_size for file in files)
    yield Finding(name, "ok", f"'{folder}', {size / 2**20:,.1f} MiB of weights")


def _check_folder(name: str, folder: Path, advice: str) -> Finding:
    free = shutil.disk_usage(folder).free
    line = f"'{folder}', {_gib(free)} free"
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return Finding(name, "problem", f"'{folder}' cannot be written ({error.strerror})", advice)
    state = "problem" if free < NO_DISK else "warning" if free < LITTLE_DISK else "ok"
    return Finding(name, state, line, "" if state == "ok" else f"little room; {advice}")


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
