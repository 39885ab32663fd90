"""Quantized layers in several processes: tensor parallel plans for them, with the names and arguments of torch's.

    from quant_ops.distributed import ColwiseParallel, RowwiseParallel, parallelize_module

``ColwiseParallel`` and ``RowwiseParallel`` are torch's styles, which take quantized layers too; torch's own ``parallelize_module``
takes them. ``parallelize_module`` here takes plans of torch's styles and of transformers' words as well, and looks at all of a plan
before it changes a layer. Importing this package imports torch.distributed.tensor, which takes a second.

Read next: cut.py (how a layer is cut), layers.py (what its parts compute), styles.py (plans).
"""

from .layers import ShardedLayer, Sharding
from .styles import ColwiseParallel, RowwiseParallel, parallelize_module

__all__ = ["ColwiseParallel", "RowwiseParallel", "ShardedLayer", "Sharding", "parallelize_module"]
