"""Train a small GPT-2-architecture checkpoint on the Python source of this installation.

    accelerate launch recipes/pretrain.py --config recipes/python/pretrain.yaml

Writes an ordinary Hugging Face folder (safetensors, tokenizer, model card). It is how the dense
checkpoint that ships in recipes/python/dense was made. Killed, it resumes from its last checkpoint.
"""

import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bridges.losses import cross_entropy, log_probs
from extractor.artifacts import (
    claim_run_folder,
    replace_folder,
    write_text,
)
from extractor.checkpoints import load_checkpoint, save_checkpoint
from extractor.config import Config, dump_config, run_recipe
from extractor.data import DataConfig, TokenBlocks, load_blocks
from extractor.errors import UsageError
from extractor.machine import fast_fp32, mixed_precision, start_processes, to_device, use_all_cores
from extractor.text import SplitReader, iter_texts

END_OF_TEXT = "<|endoftext|>"
# Words (with underscores), short digit runs and punctuation runs, each with one leading space; white
# space stays whole but for the space that a word takes. As GPT-2's, fitted to source code.
SPLIT_PATTERN = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


class PretrainConfig(Config):
    output_dir: Path = Path("runs/pretrain")
    """Where checkpoints, tokenizer and the finished folder `dense/` go."""
    data: DataConfig = DataConfig(context_length=256)
    vocab_size: int = Field(2048, ge=300)
    """Entries of the byte-level BPE tokenizer trained on the same text."""
    tokenizer_documents: int = Field(3000, ge=1)
    """Documents the tokenizer is trained on."""
    n_layer: int = Field(4, ge=1)
    n_embd: int = Field(256, ge=8)
    n_head: int = Field(8, ge=1)
    max_tokens: int = Field(40_000_000, ge=1)
    """Text read before the first repetition."""
    max_steps: int = Field(9000, ge=1)
    per_device_train_batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    eval_blocks: int = Field(256, ge=1)
    """Held-out blocks for the loss in the model card."""
    save_steps: int = Field(500, ge=1)
    seed: int = 0


def main(config: PretrainConfig) -> None:
    use_all_cores()
    fast_fp32()
    if config.n_embd % config.n_head:
        raise UsageError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    start_processes()
    set_seed(config.seed)
    accelerator = Accelerator(mixed_precision=mixed_precision("auto"), cpu=not torch.cuda.is_available())
    SplitReader(config.data, "train")  # refuse a missing source before anything is written
    claim_run_folder(config.output_dir, dump_config(config), is_writer=accelerator.is_main_process)
    tokenizer = load_or_train_tokenizer(config, accelerator)
    train = load_blocks(config.data, tokenizer, "train", max_tokens=config.max_tokens)
    held_out = load_blocks(config.data, tokenizer, "held_out", max_tokens=2_000_000, apart_from=train)
    accelerator.print(f"{train.summary()}\n{held_out.summary()}")
    model = GPT2LMHeadModel(model_config(config, tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    first_step = load_checkpoint(config.output_dir / "checkpoints", model, optimizer)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    tokens_per_step = config.per_device_train_batch_size * config.data.context_length
    tokens_per_step *= accelerator.num_processes
    accelerator.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {train.num_tokens:,} tokens of "
        f"text, {config.max_steps * tokens_per_step:,} to train on"
    )
    steps = range(first_step, config.max_steps)
    bar = tqdm(steps, desc="pretrain", disable=not accelerator.is_main_process, mininterval=5)
    started = time.monotonic()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = train.batch(
            step=step,
            size=config.per_device_train_batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        )
        batch = to_device(batch, accelerator.device)
        logits = wrapped(batch, position_ids=train.positions(batch), use_cache=False).logits
        loss = cross_entropy(log_probs(logits), batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % config.save_steps == 0 and accelerator.is_main_process:
            save_checkpoint(config.output_dir / "checkpoints", model, optimizer.optimizer, step + 1)
            held_out_loss = evaluate(wrapped, held_out, 32, accelerator.device)
            bar.write(f"step {step + 1}: {held_out_loss:.4f} nats/token held out")
    minutes = (time.monotonic() - started) / 60
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_dense(config, model, tokenizer, held_out, minutes, tokens_per_step)
        accelerator.print(f"dense checkpoint: {config.output_dir / 'dense'}")


def load_or_train_tokenizer(config: PretrainConfig, accelerator: Accelerator) -> PreTrainedTokenizerFast:
    """A byte-level BPE on the training documents; made once, then read from the run folder."""
    folder = config.output_dir / "tokenizer"
    with accelerator.main_process_first():
        if not folder.is_dir():
            replace_folder(folder, lambda target: train_tokenizer(config).save_pretrained(target))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = iter_texts(config.data, "train", config.seed)
    texts = (text for text, _ in zip(texts, range(config.tokenizer_documents), strict=False))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=config.data.context_length,
    )


def model_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.data.context_length,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then linear to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.max_steps - step) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * min(warm, left)


@torch.no_grad()
def evaluate(model: torch.nn.Module, held_out: TokenBlocks, count: int, device: object) -> float:
    """Next-token loss on the first `count` held-out blocks, nats/token."""
    blocks = held_out.first(count).to(device)
    losses = []
    for chunk in blocks.split(16):
        logits = model(chunk, position_ids=held_out.positions(chunk), use_cache=False).logits
        losses.append(cross_entropy(log_probs(logits), chunk).item() * len(chunk))
    return math.fsum(losses) / len(blocks)


def save_dense(
    config: PretrainConfig,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: TokenBlocks,
    minutes: float,
    tokens_per_step: int,
) -> None:
    """The finished checkpoint in bfloat16, with a model card that states its loss as saved."""
    model = model.to("cpu", torch.bfloat16)
    loss = evaluate(model.float(), held_out, config.eval_blocks, "cpu")
    card = MODEL_CARD.format(
        loss=loss,
        tokens=config.max_steps * tokens_per_step,
        minutes=minutes,
        blocks=min(config.eval_blocks, len(held_out)),
        context=config.data.context_length,
        config="\n".join("    " + line for line in dump_config(config).splitlines()),
    )

    def write(target: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_text(target / "README.md", card)

    replace_folder(config.output_dir / "dense", write)


MODEL_CARD = """---
library_name: transformers
tags: [gpt2, python, sparsebridge]
---
# A small GPT-2 on Python source

GPT-2 architecture, trained from random weights by `recipes/pretrain.py` as the example checkpoint of
sparsebridge. It completes Python and is of no use beyond experiments.

- Corpus: the Python source that an installation carries: the standard library and the packages this
  project depends on (`transformers/models` left out, files over the size limit left out).
- Trained on {tokens:,} tokens; {minutes:.0f} minutes in the session that finished it.
- Loss as saved (bfloat16): **{loss:.4f} nats/token** on {blocks} held-out blocks of {context} tokens;
  files are held out by the hash of their names, exact duplicates of held-out files are not trained on.
- Licence: the corpus is under the licences of its packages (PSF-2.0, BSD-3-Clause, Apache-2.0, MIT);
  these weights are released with sparsebridge under Apache-2.0.

Settings:

{config}
"""


if __name__ == "__main__":
    run_recipe(main, PretrainConfig, None)
