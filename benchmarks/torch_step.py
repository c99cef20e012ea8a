"""The same train step in PyTorch, compiled, with its fused attention: what `step_time.py` runs beside the other two.

A process of its own, because PyTorch and JAX in one process share cores badly: it reads a line, runs some steps, and
writes CPU and clock milliseconds a step. Arguments: the sizes (JSON, as `handwritten.Shape`) and the steps of a turn.
"""

import json
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, embed: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.qkv, self.output = nn.Linear(embed, 3 * embed), nn.Linear(embed, embed)
        self.up, self.down = nn.Linear(embed, mlp), nn.Linear(mlp, embed)

    def forward(self, x, seen):
        batch, length, embed = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, embed // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.output(o.transpose(1, 2).reshape(batch, length, embed))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        embed = sizes["embed"]
        self.tokens = nn.Embedding(sizes["vocabulary"], embed)
        self.positions = nn.Embedding(sizes["positions"], embed)
        blocks = [Block(embed, sizes["heads"], sizes["mlp"]) for _ in range(sizes["layers"])]
        self.blocks, self.final_norm = nn.ModuleList(blocks), nn.LayerNorm(embed)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, batch):
        segments = batch["segment_ids"]
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
        x = self.tokens(batch["tokens"]) + self.positions(batch["positions"])
        for block in self.blocks:
            x = block(x, seen)
        logits = F.linear(self.final_norm(x), self.tokens.weight)
        losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        mask = batch["loss_mask"].flatten()
        return (losses * mask).sum() / mask.sum()


def random_batch(sizes: dict) -> dict[str, torch.Tensor]:
    rows, length = sizes["batch"], sizes["length"]
    tokens = torch.randint(sizes["vocabulary"], (rows, length + 1))
    third = math.ceil(length / 3)
    at = torch.arange(length).expand(rows, length)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": 1 + at // third,
        "positions": at % third,
        "loss_mask": ((at + 1) % third != 0).float(),
    }


def main(sizes: dict, steps: int) -> None:
    torch.manual_seed(0)
    model, batch = Decoder(sizes), random_batch(sizes)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "positions" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "positions" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
    loss = torch.compile(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for _ in range(3):
        step()
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        print(json.dumps([(time.process_time() - cpu) / steps * 1e3, (time.perf_counter() - clock) / steps * 1e3]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
