"""A compressed graph in words that ONNX has; the file keeps the bytes of the compressed weights.

    plain.py       fused nodes and structured products -> ATen calls; what is kept as codes stays one call
    decode.py      codes -> numbers in integer arithmetic, for lookups and whole weights
    products.py    x W^T of a quantized W -> DequantizeLinear and MatMul, with what zeros at half steps leave over
"""
