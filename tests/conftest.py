"""Small models and checkpoints made in memory, seeded, for every test."""

import os


def take_own_cores() -> None:
    """Give each worker of pytest-xdist its share of the cores, before torch counts them.

    Workers that all use all cores take longer than one after the other; recipes started by tests inherit it.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        workers, cores = int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), sorted(os.sched_getaffinity(0))
        if workers <= len(cores):
            os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])


take_own_cores()

# ruff: noqa: E402
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bridges.dense import DenseModel
from extractor.student import Student, StudentConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_DENSE = ROOT / "recipes" / "python" / "dense"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Blocks and rotations of tests stay out of the user's cache; recipes started by tests inherit it."""
    os.environ["SPARSEBRIDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny_gpt2(**changes: object) -> GPT2LMHeadModel:
    """Two layers of 32 channels with every weight, gain and bias away from its default."""
    settings = {
        "vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(**(settings | changes))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num(1)
            )
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def dense() -> DenseModel:
    return DenseModel(tiny_gpt2())


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 97, (3, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def student() -> Student:
    return Student(tiny_student_config()).eval()


def tiny_student_config(**changes: object) -> StudentConfig:
    settings = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 32,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    return StudentConfig(**(settings | changes))


@pytest.fixture(scope="session")
def shipped_tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED_DENSE)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, shipped_tokenizer) -> Path:
    """An untrained GPT-2 folder with the shipped tokenizer: what a recipe can start from in seconds."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_gpt2(vocab_size=len(shipped_tokenizer), n_positions=128).save_pretrained(folder)
    shipped_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_checkpoint(tmp_path_factory: pytest.TempPathFactory, shipped_tokenizer) -> Path:
    """An untrained Llama folder with a padded vocabulary and widths that bitsandbytes has kernels for."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(shipped_tokenizer) + 16, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    shipped_tokenizer.save_pretrained(folder)
    return folder
