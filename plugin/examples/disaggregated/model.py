"""A small transformer with random weights, and the paged KV cache that it works on."""

import random

import numpy as np

from . import Failure
from .arrays import Numpy

HEADS = 4
WIDTH = 64
HEAD_WIDTH = WIDTH // HEADS
VOCABULARY = 128
BLOCK_POSITIONS = 16
# One block of one layer: the keys and the values of 16 positions, in float32.
BLOCK_SHAPE = (2, BLOCK_POSITIONS, HEADS, HEAD_WIDTH)
BLOCK_BYTES = int(np.prod(BLOCK_SHAPE)) * 4


class PagedCache:
    """The KV cache of one process: numbered blocks, handed out and taken back, all in one piece of memory."""

    def __init__(self, layers, block_ids, seed, arrays=None):
        self.layers = layers
        self.count = max(block_ids) + 1
        self.arrays = arrays or Numpy()
        self.memory = self.arrays.zeros((layers, self.count, *BLOCK_SHAPE))
        self.bytes = layers * self.count * BLOCK_BYTES
        self.arrays.wait()
        # Shuffled, so that the blocks of a sequence lie scattered as they do after a while in a real server.
        self.free = list(block_ids)
        random.Random(seed).shuffle(self.free)

    def take(self, count):
        if count > len(self.free):
            raise Failure(f"{count} blocks are needed and {len(self.free)} are free")
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give_back(self, blocks):
        self.free.extend(blocks)

    def store(self, layer, blocks, first_position, keys, values):
        positions = first_position + np.arange(len(keys))
        block = self.arrays.indices(np.asarray(blocks)[positions // BLOCK_POSITIONS])
        place = self.arrays.indices(positions % BLOCK_POSITIONS)
        self.memory[layer, block, 0, place] = keys
        self.memory[layer, block, 1, place] = values

    def load(self, layer, blocks, length):
        """Keys and values of the positions before `length`, each of shape (head, position, head width)."""
        pages = self.memory[layer, self.arrays.indices(blocks)].swapaxes(0, 1).reshape(2, -1, HEADS, HEAD_WIDTH)
        return pages[:, :length].swapaxes(1, 2)

    def descriptors(self):
        """What NIXL calls a descriptor list: address, length and device of every block, layer by layer."""
        return block_descriptors(self.address(), self.layers, self.count, self.arrays.device)

    def address(self):
        return self.arrays.address(self.memory)

    def corrupt(self, layer, block):
        self.arrays.flip(self.memory[layer, block])


def block_descriptors(address, layers, blocks, device=0):
    table = np.zeros((layers * blocks, 3), dtype=np.uint64)
    table[:, 0] = address + np.arange(layers * blocks, dtype=np.uint64) * BLOCK_BYTES
    table[:, 1] = BLOCK_BYTES
    table[:, 2] = device
    return table


def descriptor_indices(blocks, layers, blocks_in_cache):
    """The rows of such a list that belong to these blocks."""
    return [layer * blocks_in_cache + block for layer in range(layers) for block in blocks]


def blocks_for(positions):
    return -(-positions // BLOCK_POSITIONS)


class Transformer:
    """A decoder-only transformer: RMS norm, rotary positions, attention over a paged cache, a gated layer."""

    def __init__(self, layers, seed, arrays=None):
        self.arrays = arrays or Numpy()
        random_numbers = np.random.default_rng(seed)

        def matrix(rows, columns, gain=1.0):
            values = random_numbers.standard_normal((rows, columns)) * gain / np.sqrt(rows)
            return self.arrays.array(values.astype(np.float32))

        self.embedding = matrix(VOCABULARY, WIDTH, gain=np.sqrt(VOCABULARY))
        # Sharp attention with a heavy share in the output: what comes next hangs on what the cache holds.
        self.layers = [
            {
                "query": matrix(WIDTH, WIDTH, gain=2.0),
                "key": matrix(WIDTH, WIDTH, gain=2.0),
                "value": matrix(WIDTH, WIDTH, gain=2.0),
                "output": matrix(WIDTH, WIDTH, gain=2.0),
                "gate": matrix(WIDTH, 4 * WIDTH),
                "up": matrix(WIDTH, 4 * WIDTH),
                "down": matrix(4 * WIDTH, WIDTH),
            }
            for _ in range(layers)
        ]
        self.unembedding = matrix(WIDTH, VOCABULARY)
        self.positions_computed = 0

    def forward(self, tokens, first_position, cache, blocks):
        """Runs the tokens, which begin at `first_position`, over the cache; returns the most likely next token."""
        self.positions_computed += len(tokens)
        length = first_position + len(tokens)
        positions = np.arange(first_position, length)
        arrays = self.arrays
        hidden = self.embedding[arrays.indices(tokens)]
        for index, weights in enumerate(self.layers):
            normed = hidden / arrays.rms(hidden)
            keys = self.rotate(split_heads(normed @ weights["key"]), positions)
            cache.store(index, blocks, first_position, keys, split_heads(normed @ weights["value"]))
            all_keys, all_values = cache.load(index, blocks, length)
            queries = self.rotate(split_heads(normed @ weights["query"]), positions).swapaxes(0, 1)
            scores = queries @ all_keys.swapaxes(1, 2) / float(np.sqrt(HEAD_WIDTH))
            arrays.mask(scores, np.arange(length)[None, :] > positions[:, None])
            mixed = arrays.softmax(scores) @ all_values
            hidden = hidden + mixed.swapaxes(0, 1).reshape(len(tokens), WIDTH) @ weights["output"]
            normed = hidden / arrays.rms(hidden)
            gate = normed @ weights["gate"]
            hidden = hidden + (gate * arrays.sigmoid(gate) * (normed @ weights["up"])) @ weights["down"]
        last = hidden[-1:] / arrays.rms(hidden[-1:])
        return arrays.largest(last @ self.unembedding)

    def rotate(self, vectors, positions):
        half = HEAD_WIDTH // 2
        angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        parts = (part.astype(np.float32)[:, None, :] for part in (np.cos(angles), np.sin(angles)))
        cosine, sine = map(self.arrays.array, parts)
        first, second = vectors[..., :half], vectors[..., half:]
        return self.arrays.concatenate([first * cosine - second * sine, first * sine + second * cosine])


def split_heads(matrix):
    return matrix.reshape(len(matrix), HEADS, HEAD_WIDTH)


def prefill(model, prompt, cache):
    """Fills blocks with all of the prompt but its last token, which the first decode step runs."""
    blocks = cache.take(blocks_for(len(prompt) - 1))
    model.forward(prompt[:-1], 0, cache, blocks)
    # Nobody waits for a kernel of this process when he reads the blocks.
    cache.arrays.wait()
    return blocks


def decode(model, last_token, length, count, cache, blocks, after_first=lambda: None):
    """Generates `count` tokens behind a cache of `length` positions."""
    tokens = []
    for position in range(length, length + count):
        tokens.append(model.forward([tokens[-1] if tokens else last_token], position, cache, blocks))
        if len(tokens) == 1:
            after_first()
    return tokens
