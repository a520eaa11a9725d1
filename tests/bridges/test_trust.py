"""What is refused from a name and the files alone: code, links, damage; the hub and its cache, offline.

Rows are those of the fault list (evidence.md (c)). Without a subject here: row 19 (nothing is unpacked),
row 4's `doctor` (the floors are install requirements, checked below).
"""

import errno
import json
import os
import shutil
import socket
import struct
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from bridges.checkpoint import load_dense
from bridges.hub import file_patterns, resolve_folder
from bridges.trust import DenseConfig, Folder, check_folder, check_safetensors
from extractor.artifacts import file_sha256
from extractor.errors import InputError, UnsupportedModelError, UsageError
from tests.conftest import ROOT

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: object) -> None:
    edit_json(folder / "config.json", **changes)


def check(folder: Path, **settings: object) -> list[Path]:
    config = DenseConfig(path=str(folder), **settings)
    return check_folder(resolve_folder(config), config)


def refused(folder: Path, message: str, **settings: object) -> None:
    """Refused by the checks alone, in one line."""
    with pytest.raises(InputError, match=message) as error:
        check(folder, **settings)
    assert "\n" not in str(error.value)


def test_a_whole_folder_passes(folder: Path) -> None:
    assert check(folder) == [folder / "model.safetensors"]


# --- configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no config.json in .*; give a Hugging Face model folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json' is not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json' is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json' is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold keys and values, not list"),
        (lambda f: edit_config(f, quantization_config={"bits": 4}), "is quantised already"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "give it as dense.adapter"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder: Path, damage, message: str) -> None:
    damage(folder)
    refused(folder, message)


def test_row_12_another_family_is_refused_with_the_supported_ones(folder: Path) -> None:
    edit_config(folder, model_type="bert")
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported; supported: .*gpt2.*llama"):
        check(folder)
    assert check(folder, allow_unlisted=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_row_2_own_code_needs_trust(folder: Path, name: str) -> None:
    edit_json(folder / name, auto_map={"AutoModelForCausalLM": "code.Model"})
    refused(folder, f"{name}' asks to run its own code")
    assert check(folder, trust_remote_code=True)


def test_row_2_code_of_yet_another_model_is_refused_even_with_trust(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "else/where--code.Model"})
    refused(folder, "takes its code from another model", trust_remote_code=True)


def test_row_2_code_does_not_run_before_the_refusal(folder: Path, tmp_path: Path) -> None:
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"})
    with pytest.raises(InputError, match="its own code"):
        load_dense(DenseConfig(path=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("revision", [None, "main", "a" * 39])
def test_row_2_trusted_code_of_the_hub_needs_a_whole_commit(revision: str | None) -> None:
    config = DenseConfig(path="some/model", trust_remote_code=True, revision=revision)
    with pytest.raises(UsageError, match="must be the full 40-digit commit"):
        resolve_folder(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_internal": "evil/kernel"},
        {"_experts_implementation_internal": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": {"": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"trust_remote_code": True},
        {"attention_kernel": "evil/kernel"},
        {"kernel_config": {"RMSNorm": "evil/kernel"}},
        {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
        {"layers": [{"kernels": ["evil/kernel"]}]},
        {"transformers_weights": "adapter_model.bin"},
        {"fusion_config": {"mlp": True}},
        {"_auto_class": "AutoModel"},
        {"__class__": "Other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_row_3_keys_that_fetch_or_run_code_are_refused(folder: Path, changes: dict) -> None:
    edit_config(folder, **changes)
    refused(folder, "can fetch or run code", trust_remote_code=True)


def test_row_3_keys_of_real_checkpoints_pass(folder: Path) -> None:
    edit_config(
        folder,
        _name_or_path="org/name",
        _commit_hash="a" * 40,
        _sliding_window_pattern=6,
        _attn_implementation_autoset=True,
        _flash_attn_2_enabled=False,
        attn_implementation="sdpa",
        trust_remote_code=False,
        linear_conv_kernel_dim=4,
        conv_kernel=[10, 3, 3],
        use_mamba_kernels=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        id2label={"0": "LABEL_0"},
    )
    assert check(folder)
    assert load_dense(DenseConfig(path=str(folder))).model.config.linear_conv_kernel_dim == 4


def test_row_4_the_floors_are_install_requirements() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(line.startswith("torch>=2.1") for line in needs)
    assert any(line.startswith("transformers>=5") for line in needs)


# --- files -----------------------------------------------------------------------------------------------


def only_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def test_row_1_pickled_weights_need_permission(folder: Path) -> None:
    only_pickle(folder)
    refused(folder, r"no .safetensors weights, only pickled ones \('pytorch_model.bin'\)")
    assert check(folder, allow_pickle=True) == [folder / "pytorch_model.bin"]


def test_row_1_pickled_weights_are_never_read_beside_safetensors(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert check(folder, allow_pickle=True) == [folder / "model.safetensors"]


def test_row_5_truncated_weights_are_refused_with_both_sizes(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 100, 1000):
        file.write_bytes(whole[:length])
        refused(folder, f"model.safetensors' is {length} bytes, its header needs ")
    file.write_bytes(whole[: len(whole) - 100])
    refused(folder, f"header needs {len(whole)};")


ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "is damaged"),
        (
            ONE.encode() + b',"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            b"0" * 12,
            "invalid offset",
        ),
        (ONE.encode() + b"," + ONE.encode()[1:] + b"}", b"0" * 8, "'a' is there twice"),
        (ONE.encode() + b"}" + b"\0" * 8, b"0" * 8, "is damaged"),
        (ONE.encode() + b"}", b"0" * 16, "not fully covered"),
        (b"[1]", b"", "is damaged"),
        (b"{" * 50_000, b"", "is damaged"),
        (ONE.replace("[2]", "[3]").encode() + b"}", b"0" * 8, "is damaged"),
    ],
    ids=["empty", "overlap", "duplicate", "padding", "trailing", "list", "deep", "shape"],
)
def test_row_6_damaged_headers_are_refused(tmp_path: Path, header: bytes, data: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(InputError, match=message):
        check_safetensors(file)


def test_row_6_a_huge_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse: takes no space
    with pytest.raises(InputError, match="header too large"):
        check_safetensors(file)


def test_row_6_any_cut_or_flipped_header_byte_is_refused_or_harmless(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    header_length = struct.unpack("<Q", whole[:8])[0]
    file = tmp_path / "model.safetensors"
    refusals = 0
    for position in torch.randint(0, 8 + header_length, (60,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        file.write_bytes(flipped)
        try:
            check_safetensors(file)
        except InputError:
            refusals += 1
    assert refusals > 10  # a flipped letter of a name is found later, as a missing key
    for length in (0, 4, 8, 8 + header_length // 2, 8 + header_length):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError):
            check_safetensors(file)


def shard(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        part = {name: weights[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_weights_load_and_missing_shards_are_named(folder: Path) -> None:
    whole = load_dense(DenseConfig(path=str(folder))).model.state_dict()
    index = shard(folder)
    assert [file.name for file in check(folder)] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = load_dense(DenseConfig(path=str(folder))).model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, r"names 1 missing files: \['model-00002-of-00002.safetensors'\]")
    index.write_text("{}")
    refused(folder, "has no weight_map")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hosts", "sub/x.safetensors", "x.bin"])
def test_row_18_an_index_cannot_name_files_elsewhere_or_pickled_ones(folder: Path, name: str) -> None:
    index = shard(folder)
    edit_json(index, weight_map={"a": name})
    refused(folder, "which is no .safetensors file in its own folder", allow_pickle=True)


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret"])
def test_row_18_links_that_lead_outside_are_refused(folder: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "extra.json").symlink_to(target)
    refused(folder, "extra.json' leads to .*, outside of")


def test_row_18_linked_folders_and_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "model.safetensors' leads to")
    (folder / "model.safetensors").unlink()
    (folder / "sub").symlink_to(tmp_path)
    refused(folder, "sub' leads to")


def test_row_18_a_link_to_the_whole_folder_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert check(tmp_path / "link")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sub/extra"])
def test_row_18_a_fifo_is_refused_and_not_opened(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused(folder, "is not a regular file")


def test_row_18_a_link_to_nothing_is_refused(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to("gone")
    refused(folder, "tokenizer.model' is not a regular file, or leads to none")


# --- the hub ---------------------------------------------------------------------------------------------


def add_to_cache(cache: Path, source: Path, commit: str, *, ref: str | None) -> Path:
    """A snapshot as the hub's own client lays it out: links to blobs that are named by their hash."""
    root = cache / "models--org--tiny"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        is_large = file.suffix == ".safetensors"
        blob = root / "blobs" / (file_sha256(file) if is_large else file_sha256(file)[:40])
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if ref:
        (root / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to connect fails, and is listed."""
    attempts: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError(errno.ENETUNREACH, "network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: connect(None, args))
    return attempts


@pytest.fixture
def offline_cache(
    tmp_path: Path, tiny_checkpoint: Path, no_network: list, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """HF_HUB_OFFLINE=1 and a cache that holds org/tiny at one commit, under `main`."""
    cache = tmp_path / "hub"
    add_to_cache(cache, tiny_checkpoint, COMMITS[0], ref="main")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    return cache


def test_row_16_offline_the_cache_answers_without_a_call(
    offline_cache: Path, tiny_checkpoint: Path, no_network: list
) -> None:
    loaded = load_dense(DenseConfig(path="org/tiny"))
    assert loaded.name == "org/tiny"
    assert loaded.facts["commit"] == COMMITS[0]
    assert loaded.sha256 == load_dense(DenseConfig(path=str(tiny_checkpoint))).sha256
    assert not no_network


def test_row_15_a_branch_is_resolved_to_its_commit_and_a_moved_one_has_another_hash(
    offline_cache: Path, folder: Path
) -> None:
    before = load_dense(DenseConfig(path="org/tiny", revision="main"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    add_to_cache(offline_cache, folder, COMMITS[1], ref="main")
    after = load_dense(DenseConfig(path="org/tiny", revision="main"))
    assert (before.facts["commit"], after.facts["commit"]) == COMMITS
    assert before.sha256 != after.sha256
    pinned = load_dense(DenseConfig(path="org/tiny", revision=COMMITS[0]))
    assert pinned.sha256 == before.sha256


def test_a_snapshot_folder_knows_its_commit(offline_cache: Path) -> None:
    snapshot = offline_cache / "models--org--tiny" / "snapshots" / COMMITS[0]
    folder = resolve_folder(DenseConfig(path=str(snapshot)))
    assert folder == Folder(snapshot, COMMITS[0], "org/tiny")
    assert folder.base_name == "tiny"


def test_a_revision_of_a_plain_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="dense.revision 'main' is for hub ids"):
        resolve_folder(DenseConfig(path=str(folder), revision="main"))


def test_row_17_a_changed_blob_is_named(offline_cache: Path) -> None:
    blob = next(p for p in (offline_cache / "models--org--tiny" / "blobs").iterdir() if len(p.name) == 64)
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    with pytest.raises(InputError, match=f"{blob.name}' in the hub cache has changed .* delete that file"):
        load_dense(DenseConfig(path="org/tiny"))


def test_row_18_a_snapshot_cannot_link_out_of_its_model(offline_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "hub" / "secret.json").write_text("{}")
    snapshot = offline_cache / "models--org--tiny" / "snapshots" / COMMITS[0]
    (snapshot / "extra.json").symlink_to(tmp_path / "hub" / "secret.json")
    with pytest.raises(InputError, match="outside of '.*models--org--tiny'"):
        load_dense(DenseConfig(path="org/tiny"))


@pytest.mark.parametrize("settings", [{"path": "org/none"}, {"path": "org/tiny", "revision": "dev"}])
def test_row_16_offline_and_not_cached(offline_cache: Path, no_network: list, settings: dict) -> None:
    with pytest.raises(InputError, match="not whole in the cache '.*hub'; unset HF_HUB_OFFLINE") as error:
        load_dense(DenseConfig(**settings))
    assert "\n" not in str(error.value)
    assert not no_network


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, set()),
        ({"allow_pickle": True}, {"pytorch_model.bin"}),
        ({"trust_remote_code": True}, {"modeling_x.py"}),
    ],
)
def test_only_what_is_needed_is_fetched(settings: dict[str, bool], wanted: set[str]) -> None:
    always = {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "model-00001-of-00002.safetensors", "merges.txt", "tokenizer.model", "chat_template.jinja",
    }  # fmt: skip
    never = {
        "onnx/config.json", "original/params.json", "consolidated.safetensors", "tf_model.h5", "x.gguf",
        "evil.sh", "training_args.pt",
    }  # fmt: skip
    both = {"pytorch_model.bin", "modeling_x.py"}
    patterns = file_patterns(DenseConfig(path="org/name", **settings))
    fetched = filter_repo_objects(always | never | both, **patterns)
    assert set(fetched) == always | wanted


class Hub(BaseHTTPRequestHandler):
    """A hub whose answer stands in the model's name: org/<status>[-<error code>]."""

    def do_GET(self) -> None:
        name = next(part for part in self.path.split("/") if part[:3].isdigit())
        status, _, code = name.partition("-")
        self.send_response(int(status))
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real server on this machine in the hub's place, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", address)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("403-GatedRepo", "is gated: accept its terms on {page} and set HF_TOKEN"),
        ("401-RepoNotFound", "no hub model of that name that you may read; check {page}, and set HF_TOKEN"),
        ("401", "check {page}, and set HF_TOKEN"),
        ("404-RepoNotFound", "no folder '{name}' here, and no hub model of that name"),
        ("404-RevisionNotFound", "has no revision 'v9'; see {page}/commits"),
        ("429", "limits your requests .429."),
        ("503", "the hub answered 503 for {page}; try again later"),
    ],
)
def test_row_16_what_the_hub_answers_becomes_what_to_do(hub: str, name: str, message: str) -> None:
    name = f"org/{name}"
    with pytest.raises(InputError, match=message.format(name=name, page=f"{hub}/{name}")) as error:
        resolve_folder(DenseConfig(path=name, revision="v9"))
    assert "\n" not in str(error.value)


def test_row_16_without_a_connection(hub: str, no_network: list) -> None:
    with pytest.raises(InputError, match="cannot be fetched .*; check the connection, or give a folder"):
        resolve_folder(DenseConfig(path="org/any"))
    assert no_network


def test_a_missing_folder_is_no_hub_id(no_network: list, tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "none", "./org/none", "a/b/c"):
        with pytest.raises(InputError, match="no config.json in"):
            load_dense(DenseConfig(path=path))
    assert not no_network
