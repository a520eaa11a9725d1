"""`sparsebridge check` on real folders: whole ones of several families, and damaged copies of one.

The rows are those of the fault list (evidence.md (c)); what the recipes refuse is named in the same words.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridges.checkpoint import load_dense
from bridges.cli import main
from bridges.trust import DenseConfig
from extractor.artifacts import file_sha256, fingerprint
from extractor.errors import InputError
from tests.families import tiny_model

COMMIT = "c" * 40
WEIGHT = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def check(folder: Path, capsys) -> tuple[int, dict[str, dict]]:
    """Exit code, and findings by name with the other facts below ''."""
    capsys.readouterr()  # progress bars of what made the folder
    try:
        main(["check", str(folder), "--json"])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = capsys.readouterr()
    assert shown.err == ""
    told = json.loads(shown.out)
    found = {finding["name"]: finding for finding in told.pop("findings")}
    assert code == told["exit_code"]
    assert code == (3 if any(finding["state"] == "problem" for finding in found.values()) else 0)
    return code, found | {"": told}


def problems(found: dict[str, dict]) -> dict[str, str]:
    return {name: f["found"] for name, f in found.items() if name and f["state"] == "problem"}


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- whole folders ---------------------------------------------------------------------------------------


def test_a_whole_folder_passes_and_its_facts_are_true(folder: Path, capsys) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Text\n")
    code, found = check(folder, capsys)
    assert code == 0
    facts, stored = found[""], load_file(folder / "model.safetensors")
    assert facts["sha256"] == fingerprint(folder)
    assert facts["sha256"] == load_dense(DenseConfig(path=str(folder))).sha256
    assert facts["files"] == {"model.safetensors": file_sha256(folder / "model.safetensors")}
    assert {tensor["name"]: tensor["shape"] for tensor in facts["tensors"]} == {
        name: list(value.shape) for name, value in stored.items()
    }
    assert sum(tensor["bytes"] for tensor in facts["tensors"]) == sum(v.nbytes for v in stored.values())
    assert {tensor["dtype"] for tensor in facts["tensors"]} == {"float32"}
    assert facts["licence"] == ["apache-2.0"]
    assert facts["memory_bytes"] > 3 * sum(v.nbytes for v in stored.values())
    assert {name: f["state"] for name, f in found.items() if name and f["state"] != "ok"} == {}


@pytest.mark.parametrize("row", ["Llama", "Mixtral", "OPT", "gpt-oss", "Falcon (40B)"])
def test_other_families_find_every_tensor(row: str, tmp_path: Path, shipped_tokenizer, capsys) -> None:
    tiny_model(row).save_pretrained(tmp_path)
    code, found = check(tmp_path, capsys)
    assert set(problems(found)) == {"tokenizer"}  # these have none
    for kind in ("missing keys", "unexpected keys", "mismatched keys"):
        assert found[kind]["state"] == "ok"
    assert found["memory"]["state"] == "ok"
    experts = row in ("Mixtral", "gpt-oss")
    assert ("exact copy" in found) == experts
    assert ("mixture of experts" in found["family"]["found"]) == experts
    assert code == 3


def test_text_output_is_plain_and_counts(folder: Path, capsys) -> None:
    card = folder / "README.md"
    card.write_text("---\nlicense: 'mit \\x1b[2J'\n---\n".replace("\\x1b", "\u202e"))
    main(["check", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert "[U+202E]" in next(line for line in lines if "licence" in line)
    assert lines[-1] == f"{len(lines) - 1} ok, 0 warning, 0 problem"


# --- damaged ones: named as the recipes name them --------------------------------------------------------


def _nan(tensors: dict) -> None:
    tensors[WEIGHT][1, 2:4] = float("nan")
    tensors["transformer.ln_f.bias"][0] = float("inf")


def _renamed(tensors: dict) -> None:
    tensors["transformer.h.0.mlp.c_fcc.weight"] = tensors.pop(WEIGHT)


def _transposed(tensors: dict) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].T.contiguous()


def _truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _with_code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("open('ran', 'w').close()\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})


DAMAGE = {
    "NaN and infinity": (lambda f: edit_weights(f, _nan), "values", "2 values of 'transformer.h.0.mlp"),
    "a missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop(WEIGHT)),
        "missing keys",
        f"1 missing keys: {WEIGHT}",
    ),
    "an unexpected tensor": (
        lambda f: edit_weights(f, lambda t: t.update(extra=torch.ones(3))),
        "unexpected keys",
        "1 unexpected keys: extra (3,)",
    ),
    "another shape": (
        lambda f: edit_weights(f, _transposed),
        "mismatched keys",
        f"{WEIGHT} (128, 32) in the file, (32, 128) by the config",
    ),
    "a truncated file": (_truncated, "file model.safetensors", "is 5000 bytes, its header needs"),
    "only pickled weights": (_pickled, "format", "only pickled ones ('pytorch_model.bin')"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "format", "has no .safetensors weights"),
    "code of its own": (_with_code, "code", "asks to run its own code (auto_map)"),
    "code by a key": (
        lambda f: edit_config(f, _attn_implementation_internal="org/name"),
        "code",
        "sets '_attn_implementation_internal'",
    ),
    "another family": (
        lambda f: edit_config(f, model_type="mamba"),
        "family",
        "model family 'mamba' is not supported",
    ),
    "quantised weights": (
        lambda f: edit_config(f, quantization_config={"bits": 4}),
        "config.json",
        "is quantised already",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "no config.json in"),
    "a link that leads out": (
        lambda f: (f / "extra.json").symlink_to("/etc/hostname"),
        "files",
        "leads to '/etc/hostname', outside of",
    ),
    "a pipe": (lambda f: os.mkfifo(f / "README.md"), "files", "is not a regular file"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", "has no tokenizer"),
    "a damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_as_the_recipes_name_it(name: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    damage, finding, message = DAMAGE[name]
    damage(folder)
    code, found = check(folder, capsys)
    assert code == 3
    assert message in problems(found)[finding]
    assert "\n" not in problems(found)[finding]
    with pytest.raises(InputError) as refusal:
        load_dense(DenseConfig(path=str(folder)))
    assert " ".join(str(refusal.value).split()) in problems(found).values()
    assert not (folder / "ran").exists()


def test_all_faults_are_named_at_once(folder: Path, capsys) -> None:
    edit_weights(folder, lambda t: (_nan(t), _renamed(t)))
    (folder / "tokenizer.json").unlink()
    found = check(folder, capsys)[1]
    assert set(problems(found)) == {"values", "missing keys", "unexpected keys", "tokenizer"}
    _with_code(folder)
    found = check(folder, capsys)[1]
    assert set(problems(found)) == {"code", "values"}
    assert {found[name]["state"] for name in ("family", "architecture", "tokenizer")} == {"not checked"}


def test_every_damaged_shard_is_named_and_a_tensor_in_two_of_them(folder: Path, capsys) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:15], "model-00002-of-00002.safetensors": names[14:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = check(folder, capsys)[1]
    assert problems(found) == {}
    assert f"1 tensors are in two files, as '{names[14]}'" in found["names"]["found"]
    assert found["names"]["state"] == "warning"
    for file in parts:
        os.truncate(folder / file, 3000)
    assert set(problems(check(folder, capsys)[1])) == {f"file {file}" for file in parts}


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """The folder as the hub cache keeps it: links to files that are named by their hash."""
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for file in folder.iterdir():
        blob = blobs / file_sha256(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_a_snapshot_in_the_hub_cache_passes_with_its_commit(snapshot: Path, capsys) -> None:
    code, found = check(snapshot, capsys)
    assert problems(found) == {}
    assert found[""]["commit"] == COMMIT


def test_a_flipped_bit_in_the_hub_cache_is_named(snapshot: Path, capsys) -> None:
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    assert "in the hub cache has changed" in problems(check(snapshot, capsys)[1])["file model.safetensors"]


# --- cards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (None, "no model card"),
        ("# No metadata\n", "states none"),
        ("---\nlicense: [\n---\n", "cannot be told"),
        ("---\nlicense: {a: b}\n---\n", "states none"),
        ("---\nlicense: &a [*a]\n---\n", "states none"),
        ("---\nlicense: mit\n---\n" + "x" * 1_000_001, "larger than"),
    ],
)
def test_a_card_without_a_licence_is_a_warning(card, told: str, folder: Path, capsys) -> None:
    if card is not None:
        (folder / "README.md").write_text(card)
    code, found = check(folder, capsys)
    assert code == 0
    assert found["licence"]["state"] == "warning"
    assert told in found["licence"]["found"]
