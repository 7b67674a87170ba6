"""One op a file: its PyTorch body is its meaning, its CPU fallback and the oracle of every kernel."""

from fxcompress.codegen.ops import (
    block_low_rank_linear,
    dequantize,
    dequantize_float8,
    float8_dynamic_linear,
    float8_embedding,
    fused,
    int8_dynamic_linear,
    linformer_attention,
    low_rank_linear,
    monarch_linear,
    quantized_embedding,
    quantized_rows_embedding,
    quaternion_linear,
    tensor_train_embedding,
    tensor_train_linear,
    unmask,
    unmask_2_4,
    vmap,
)

OPS = (
    dequantize.dequantize,
    dequantize_float8.dequantize_float8,
    quantized_embedding.quantized_embedding,
    quantized_rows_embedding.quantized_rows_embedding,
    float8_embedding.float8_embedding,
    low_rank_linear.low_rank_linear,
    block_low_rank_linear.block_low_rank_linear,
    monarch_linear.monarch_linear,
    quaternion_linear.quaternion_linear,
    tensor_train_linear.tensor_train_linear,
    tensor_train_embedding.tensor_train_embedding,
    int8_dynamic_linear.int8_dynamic_linear,
    float8_dynamic_linear.float8_dynamic_linear,
    unmask.unmask,
    unmask_2_4.unmask_2_4,
    linformer_attention.linformer_attention,
    fused.fused,
    fused.fused_parallel,
)

for _op in OPS:
    vmap.register(_op)
