"""One op a file: its PyTorch body is its meaning, its CPU fallback and the oracle of every kernel."""

from fxcompress.codegen.ops import dequantize, low_rank_linear, quantized_embedding, quantized_rows_embedding

OPS = (
    dequantize.dequantize,
    low_rank_linear.low_rank_linear,
    quantized_embedding.quantized_embedding,
    quantized_rows_embedding.quantized_rows_embedding,
)
