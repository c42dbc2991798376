from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

class Batch:
    headers: NDArray[np.uint8]
    lengths: NDArray[np.uint32]
    def __init__(self, most: int = 256) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, k: int, /) -> memoryview: ...
    def __iter__(self) -> Iterator[memoryview]: ...

class BatchPort:
    backend: object
    queue: int
    def __init__(self, backend: object, queue: int) -> None: ...
