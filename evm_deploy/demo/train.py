"""Train the demo checkpoint: `python -m evm_deploy.demo.train [OUT.safetensors]`. Takes a few minutes on two cores.

Data: the 1797 handwritten digits of scikit-learn (8 x 8 grey, from the UCI repository). Two thirds are for training,
one third is held out. The checkpoint contains labels and preprocessing, so that an export needs no flags.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.demo import CHECKPOINT, DIGITS, digits
from evm_deploy.model.efficientvmamba.network import Architecture, EfficientVMamba

SIZE, SEED, EPOCHS, BATCH, PEAK_LR = 64, 7, 40, 64, 3e-3
ARCHITECTURE = Architecture(dim=16, depths=(1, 1, 1, 1), num_classes=10, dt_ranks=(1, 2))
PREPROCESSING = Preprocessing((SIZE, SIZE), crop_pct=1.0)


def write_digits() -> None:
    """Split scikit-learn's digits 2:1 with a fixed seed, and store both parts next to this module."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(SEED).permutation(len(images))
    train, heldout = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    for split, indices in (("train", train), ("heldout", heldout)):
        labels = data.target.astype(np.int64)[indices]
        np.savez_compressed(DIGITS[split], allow_pickle=False, images=images[indices], labels=labels)


def initialise(model: nn.Module, seed: int) -> None:
    """Initialise a network as usual for Mamba: A = -1..-N, dt log-uniform in 1e-3..1e-1, Gaussian projections."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "A_logs":
            p.data = torch.log(torch.arange(1, p.shape[1] + 1)).repeat(p.shape[0], 1)
        elif leaf == "dt_projs_bias":
            dt = torch.exp(torch.rand(p.shape, generator=generator) * math.log(100) + math.log(1e-3))
            p.data = torch.log(torch.expm1(dt))
        elif p.dim() > 1:
            fan_in = p.shape[-1] if leaf != "weight" else p[0].numel()
            p.data = torch.randn(p.shape, generator=generator) / math.sqrt(fan_in)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift images (n, 3, H, W) by small random amounts."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale = uniform(0.2), 1 + uniform(0.12)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, uniform(0.15)], 1), torch.stack([sin, cos, uniform(0.15)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def tensors(split: str) -> tuple[Tensor, Tensor]:
    """Return the preprocessed images of `split`, (n, 3, 64, 64) float32, and their labels."""
    images, labels = digits(split)
    pixels = np.stack([PREPROCESSING.pixels(image) for image in images])
    return torch.from_numpy(PREPROCESSING.normalise(pixels)), torch.from_numpy(labels)


def train() -> tuple[nn.Module, float]:
    """Train from scratch. Returns the model and its top-1 accuracy in percent on the held-out third."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = EfficientVMamba(ARCHITECTURE)
    initialise(model, SEED)
    images, labels = tensors("train")
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, steps)
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for batch in torch.split(order[: len(order) // BATCH * BATCH], BATCH):
            loss = F.cross_entropy(model(augment(images[batch], generator)), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}  loss {loss.item():.3f}", file=sys.stderr)
    return model.eval(), accuracy(model)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the top-1 accuracy in percent on the held-out third."""
    model.eval()
    images, labels = tensors("heldout")
    return float((model(images).argmax(1) == labels).float().mean() * 100)


def main() -> int:
    """Train and save the checkpoint. Returns 0 if the top-1 accuracy is at least 98 %, else 1."""
    from safetensors.torch import save_file

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT
    if not all(path.exists() for path in DIGITS.values()):
        write_digits()
    model, percent = train()
    metadata = {
        "labels": [str(digit) for digit in range(10)],
        "imgsz": SIZE,
        "crop_pct": PREPROCESSING.crop_pct,
        "mean": PREPROCESSING.mean,
        "std": PREPROCESSING.std,
        "interpolation": PREPROCESSING.interpolation,
    }
    save_file(model.state_dict(), out, metadata={"evm_deploy": json.dumps(metadata)})
    print(f"top-1 {percent:.2f} % on the held-out third, saved {out}")
    return 0 if percent >= 98 else 1


if __name__ == "__main__":
    sys.exit(main())
