"""Text and checkpoints: splits that never overlap, tokens cut once, batches by step, whole files."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from extractor.artifacts import (
    fingerprint,
    read_json,
    replace_folder,
    update_manifest,
    write_json,
)
from extractor.checkpoints import load_checkpoint, save_checkpoint
from extractor.data import DataConfig, TokenBlocks, load_blocks, load_spread
from extractor.errors import InputError
from extractor.sources import FileOrigin
from extractor.student import Student
from extractor.text import describe_data, iter_texts
from tests.conftest import ROOT, SHIPPED_DENSE, tiny_gpt2, tiny_student_config


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPARSEBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


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
    documents = FileOrigin(config.sources[0], config.max_document_bytes).documents
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
        list(iter_texts(DataConfig(source=str(tmp_path / "nowhere")), "train", 0))
    with pytest.raises(InputError, match="no file matching"):
        list(iter_texts(DataConfig(source=str(tmp_path)), "train", 0))
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


# --- data sets and mixtures --------------------------------------------------------------------------------


def documents(tag: str, count: int, lines: int = 6) -> list[str]:
    return [f"{tag}_{i} = {i}\n" + f"def {tag}{i}(x):\n    return x + {i}\n" * lines for i in range(count)]


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    """The same three hundred documents as parquet, jsonl and a folder, and others as text."""
    texts, folder = documents("alpha", 300), tmp_path / "folder"
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03}.md").write_text(text)
    paths = {kind: tmp_path / f"a.{kind}" for kind in ("parquet", "jsonl", "txt")} | {"folder": folder}
    rows = [{"id": index, "body": text} for index, text in enumerate(texts)]
    datasets.Dataset.from_list(rows).to_parquet(paths["parquet"])
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths["txt"].write_text("".join(f"line {i} of a text, one document\n" for i in range(400)))
    return paths


def mixture(*sources: dict, **settings) -> DataConfig:
    return DataConfig(datasets=sources, **({"context_length": 16, "held_out_frac": 0.2} | settings))


def rows_of(path: Path, **settings) -> dict:
    return {"path": str(path), "text_column": "body" if path.suffix != ".txt" else "text"} | settings


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_streaming_gives_the_same_blocks(kind: str, corpora, shipped_tokenizer) -> None:
    for split in ("train", "held_out"):
        stored, streamed = (
            load_blocks(
                mixture(rows_of(corpora[kind], streaming=streaming)),
                shipped_tokenizer, split, max_tokens=3000,
            )
            for streaming in (False, True)
        )  # fmt: skip
        assert stored.digest == streamed.digest
        assert np.array_equal(stored.blocks, streamed.blocks)


def test_a_mixture_keeps_its_shares_of_tokens(corpora, shipped_tokenizer) -> None:
    config = mixture(
        rows_of(corpora["parquet"], weight=6),
        rows_of(corpora["txt"], weight=3, streaming=True),
        {"path": "python", "weight": 1},
    )
    blocks = load_blocks(config, shipped_tokenizer, "train", max_tokens=12_000)
    shares = [member["share"] for member in blocks.facts["sources"]]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] + shares[1] < 0.95  # python documents are long: the first is more than its share
    assert shares[0] / shares[1] == pytest.approx(2, rel=0.05)
    assert blocks.facts["documents"] == sum(member["documents"] for member in blocks.facts["sources"])


def test_a_source_that_runs_out_is_repeated_only_if_asked(corpora, tmp_path, shipped_tokenizer) -> None:
    (tmp_path / "small.txt").write_text("".join(f"a small source, row {i}\n" for i in range(60)))
    small, large = rows_of(tmp_path / "small.txt"), rows_of(corpora["parquet"])

    def facts(**settings) -> tuple[dict, str]:
        config = mixture(small | settings, large)
        blocks = load_blocks(config, shipped_tokenizer, "train", max_tokens=8000)
        return blocks.facts["sources"][0], blocks.summary()

    once, line = facts()
    assert once["ran_out"]
    assert once["passes"] == 1
    assert once["share"] < 0.2
    assert "small.txt" in line
    assert "ran out" in line
    repeated, line = facts(repeat=True)
    assert repeated["passes"] > 2
    assert repeated["share"] == pytest.approx(0.5, abs=0.02)
    assert f"{repeated['passes']} passes" in line


def test_no_text_is_on_both_sides_of_a_mixture(corpora) -> None:
    """The folder, the parquet and the jsonl file hold the same documents."""
    config = mixture(
        rows_of(corpora["parquet"]),
        rows_of(corpora["jsonl"]),
        {"path": str(corpora["folder"]), "pattern": "*.md"},
        rows_of(corpora["txt"]),
    )
    train, held_out = (list(iter_texts(config, split, 0)) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == len(set(train) | set(held_out)) == 700
    assert 0.1 < len(held_out) / 700 < 0.3
    reordered = mixture(*reversed(config.datasets))
    assert set(iter_texts(reordered, "held_out", 5)) == set(held_out)


def test_an_own_held_out_source_is_not_trained_on(corpora, tmp_path, shipped_tokenizer) -> None:
    texts = documents("alpha", 320)[290:]  # the last ten of the folder, and twenty others
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(
        source=str(corpora["folder"]), pattern="*.md", held_out=str(tmp_path / "own.jsonl"), context_length=16
    )
    train = list(iter_texts(config, "train", 0))
    assert len(train) == 290
    assert sorted(iter_texts(config, "held_out", 0)) == sorted(texts)
    blocks = load_blocks(config, shipped_tokenizer, "train", max_tokens=10**6)
    assert blocks.facts["sources"][0]["left_out"] == {"also_held_out": 10}


@pytest.mark.parametrize(
    ("count", "chosen"), [(4, [0, 2, 5, 7]), (1, [0]), (10, list(range(10))), (99, list(range(10)))]
)
def test_a_sample_is_spread_over_the_text(count: int, chosen: list[int]) -> None:
    blocks = TokenBlocks(np.arange(10, dtype=np.int32)[:, None], "none")
    assert blocks.sample(count)[0].flatten().tolist() == chosen


def test_text_to_sample_from_is_of_many_documents(corpus: DataConfig, shipped_tokenizer) -> None:
    few = load_blocks(corpus, shipped_tokenizer, "train", max_tokens=2 * corpus.context_length)
    many = load_spread(corpus, shipped_tokenizer, "train", 2)
    assert len(few) == 2
    assert len(many) == 2 * 32
    assert not torch.equal(many.sample(2)[0], few.first(2))
    assert len(load_spread(corpus, shipped_tokenizer, "held_out", 10_000)) < 10_000  # all there is


def test_held_out_blocks_that_are_training_blocks_are_dropped() -> None:
    train = TokenBlocks(np.arange(40, dtype=np.int32).reshape(10, 4), "t")
    mixed = TokenBlocks(np.concatenate([train.blocks[3:5], train.blocks[:2] + 1]), "h")
    apart = mixed.apart_from(train)
    assert np.array_equal(apart.blocks, train.blocks[:2] + 1)
    assert apart.facts["blocks_also_in_training"] == 2
    assert apart.apart_from(train).facts["blocks_also_in_training"] == 0
    with pytest.raises(InputError, match="all 10 held-out blocks are training blocks"):
        train.apart_from(train)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b'{"other": "x"}\n', {}, "has no column 'text'; its columns: other"),
        (b'{"text": 3}\n', {}, "holds int, not text"),
        (b'{"text": "x"\n', {}, "is not read: .*JSON"),
        (b'{"text": "\xff\xfe"}\n', {}, "is not read: 'utf-8' codec"),
        (b'{"text": "\\ud800"}\n', {}, "surrogate"),
        (b"", {}, r"\(split train\) is empty"),
        (b'{"text": ""}\n{"text": null}\n', {}, "0 train tokens are fewer than one block .*2 empty"),
        (b'{"text": "one document"}\n', {}, "fewer than one block of 16"),
        (b'{"text": "xxxxxxxxxxxx"}\n' * 9, {"max_document_bytes": 8}, "9 too long"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_refused_in_one_line(
    content, settings, message, streaming, tmp_path, shipped_tokenizer
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    config = mixture({"path": str(tmp_path / "bad.jsonl"), "streaming": streaming}, **settings)
    with pytest.raises(InputError, match=message) as error:
        load_blocks(config, shipped_tokenizer, "train", max_tokens=1000)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_missing_sources_are_refused_in_one_line(tmp_path, corpora, shipped_tokenizer, monkeypatch) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('run')\n")
    refused = {
        "Dataset scripts are no longer supported": {"path": str(tmp_path / "script")},
        "there is no file or folder": {"path": str(tmp_path / "nowhere")},
        "is none of .parquet, .jsonl": {"path": str(tmp_path / "script" / "script.py")},
        "Bad split: validation": rows_of(corpora["parquet"], split="validation", streaming=True),
        "no file matching": {"path": str(corpora["folder"]), "pattern": "*.zip"},
    }
    for message, source in refused.items():
        with pytest.raises(InputError, match=message):
            load_blocks(mixture(source), shipped_tokenizer, "train", max_tokens=1000)
    with pytest.raises(ValueError, match="put 'folder' into the list"):
        DataConfig(source="folder", datasets=["python"])


def test_all_files_too_long_and_too_long_a_context(corpus: DataConfig, shipped_tokenizer) -> None:
    with pytest.raises(InputError, match="all 120 files in .* longer than data.max_document_bytes"):
        list(iter_texts(corpus.model_copy(update={"max_document_bytes": 3}), "train", 0))
    with pytest.raises(InputError, match="16 is longer than the model's 8 positions"):
        load_blocks(corpus, shipped_tokenizer, "train", max_tokens=1000, max_context=8)


def test_odd_bytes_are_kept_and_long_files_counted(tmp_path, shipped_tokenizer) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for index, text in enumerate(documents("gamma", 40)):
        (folder / f"{index}.txt").write_text(text)
    (folder / "nul.txt").write_bytes(b"a\0b\n" * 9)
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 9)
    (folder / "line.txt").write_bytes(b"x " * 500_000)
    (folder / "empty.txt").write_bytes(b"")
    config = mixture({"path": str(folder), "pattern": "*"}, held_out_frac=1e-9)
    texts = set(iter_texts(config, "train", 0))
    assert {"a\0b\n" * 9, "caf\N{REPLACEMENT CHARACTER}\n" * 9} <= texts
    assert len(texts) == 42
    blocks = load_blocks(config, shipped_tokenizer, "train", max_tokens=10**6)
    assert blocks.facts["sources"][0]["left_out"] == {"empty": 1, "too_long": 1}
    longer = config.model_copy(update={"max_document_bytes": 2_000_000})
    assert "x " * 500_000 in set(iter_texts(longer, "train", 0))


def test_a_plan_names_the_sources_without_opening_them() -> None:
    config = mixture(
        {"path": "no/such", "weight": 3, "streaming": True, "text_column": "body"},
        {"path": "/nowhere", "pattern": "*.md", "repeat": True},
        separate_documents=True,
    )
    line = describe_data(config)
    assert line == (
        "text: 'no/such' (split train, column body, streaming, 75%), '/nowhere' (*.md, repeated, 25%); "
        "20.0% of the documents held out by the hash of the text; blocks of 16 tokens, documents kept apart"
    )
    assert describe_data(DataConfig()).startswith(
        "text: python; 3.0% of the documents held out by the hash of"
    )


# --- tokenised once ----------------------------------------------------------------------------------------


def test_blocks_are_read_from_the_cache(corpora, shipped_tokenizer, tmp_path) -> None:
    config = mixture(rows_of(corpora["parquet"]))
    first = load_blocks(config, shipped_tokenizer, "train", max_tokens=2000)
    path = next((tmp_path / "cache" / "tokens").glob("*/tokens.bin"))
    written = path.stat().st_mtime_ns
    again = load_blocks(config, shipped_tokenizer, "train", max_tokens=2000)
    assert isinstance(again.blocks, np.memmap)
    assert np.array_equal(first.blocks, again.blocks)
    assert again.facts == first.facts
    assert path.stat().st_mtime_ns == written
    apart = load_blocks(
        config.model_copy(update={"separate_documents": True}), shipped_tokenizer, "train", max_tokens=2000
    )
    assert apart.blocks.filename == again.blocks.filename  # packing changes positions, not blocks


def test_what_changes_the_blocks_changes_the_cache(corpora, shipped_tokenizer, tmp_path) -> None:
    config = DataConfig(source=str(corpora["folder"]), pattern="*.md", context_length=16, held_out_frac=0.2)

    def entries() -> int:
        load_blocks(config, shipped_tokenizer, "train", max_tokens=2000)
        return len(list((tmp_path / "cache" / "tokens").glob("*/facts.json")))

    assert entries() == entries() == 1
    changed = corpora["folder"] / "007.md"
    changed.write_text("# another text of another size\n")
    assert entries() == 2
    os.utime(changed, ns=(1, 1))
    assert entries() == 3
    load_blocks(config, shipped_tokenizer, "train", max_tokens=1000)
    load_blocks(config, shipped_tokenizer, "held_out", max_tokens=1000)
    assert entries() == 5


@pytest.mark.parametrize("damage", ["flipped", "short", "facts", "no facts"])
def test_damaged_tokens_are_made_again(damage: str, corpora, shipped_tokenizer, tmp_path) -> None:
    config = mixture(rows_of(corpora["jsonl"]))
    first = np.array(load_blocks(config, shipped_tokenizer, "train", max_tokens=2000).blocks)
    folder = next((tmp_path / "cache" / "tokens").glob("*/tokens.bin")).parent
    content = (folder / "tokens.bin").read_bytes()
    if damage == "flipped":
        (folder / "tokens.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "short":
        (folder / "tokens.bin").write_bytes(content[:-4])
    elif damage == "facts":
        (folder / "facts.json").write_text("{")
    else:
        (folder / "facts.json").unlink()
    with pytest.warns(UserWarning, match="are damaged and are made again"):
        again = load_blocks(config, shipped_tokenizer, "train", max_tokens=2000)
    assert np.array_equal(again.blocks, first)


TOKENISE = """
import sys
from transformers import AutoTokenizer
from extractor.data import DataConfig, load_blocks
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print("started", flush=True)
print(load_blocks(DataConfig(), tokenizer, "train", max_tokens=int(sys.argv[2])).digest, flush=True)
"""


def test_a_killed_write_is_invisible_and_starts_again(tmp_path) -> None:
    tokens, script = tmp_path / "cache" / "tokens", tmp_path / "tokenise.py"
    script.write_text(TOKENISE)

    def start(max_tokens: int) -> subprocess.Popen:
        command = [sys.executable, str(script), str(SHIPPED_DENSE), str(max_tokens)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)

    killed = start(1_500_000)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tokens.glob(".tmp-*/tokens.bin")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not [path for path in tokens.iterdir() if not path.name.startswith(".")]
    both = [start(1_500_000) for _ in range(2)]  # one writes, the other waits for it
    digests = {process.communicate(timeout=300)[0].split()[1] for process in both}
    assert len(digests) == 1
    assert len([path for path in tokens.iterdir() if not path.name.startswith(".lock")]) == 1


def test_without_a_cache_folder_the_blocks_are_the_same(
    corpora, shipped_tokenizer, monkeypatch, tmp_path
) -> None:
    config = mixture(rows_of(corpora["parquet"]))
    first = load_blocks(config, shipped_tokenizer, "train", max_tokens=2000)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SPARSEBRIDGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="tokens are not cached"):
        other = load_blocks(config, shipped_tokenizer, "train", max_tokens=2000)
    assert np.array_equal(first.blocks, other.blocks)
    assert torch.equal(first.batch(step=1, size=4, seed=0), other.batch(step=1, size=4, seed=0))


def test_the_shipped_corpus_is_cut_as_in_the_first_release(shipped_tokenizer) -> None:
    """Text and blocks of `source: python` by the rules that the figures of the README rest on."""
    config = DataConfig()
    texts = iter_texts(config, "train", 0)
    batch = [text for text, _ in zip(texts, range(64), strict=False)]
    end = shipped_tokenizer.eos_token_id
    ids = [t for row in shipped_tokenizer(batch, add_special_tokens=False)["input_ids"] for t in [*row, end]]
    blocks = load_blocks(config, shipped_tokenizer, "train", max_tokens=20_000)
    assert blocks.blocks.ravel().tolist() == ids[: 20_000 // 128 * 128]
    assert blocks.digest == hashlib.sha256("".join(batch).encode()).hexdigest()


# --- documents kept apart ----------------------------------------------------------------------------------


def test_positions_start_again_at_every_document() -> None:
    ids = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 5, 5, 5, 5, 5, 0]])
    blocks = TokenBlocks(ids.numpy().astype(np.int32), "x", end_of_text=0)
    expected = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]])
    assert torch.equal(blocks.positions(ids), expected)
    assert TokenBlocks(blocks.blocks, "x").positions(ids) is None


def llama() -> LlamaForCausalLM:
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, initializer_range=0.3, **widths)).eval()


@pytest.mark.parametrize(
    "make",
    [
        llama,
        tiny_gpt2,
        lambda: Student(tiny_student_config()).eval(),
        lambda: Student(tiny_student_config(position_embedding_type="learned")).eval(),
    ],
    ids=["llama", "gpt2", "student", "student-learned"],
)
@torch.no_grad()
def test_packed_documents_do_not_see_one_another(make) -> None:
    model = make()
    ids = torch.randint(1, 97, (3, 24))
    ids[0, [7, 15]] = ids[1, [0, 1, 20]] = 0  # and a row of one document
    positions = TokenBlocks(ids.numpy(), "x", end_of_text=0).positions(ids)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    joined = model(ids, use_cache=False).logits
    for row in range(3):
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), 24]
        for start, end in zip(starts, starts[1:], strict=False):
            alone = model(ids[row : row + 1, start:end], use_cache=False).logits[0]
            assert (packed[row, start:end] - alone).abs().max() < 1e-5
            assert row or not start or (joined[row, start:end] - alone).abs().max() > 1e-2


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
    save_checkpoint(tmp_path, other, other_optimizer, 9)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-9"}  # two are kept
