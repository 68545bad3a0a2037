"""Work of a device recorded as a graph: replayed by one call of the host, instead of thousands that launch kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


class Graphs:
    """Graphs that share one stream and one pool of memory, by a device module with torch.cuda's names.

    What a graph computes lies in the pool until any graph of it is replayed: copy what is to be kept. Inputs, and what
    lives from one replay to the next (weights, the optimizer's state), must have been allocated outside.
    """

    def __init__(self, module: ModuleType, graph_type: str) -> None:
        self._module, self._new = module, getattr(module, graph_type)
        self._stream, self._pool = module.Stream(), module.graph_pool_handle()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Runs work on the stream that graphs are recorded on, in its turn between what the caller's stream does before
        and after. What is to be captured must have run so: libraries set themselves up a stream, which no capture
        survives."""
        current = self._module.current_stream()
        self._stream.wait_stream(current)
        with self._module.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records what `work` puts on the device, without doing it. Returns what does it, and `work`'s result, which
        each replay fills anew.

        torch records its default generator along: a replay draws from the seed that is set then. Other threads may go
        on (`thread_local`): the loader's pins memory, which a capture elsewhere would not survive.
        """
        graph = self._new()
        with self._module.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result
