"""Code blocks of other packages' documents, run with the import line changed."""

# INT-FP-QSim's block on custom formats, without its imports: the quote after 'nearest is closed.
CUSTOM_FORMAT = """
format_e3m4 = FloatingPointNumber(exp=3, man=4)
format_e5m2 = FloatingPointNumber(exp=5, man=2)

# A custom FP format that uses E3M4 in forward pass and E5M2 in backward
quant_func = quantizer(
    forward_num=format_e3m4,
    forward_rounding='nearest',
    backward_num=format_e5m2,
    backward_rounding='nearest'
)

replace_layers(
    model,
    input_quantizer=quant_func,
    weight_quantizer=quant_func,
    output_quantizer=quant_func
)
"""


def run(block, **names):
    """Executes a document's code block; `names` are what the document takes for granted."""
    namespace = dict(names)
    exec(compile(block, "document", "exec"), namespace)
    return namespace
