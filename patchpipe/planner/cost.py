"""How long a block takes on a device: a roofline over every matrix product, attention and elementwise pass.

A product of r rows, k inputs and n outputs takes 2·k·(r·n + fill) operations at the device's rate, or the time its
operands take to be read, whichever is longer. ``fill`` is what makes small patches less efficient: the tiles of a
product rarely fill the device evenly, and the loss does not shrink with the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchpipe.planner.machine.devices import Device
from patchpipe.planner.work.workload import Attention, Block, Matrix

PASSES = 36  # reads and writes of a token's channels by norms, modulation, rotary embedding, gates and activation
OPERATIONS_PER_STREAM = 12  # kernels of the same
OPERATIONS_PER_ATTENTION = 8  # reshapes, norms of queries and keys, the attention itself
OUTSIDE_OPERATIONS = 30  # embedding, time and rotary embedding, unpatchify, the scheduler: once a stage and patch


@dataclass(frozen=True)
class Tokens:
    """What a block works on at once.

    Attributes:
        image: Image tokens that are computed.
        text: Text tokens that are computed.
        keys: Image tokens that are attended to.
        key_text: Text tokens that are attended to.
        batch: Entries of the batch.
    """

    image: int
    text: int
    keys: int
    key_text: int
    batch: int = 1

    def of(self, stream: str) -> int:
        """Tokens of a stream, over the batch."""
        return self.batch * {"image": self.image, "text": self.text, "both": self.image + self.text}[stream]


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of one block.

    Attributes:
        attention: Of its self-attention, which Ring overlaps with its hops.
        other: Of everything else.
    """

    attention: float
    other: float

    @property
    def total(self) -> float:
        """Both."""
        return self.attention + self.other


def block_seconds(
    block: Block, query_tokens: int, key_tokens: int, device: Device, *, text: int = 0, batch: int = 1
) -> float:
    """Seconds of one block on one device.

    Args:
        block: The block.
        query_tokens: Image tokens that are computed.
        key_tokens: Image tokens they attend to, themselves included.
        device: The device.
        text: Text tokens, which are computed too and attended to.
        batch: Entries of the batch.
    """
    return block_parts(block, Tokens(query_tokens, text, key_tokens, text, batch), device).total


def block_parts(block: Block, tokens: Tokens, device: Device, *, tensor: int = 1, itemsize: int = 2) -> BlockSeconds:
    """Seconds of one block, its self-attention apart.

    Args:
        block: The block.
        tokens: What it works on.
        device: The device.
        tensor: Ranks that share its matrices.
        itemsize: Bytes of an element.
    """
    other = sum(_matrix(matrix, tokens, device, tensor, itemsize) for matrix in block.matrices)
    attention = 0.0
    for layer in block.attentions:
        seconds = _attention(layer, tokens, device, tensor, itemsize)
        if layer.kind == "cross":
            other += seconds
        else:
            attention += seconds
    return BlockSeconds(attention, other + _elementwise(block, tokens, device, itemsize))


def _matrix(matrix: Matrix, tokens: Tokens, device: Device, tensor: int, itemsize: int) -> float:
    rows = tokens.of(matrix.stream)
    if not rows:
        return 0.0
    inputs, outputs = matrix.inputs, matrix.outputs
    if matrix.split and matrix.summed:
        inputs /= tensor  # type: ignore[assignment]
    elif matrix.split:
        outputs /= tensor  # type: ignore[assignment]
    compute = 2 * inputs * (rows * outputs + device.fill) / device.rate
    read = (inputs * outputs + rows * (inputs + outputs)) * itemsize / device.bandwidth
    return max(compute, read)


def _attention(layer: Attention, tokens: Tokens, device: Device, tensor: int, itemsize: int) -> float:
    keys = {
        "joint": tokens.keys + tokens.key_text,
        "image": tokens.keys,
        "cross": tokens.key_text,
    }[layer.kind]
    queries = tokens.image + (tokens.text if layer.kind == "joint" else 0)
    width = layer.width / tensor
    compute = 4 * keys * (tokens.batch * queries * width + device.fill) / device.rate
    read = 2 * tokens.batch * (queries + keys) * width * itemsize / device.bandwidth
    return max(compute, read)


def _elementwise(block: Block, tokens: Tokens, device: Device, itemsize: int) -> float:
    text = tokens.text if block.separate_text or any(m.stream == "both" for m in block.matrices) else 0
    passes = PASSES * tokens.batch * (tokens.image + text) * block.width * itemsize / device.bandwidth
    return passes + operations(block, tokens) * device.launch


def operations(block: Block, tokens: Tokens) -> int:
    """Kernels that a block starts."""
    run = [matrix for matrix in block.matrices if tokens.of(matrix.stream)]
    streams = 1 + (block.separate_text and tokens.text > 0)
    return 2 * len(run) + OPERATIONS_PER_STREAM * streams + OPERATIONS_PER_ATTENTION * len(block.attentions)
