"""The same train step in PyTorch, compiled, with its fused attention: what `step_time.py` and `gpu.py` run beside ours.

A process of its own, because PyTorch and JAX in one process share cores badly: it reads a line, runs some steps, and
writes CPU and clock milliseconds a step. Arguments: the sizes (JSON, see `SIZES`) and the steps of a turn.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

SIZES = {
    "layers": 4, "embed": 128, "heads": 4, "kv_heads": 4, "head_size": 32, "mlp": 512, "vocabulary": 2048,
    "positions": 1024, "length": 128, "batch": 16, "documents": 3, "llama": False, "device": "cpu",
}  # fmt: skip
"""Defaults. `documents` in a row; one needs no mask but the causal one. `llama`: RMSNorm, rotary positions, a gated
mlp and no biases; else GPT-2. On "cuda" matmuls are bfloat16, on "cpu" float32."""


class Block(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        embed, mlp, llama = sizes["embed"], sizes["mlp"], sizes["llama"]
        self.heads, self.kv_heads, self.size = sizes["heads"], sizes["kv_heads"], sizes["head_size"]
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.attention_norm, self.mlp_norm = norm(embed, eps=1e-5), norm(embed, eps=1e-5)
        self.qkv = nn.Linear(embed, (self.heads + 2 * self.kv_heads) * self.size, bias=not llama)
        self.output = nn.Linear(self.heads * self.size, embed, bias=not llama)
        self.up, self.down = nn.Linear(embed, mlp, bias=not llama), nn.Linear(mlp, embed, bias=not llama)
        self.gate = nn.Linear(embed, mlp, bias=False) if llama else None

    def forward(self, x, seen, turn):
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        grouped = self.heads != self.kv_heads
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped)
        x = x + self.output(o.transpose(1, 2).reshape(batch, length, -1))
        h = self.mlp_norm(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gate else F.gelu(self.up(h), approximate="tanh")
        return x + self.down(h)


class Decoder(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        embed = sizes["embed"]
        self.size, self.packed = sizes["head_size"], sizes["documents"] > 1
        self.tokens = nn.Embedding(sizes["vocabulary"], embed)
        self.positions = None if sizes["llama"] else nn.Embedding(sizes["positions"], embed)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes["layers"]))
        self.final_norm = nn.RMSNorm(embed, eps=1e-5) if sizes["llama"] else nn.LayerNorm(embed)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, batch):
        segments, seen, turn = batch["segment_ids"], None, None
        if self.packed:
            causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
            seen = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
        x = self.tokens(batch["tokens"])
        if self.positions is None:
            frequencies = 500000 ** -(torch.arange(0, self.size, 2, device=x.device) / self.size)
            angles = (batch["positions"][:, None, :, None] * frequencies).float()
            turn = angles.cos(), angles.sin()
        else:
            x = x + self.positions(batch["positions"])
        for block in self.blocks:
            x = block(x, seen, turn)
        logits = F.linear(self.final_norm(x), self.tokens.weight)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")
        mask = batch["loss_mask"].flatten()
        return (losses * mask).sum() / mask.sum()


def rotate(x, turn):
    (cos, sin), (a, b) = turn, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def random_batch(sizes: dict) -> dict[str, torch.Tensor]:
    rows, length = sizes["batch"], sizes["length"]
    tokens = torch.randint(sizes["vocabulary"], (rows, length + 1))
    part = -(-length // sizes["documents"])
    at = torch.arange(length).repeat(rows, 1)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": 1 + at // part,
        "positions": at % part,
        "loss_mask": ((at + 1) % part != 0).float(),
    }
    return {name: x.to(sizes["device"]) for name, x in batch.items()}


def make_step(sizes: dict):
    """A function that trains one step."""
    device = sizes["device"]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, batch = Decoder(sizes).to(device), random_batch(sizes)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "positions" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "positions" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    loss = torch.compile(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main(sizes: dict, steps: int) -> None:
    finish = torch.cuda.synchronize if sizes["device"] == "cuda" else lambda: None
    step = make_step(sizes)
    for _ in range(3):
        step()
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        finish()
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        finish()
        turn = [(time.process_time() - cpu) / steps * 1e3, (time.perf_counter() - clock) / steps * 1e3]
        print(json.dumps(turn), flush=True)


if __name__ == "__main__":
    main(SIZES | json.loads(sys.argv[1]), int(sys.argv[2]))
