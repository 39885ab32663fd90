"""Other packages' names and arguments over this package's functions: change the import line and the code runs.

    from quant_ops.compat import torch_quantizer as tq
    from quant_ops.compat.torch_quant import Quantizer
    from quant_ops.compat import torch_quant_ext
    from quant_ops.compat import torchao
    from quant_ops.compat.int_fp_qsim.replace import replace_layers
    from quant_ops.compat.qtorch.quant import quantizer

Each module's docstring lists what differs from the original. New code is better off with the functions of ``quant_ops`` itself.
"""
