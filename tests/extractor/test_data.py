"""Text and checkpoints: splits that never overlap, batches as a function of the step, whole files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from extractor.artifacts import (
    fingerprint,
    load_checkpoint,
    read_json,
    replace_folder,
    save_checkpoint,
    update_manifest,
    write_json,
)
from extractor.data import DataConfig, TokenBlocks, find_documents, iter_texts, load_blocks
from extractor.errors import InputError


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    for index in range(120):
        path = tmp_path / "text" / f"part{index % 3}" / f"{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"value_{index % 100} = {index % 100}\n" * 20)  # 20 files are duplicates
    return DataConfig(source=str(tmp_path / "text"), context_length=16, held_out_frac=0.2)


def test_no_text_is_on_both_sides_and_none_twice(corpus: DataConfig) -> None:
    train = list(iter_texts(corpus, "train", 0))
    held_out = list(iter_texts(corpus, "held_out", 0))
    assert len(train) + len(held_out) == 100
    assert len(set(train) | set(held_out)) == 100
    assert 5 < len(held_out) < 45


def test_python_source_is_found_and_split_by_name() -> None:
    config = DataConfig()
    documents = find_documents(config)
    names = {document.name for document in documents}
    assert {"stdlib/json/decoder.py", "torch/nn/modules/linear.py"} <= names
    assert not any("transformers/models/" in name for name in names)
    held_out = [document for document in documents if document.is_held_out(0.03)]
    assert 0.02 < len(held_out) / len(documents) < 0.04


def test_blocks_are_the_joined_documents(corpus: DataConfig, shipped_tokenizer) -> None:
    blocks = load_blocks(corpus, shipped_tokenizer, "train", max_tokens=2000)
    assert blocks.blocks.shape[1] == 16
    assert blocks.num_tokens <= 2000
    text = shipped_tokenizer.decode(blocks.blocks.ravel().tolist())
    first = next(iter_texts(corpus, "train", 0))
    assert text.startswith(first + "<|endoftext|>")


def test_missing_or_empty_folders_are_refused(tmp_path, shipped_tokenizer) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        find_documents(DataConfig(source=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no file matching"):
        find_documents(DataConfig(source=str(tmp_path)))
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="too few for a held-out share"):
        load_blocks(DataConfig(source=str(tmp_path)), shipped_tokenizer, "train", max_tokens=100)


def test_batches_are_a_function_of_seed_step_and_rank() -> None:
    blocks = TokenBlocks(np.arange(40, dtype=np.int32).reshape(20, 2), "x")
    whole = [blocks.batch(step=s, size=4, seed=3) for s in range(10)]
    for step in range(10):
        halves = [blocks.batch(step=step, size=2, seed=3, rank=r, num_ranks=2) for r in range(2)]
        assert torch.equal(torch.cat(halves), whole[step])
    epochs = [torch.cat(whole[:5]), torch.cat(whole[5:])]
    for epoch in epochs:
        assert torch.equal(epoch[:, 0].sort().values, torch.arange(0, 40, 2))
    assert not torch.equal(*epochs)
    assert not torch.equal(blocks.batch(step=0, size=4, seed=4), whole[0])


# --- artefacts ---------------------------------------------------------------------------------------------


def test_an_interrupted_folder_is_invisible(tmp_path) -> None:
    replace_folder(tmp_path / "f", lambda folder: (folder / "a").write_text("old"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(tmp_path / "f", fail)
    assert (tmp_path / "f" / "a").read_text() == "old"


def test_json_holds_no_nan(tmp_path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_newer_schema_is_refused(tmp_path) -> None:
    write_json(tmp_path / "x.json", {"schema_version": 2})
    with pytest.raises(InputError, match="schema version 2; this release reads 1"):
        read_json(tmp_path / "x.json", "thing", "nobody")


def test_manifest_holds_the_hash_of_every_output(tmp_path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "evaluation.json").write_text("{}")
    outputs = [tmp_path / "student", tmp_path / "evaluation.json"]
    update_manifest(tmp_path, "train", inputs={"x": 1}, outputs=outputs)
    update_manifest(tmp_path, "extract", inputs={}, outputs=[])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["train"]["outputs"]["student/model.safetensors"] == abc
    assert {"train", "extract"} <= set(manifest)


def test_fingerprint_follows_the_weights_only(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert fingerprint(tmp_path) != before


def test_checkpoint_restores_weights_and_optimiser_exactly(tmp_path) -> None:
    def steps(model: torch.nn.Linear, optimizer: torch.optim.AdamW, first: int, last: int) -> None:
        for step in range(first, last):
            data = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model(data).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    model, optimizer = fresh()
    assert load_checkpoint(tmp_path, model, optimizer) == 0
    steps(model, optimizer, 0, 3)
    save_checkpoint(tmp_path, model, optimizer, 3)
    steps(model, optimizer, 3, 6)
    other, other_optimizer = fresh()
    assert load_checkpoint(tmp_path, other, other_optimizer) == 3
    steps(other, other_optimizer, 3, 6)
    assert torch.equal(other.weight, model.weight)
    save_checkpoint(tmp_path, other, other_optimizer, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
