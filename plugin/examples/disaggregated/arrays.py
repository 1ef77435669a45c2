"""Where the model computes and its cache lies: numpy in host memory, or torch on a GPU. The model is written once for both."""

import numpy as np

from . import Failure


class Numpy:
    """Host memory."""

    kind = "DRAM"
    device = 0
    name = "numpy, host memory"

    def array(self, values):
        return values

    def zeros(self, shape):
        return np.zeros(shape, dtype=np.float32)

    def indices(self, values):
        return np.asarray(values)

    def address(self, memory):
        return memory.ctypes.data

    def wait(self):
        """All that was computed is in memory."""

    def flip(self, block):
        block.view(np.uint8)[...] ^= 0xFF

    def mask(self, scores, where):
        scores[:, where] = -np.inf

    def softmax(self, scores):
        exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return exponents / exponents.sum(axis=-1, keepdims=True)

    def rms(self, matrix):
        return np.sqrt(np.mean(matrix * matrix, axis=-1, keepdims=True) + np.float32(1e-6))

    def sigmoid(self, matrix):
        return 1 / (1 + np.exp(-np.clip(matrix, -60, 60)))

    def concatenate(self, parts):
        return np.concatenate(parts, axis=-1)

    def largest(self, row):
        return int(np.argmax(row))


class Torch:
    """Memory of a GPU. Results are those of the same steps on the same GPU, as the single process makes them."""

    kind = "VRAM"

    def __init__(self, torch, device):
        self.torch = torch
        self.device = device
        self.place = f"cuda:{device}"
        self.name = f"torch on GPU {device}"

    def array(self, values):
        return self.torch.from_numpy(np.ascontiguousarray(values)).to(self.place)

    def zeros(self, shape):
        return self.torch.zeros(shape, dtype=self.torch.float32, device=self.place)

    def indices(self, values):
        return self.torch.as_tensor(values, device=self.place)

    def address(self, memory):
        return memory.data_ptr()

    def wait(self):
        self.torch.cuda.synchronize(self.device)

    def flip(self, block):
        block.view(self.torch.uint8).bitwise_xor_(0xFF)
        self.wait()

    def mask(self, scores, where):
        scores.masked_fill_(self.array(where)[None], float("-inf"))

    def softmax(self, scores):
        return self.torch.softmax(scores, dim=-1)

    def rms(self, matrix):
        return self.torch.sqrt((matrix * matrix).mean(dim=-1, keepdim=True) + 1e-6)

    def sigmoid(self, matrix):
        return self.torch.sigmoid(matrix)

    def concatenate(self, parts):
        return self.torch.cat(parts, dim=-1)

    def largest(self, row):
        return int(self.torch.argmax(row))


def choose(device, gpu=0):
    """`auto` is a GPU where torch is installed and sees one, and numpy otherwise."""
    if device == "cpu":
        return Numpy()
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        why = "torch sees no GPU"
    except (ImportError, AttributeError) as error:
        count, why = 0, f"torch cannot be used ({error})"
    if count == 0:
        if device == "gpu":
            raise Failure(f"--device gpu: {why}")
        return Numpy()
    return Torch(torch, gpu % count)
