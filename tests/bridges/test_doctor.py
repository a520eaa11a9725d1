"""`sparsebridge doctor` on this machine, and on worse ones: versions, folders, limits, a lost torch."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest

from bridges import doctor
from bridges.cli import main
from tests.conftest import ROOT, SHIPPED_DENSE


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def installed(folder: Path, name: str, version: str, *lines: str) -> None:
    """Metadata of a distribution, as pip leaves it, before all others on sys.path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines)
    (info / "METADATA").write_text("\n".join(head) + "\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        main(arguments)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# --- this machine ----------------------------------------------------------------------------------------


def test_every_part_is_told_and_the_code_follows_from_the_problems(capsys) -> None:
    code, text, _ = run(capsys, "doctor", "--json")
    told = json.loads(text)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert {"python", "torch", "transformers", "safetensors", "cpu", "sqlite", "disk", "memory"} <= set(found)
    assert {"temporary folder", "hub cache", "bitsandbytes, in use", "default checkpoint"} <= set(found)
    problems = [finding for finding in told["findings"] if finding["state"] == "problem"]
    assert code == told["exit_code"] == (4 if problems else 0)
    assert all(finding["advice"] for finding in told["findings"] if finding["state"] != "ok")
    assert found["torch"]["state"] == found["transformers"]["state"] == "ok"
    assert found["default checkpoint"]["state"] == "ok"


def test_bounds_are_those_of_the_installed_metadata() -> None:
    found = {r.name: str(r.specifier) for r in doctor.requirements()}
    assert ">=2.10" in found["torch"]
    assert ">=5.3" in found["transformers"]
    assert "pytest" not in found
    assert "pytest" in {r.name for r in doctor.requirements("test")}


# --- versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "hole"),
    [("torch", "2.9.1", "CVE-2026-24747"), ("transformers", "5.2.0", "CVE-2026-4372")],
)
def test_below_a_floor_is_a_problem_with_its_hole_and_its_cure(packages, name, version, hole, capsys) -> None:
    installed(packages, name, version)
    found = {finding.name: finding for finding in doctor.check_versions()}[name]
    assert found.state == "problem"
    assert version in found.found
    assert hole in found.found
    assert found.advice.startswith(f"pip install '{name}")
    code, out, err = run(capsys, "check", str(SHIPPED_DENSE))
    assert (code, out) == (4, "")
    assert hole in err
    assert "pip install" in err
    assert err.count("\n") == 1


def test_above_a_bound_is_a_problem_too(packages) -> None:
    installed(packages, "torch", "99.0+cu999")
    assert states(doctor.check_versions())["torch"] == "problem"


def test_local_and_newer_builds_inside_the_bounds_are_fine(packages) -> None:
    installed(packages, "torch", "2.11.1+cu130")
    assert states(doctor.check_versions())["torch"] == "ok"


def test_missing_packages_and_extras_are_told_apart(packages) -> None:
    wanted = ("Requires-Dist: no-such-base>=3", 'Requires-Dist: no-such-extra>=1; extra == "sign"')
    never = 'Requires-Dist: no-such-other; sys_platform == "none"'
    installed(
        packages, "sparsebridge", "9.9", "Requires-Python: >=99", "Provides-Extra: sign", *wanted, never
    )
    always = {finding.name: finding for finding in doctor.check_versions()}
    assert always["sparsebridge"].found == "9.9"
    assert always["python"].state == "problem"
    assert always["no-such-base"].state == "problem"
    assert always["no-such-base"].advice == "pip install 'no-such-base>=3'"
    assert "no-such-extra" not in always
    assert "no-such-other" not in always
    (extra,) = doctor.check_optional()
    assert (extra.name, extra.state) == ("no-such-extra", "warning")
    assert extra.advice == "pip install 'sparsebridge[sign]'"


def test_an_optional_package_that_cannot_be_imported_is_a_warning(packages) -> None:
    installed(
        packages, "sparsebridge", "9.9", "Provides-Extra: fast", 'Requires-Dist: broken-one; extra == "fast"'
    )
    installed(packages, "broken-one", "1.0")
    (packages / "broken_one.py").write_text("raise OSError('libbroken.so: not found')")
    (found,) = doctor.check_optional()
    assert found.state == "warning"
    assert "libbroken.so" in found.found


def test_it_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: not found')")
    done = subprocess.run(
        [sys.executable, "-m", "bridges.cli", "doctor", "--json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4, done.stderr
    told = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert told["device"]["state"] == "problem"
    assert "libtorch_cpu.so" in told["device"]["found"]
    assert told["sqlite"]["state"] == "ok"


# --- folders ---------------------------------------------------------------------------------------------


def test_a_folder_that_takes_no_data_is_a_problem(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert states(doctor.check_disk())["disk"] in ("ok", "warning")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (doctor.PROBE_BYTES // 2, hard))
        (found,) = doctor.check_disk()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert found.state == "problem"
    assert "cannot be written" in found.found
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_that_is_not_used_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # python asks once and remembers
    (found,) = doctor.check_temporary_folder()
    assert found.state == "warning"
    assert str(tmp_path / "absent") in found.found
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert states(doctor.check_temporary_folder())["temporary folder"] in ("ok", "warning")


def test_a_hub_cache_below_a_file_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert states(doctor.check_hub_cache())["hub cache"] == "warning"
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "new" / "hub"))
    assert states(doctor.check_hub_cache())["hub cache"] == "ok"


def test_the_checkpoint_that_recipes_start_from_is_looked_at(tmp_path: Path, monkeypatch) -> None:
    copy = tmp_path / "recipes" / "python" / "dense"
    shutil.copytree(SHIPPED_DENSE, copy)
    monkeypatch.chdir(tmp_path)
    assert states(doctor.check_default_checkpoint())["default checkpoint"] == "ok"
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    (found,) = doctor.check_default_checkpoint()
    assert found.state == "problem"
    assert "its header needs" in found.found


def test_text_has_one_line_per_finding_and_one_that_counts(capsys, tmp_path: Path, monkeypatch) -> None:
    hostile = tmp_path / "a\x1b[2J\u202eb\nc"
    hostile.mkdir()
    monkeypatch.chdir(hostile)
    _, text, _ = run(capsys, "doctor")
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)
    assert all(line.split("  ")[0] in ("ok", "warning", "problem") for line in lines[:-1])
    counts = [sum(line.startswith(state) for line in lines[:-1]) for state in ("ok", "warning", "problem")]
    assert lines[-1].startswith("{} ok, {} warning, {} problem".format(*counts))
