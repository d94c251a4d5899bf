"""Operations on shapes instead of tensors, and a tape that notes what each of them costs."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

_STATISTIC_BYTES = 4
"""Norms and attentions keep sums of what they read, in fp32 whatever the network's precision."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear map, or a convolution."""

    name: str
    inputs: int
    outputs: int
    side: int = 1
    """Of a convolution's square kernel."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The only weights in training: low-rank ones beside layers that are frozen."""

    names: Set[str]
    """Of the layers."""
    rank: int


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """What stands for one image's part of a tensor; two are the same only if their memory is."""

    channels: int
    rows: int = 1
    """Of a picture; or tokens."""
    columns: int = 1
    has_grad: bool = False
    """Whether the backward pass comes by."""

    @property
    def positions(self) -> int:
        """How many vectors of channels it has."""
        return self.rows * self.columns


class Tape:
    """Notes what a forward pass of one image costs; methods are operations as PyTorch has them.

    What an operation keeps for the backward pass is what PyTorch's does; attention is a kernel
    that does not keep the products of queries and keys (flash or memory-efficient), and tensors
    are contiguous. Nothing is counted for what does not grow with the batch.
    """

    def __init__(
        self, *, width_bytes: int = 4, recomputes: bool = False, adapters: Adapters | None = None
    ) -> None:
        """Begin a tape.

        Args:
            width_bytes: Of a number in the network's precision.
            recomputes: Whether `recomputed` blocks keep their inputs alone.
            adapters: None trains all weights.
        """
        self.layers: list[Layer] = []
        """In the order in which they run."""
        self.forward_flops = 0
        self.backward_flops = 0
        self.kept_bytes_by_layer: list[int] = []
        """What is kept when each of them has run; in the backward pass it is freed in reverse."""
        self._width_bytes, self._recomputes, self._adapters = width_bytes, recomputes, adapters
        self._kept: dict[object, int] = {}
        self._most_bytes = 0

    @property
    def most_kept_bytes(self) -> int:
        """Most that is kept at a time: at the end, or while the backward pass is in a block."""
        return max(self._most_bytes, sum(self._kept.values()))

    @contextmanager
    def recomputed(self, *inputs: Array) -> Iterator[None]:
        """Keep a block's inputs; what it keeps itself is made again for its backward pass alone."""
        if not self._recomputes:
            yield
            return
        self.keep(*inputs)
        kept = self._kept.copy()
        yield
        self._most_bytes = self.most_kept_bytes
        self._kept = kept

    def keep(self, *arrays: Array) -> None:
        """Note what the backward pass needs; an array that is kept twice is there once."""
        for x in arrays:
            self._kept[x] = x.channels * x.positions * self._width_bytes

    def linear(self, name: str, x: Array, outputs: int) -> Array:
        """Map the channels of every position."""
        return self._layer(Layer(name, x.channels, outputs), x, x.rows, x.columns)

    def conv(
        self, name: str, x: Array, outputs: int, *, side: int = 3, stride: int = 1, padding: int = 1
    ) -> Array:
        """Convolve with a square kernel."""
        rows, columns = ((n + 2 * padding - side) // stride + 1 for n in (x.rows, x.columns))
        y = self._layer(Layer(name, x.channels, outputs, side), x, rows, columns)
        if y.has_grad:
            self.keep(x)  # also if its weight is frozen
        return y

    def _layer(self, layer: Layer, x: Array, rows: int, columns: int) -> Array:
        self.layers.append(layer)
        is_trained = self._adapters is None
        y = Array(layer.outputs, rows, columns, x.has_grad or is_trained)
        self._multiply_add(layer, x, y, is_trained=is_trained)
        self.kept_bytes_by_layer.append(sum(self._kept.values()))
        if self._adapters is None or layer.name not in self._adapters.names:
            return y
        rank = self._adapters.rank
        low = Array(rank, rows, columns, has_grad=True)
        adapted = Array(layer.outputs, rows, columns, has_grad=True)
        self._multiply_add(Layer("A", layer.inputs, rank, layer.side), x, low, is_trained=True)
        self._multiply_add(Layer("B", rank, layer.outputs), low, adapted, is_trained=True)
        return adapted

    def _multiply_add(self, layer: Layer, x: Array, y: Array, *, is_trained: bool) -> None:
        flops = 2 * layer.inputs * layer.outputs * layer.side**2 * y.positions
        self.forward_flops += flops
        self.backward_flops += flops * (x.has_grad + is_trained)
        if is_trained:
            self.keep(x)

    def attention(
        self, q: Array, k: Array, v: Array, *, heads: int, mask: Array | None = None
    ) -> Array:
        """Weigh values by the products of queries and keys, which the kernel makes again."""
        y = self._attention(q, k, v)
        if y.has_grad:
            self.keep(q, k, v, y)
            self._keep_statistics(heads * q.positions)
            if mask is not None:
                self.keep(mask)
        return y

    def plain_attention(self, q: Array, k: Array, v: Array, *, heads: int) -> Array:
        """Do the same without a kernel."""
        weights = Array(heads, q.positions, k.positions, q.has_grad or k.has_grad)
        self.multiply(q, k)
        self.multiply(weights, v)
        if weights.has_grad:
            self.keep(weights)  # the derivative of softmax is taken from what came out
        return self._attention(q, k, v)

    def _attention(self, q: Array, k: Array, v: Array) -> Array:
        flops = 2 * q.channels * q.positions * k.positions
        has_weights_grad = q.has_grad or k.has_grad
        self.forward_flops += 2 * flops
        self.backward_flops += flops * (q.has_grad + k.has_grad + has_weights_grad + v.has_grad)
        return Array(v.channels, q.rows, q.columns, has_weights_grad or v.has_grad)

    def norm(self, x: Array, *, groups: int | None = None) -> Array:
        """Normalise groups of channels over all positions, or the channels of each."""
        if x.has_grad or self._adapters is None:
            self.keep(x)
            self._keep_statistics(2 * (groups or x.positions))
        return self.with_weight(x)

    def _keep_statistics(self, count: int) -> None:
        self._kept[object()] = count * _STATISTIC_BYTES

    def activation(self, x: Array, *, channels: int | None = None) -> Array:
        """Apply a function whose derivative is taken from what went in, to so many channels."""
        if x.has_grad:
            self.keep(x)
        return self.part(x, channels or x.channels)

    def multiply(self, x: Array, y: Array) -> Array:
        """Multiply, in the shape of the first."""
        if y.has_grad:
            self.keep(x)
        if x.has_grad:
            self.keep(y)
        return self.add(x, y)

    def add(self, x: Array, y: Array) -> Array:
        """Add, in the shape of the first."""
        return Array(x.channels, x.rows, x.columns, x.has_grad or y.has_grad)

    def with_weight(self, x: Array) -> Array:
        """Add a weight, or apply weights that cost nothing more."""
        return Array(x.channels, x.rows, x.columns, x.has_grad or self._adapters is None)

    def concatenate(self, x: Array, y: Array) -> Array:
        """Put channels beside channels."""
        return Array(x.channels + y.channels, x.rows, x.columns, x.has_grad or y.has_grad)

    def resize(self, x: Array, rows: int, columns: int) -> Array:
        """Repeat, or pad, to another number of positions."""
        return Array(x.channels, rows, columns, x.has_grad)

    def part(self, x: Array, channels: int) -> Array:
        """Make something new of so many of its channels."""
        return Array(channels, x.rows, x.columns, x.has_grad)

    def copy(self, x: Array) -> Array:
        """Lay out anew."""
        return self.part(x, x.channels)
