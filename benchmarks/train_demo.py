"""Trains the model behind ``onnxshrink demo`` and writes onnxshrink/demo/.

    python -m venv /tmp/train && /tmp/train/bin/pip install '.[bench]'
    /tmp/train/bin/python benchmarks/train_demo.py

Half a minute on one core. The images are scikit-learn's copy (`load_digits`; the package is under the BSD licence) of
the test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998 (CC BY 4.0): 1,797 pictures of 8x8 pixels with 17 grey levels. A seeded permutation parts them in three:

    train         1,169  seen here and nowhere else
    calibration     128  shipped without labels: what a user of onnxshrink would have at hand
    evaluation      500  shipped with labels; never used here, except to state the accuracy at the end

Same versions and processor, same bytes. The network is a small residual one, exported as it was trained, so its
BatchNormalization is still there for the tidy pass to fold.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SEED = 0
EPOCHS = 60
BATCH = 64
CALIBRATION, EVALUATION = 128, 500
FOLDER = Path(__file__).resolve().parents[1] / "onnxshrink" / "demo"


class Digits(nn.Module):
    """8x8 image -> stem, residual block, two convolutions at half resolution, two dense layers -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 32)
        self.block = nn.Sequential(_conv(32, 32), nn.ReLU(), _conv(32, 32))
        self.down = _conv(32, 64, stride=2)
        self.conv = _conv(64, 64)
        self.hidden = nn.Linear(64 * 4 * 4, 32)
        self.logits = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the logits, [batch, 10]."""
        x = functional.relu(self.stem(image))
        x = functional.relu(x + self.block(x))
        x = functional.relu(self.down(x))
        x = functional.relu(self.conv(x))
        x = functional.relu(self.hidden(x.flatten(1)))
        return self.logits(x)


def main() -> None:
    """Trains, exports, and says what was written."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of float sums, and so the bytes, must not depend on the machine's cores
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(SEED).permutation(len(images))
    calibration, evaluation, training = np.split(order, [CALIBRATION, CALIBRATION + EVALUATION])

    model = Digits()
    train(model, torch.from_numpy(images[training]), torch.from_numpy(digits.target[training]))
    path = FOLDER / "digits.onnx"
    export(model.eval(), path)
    accuracy = accuracy_of(path, images[evaluation], digits.target[evaluation])
    describe(path, accuracy)
    np.savez_compressed(FOLDER / "digits_calibration.npz", image=images[calibration])
    np.savez_compressed(
        FOLDER / "digits_evaluation.npz", image=images[evaluation], labels=digits.target[evaluation].astype(np.int64)
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, accuracy {accuracy:.1%}")
    for file in sorted(FOLDER.iterdir()):
        print(f"{file.stat().st_size:>8,} bytes  {file.name}")


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """AdamW with a one-cycle rate; each batch is moved by up to one pixel, since a digit stays a digit."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            top, left = torch.randint(0, 3, (2,)).tolist()
            moved = functional.pad(images[index], (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]
            loss = functional.cross_entropy(model(moved), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def export(model: nn.Module, path: Path) -> None:
    """Writes the network with a free batch size, and its BatchNormalization not yet folded into the convolutions."""
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, 8, 8),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        do_constant_folding=False,
        dynamo=False,  # the older exporter: it needs no onnxscript
        training=torch.onnx.TrainingMode.PRESERVE,
    )


def accuracy_of(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of images whose largest logit is at the label, in ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    return float(np.mean(logits.argmax(axis=1) == labels))


def describe(path: Path, accuracy: float) -> None:
    """Writes into the model's metadata where it comes from and how good it is."""
    model = onnx.load(path)
    onnx.helper.set_model_props(
        model,
        {
            "accuracy": f"{accuracy:.4f}",
            "data": "E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
            "made_by": "benchmarks/train_demo.py",
        },
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


if __name__ == "__main__":
    main()
