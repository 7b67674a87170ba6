"""The rewrites. To write one:

- one file, one frozen dataclass; its fields are its parameters, `str` is its spec and parses back
- `refuses` answers in a clause a user understands, lower case, no full stop; silence is not an answer
- `space` runs from cheapest to most exact and holds only instances that beat dense on some axis
- the error it claims is exact for the calibration inputs, or an upper bound within 2 %; of a large weight it is told
  from some of its rows, with a deviation of 1 to 3 % on MiniLM's (fxcompress.core.sample)
- the bytes it claims are the bytes it stores
- it never touches the graph beyond inserting its call; fxcompress.core.surgery does the rest
- tied weights stay one decision and one set of tensors: an op for every kind of use, or a refusal
"""

if __name__ != "fxcompress.passes":  # a checkout on sys.path would load a second copy of every class
    raise ImportError("import fxcompress.passes, not passes")

from fxcompress.core.attention import AttentionRewrite
from fxcompress.core.rewrite import Rewrite
from fxcompress.passes.block_low_rank import BlockLowRank
from fxcompress.passes.float8 import Float8
from fxcompress.passes.float8_dynamic import Float8Dynamic
from fxcompress.passes.hidden_units import HiddenUnits
from fxcompress.passes.int8_dynamic import Int8Dynamic
from fxcompress.passes.linformer import Linformer
from fxcompress.passes.low_rank import LowRank
from fxcompress.passes.monarch import Monarch
from fxcompress.passes.prune import Prune
from fxcompress.passes.prune_2_4 import Prune24
from fxcompress.passes.prune_blocks import PruneBlocks
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quantize_residual import QuantizeResidual
from fxcompress.passes.quantize_rows import QuantizeRows
from fxcompress.passes.quaternion import Quaternion
from fxcompress.passes.tensor_train import TensorTrain

REWRITES: tuple[type[Rewrite], ...] = (
    Quantize,
    QuantizeRows,
    QuantizeResidual,
    Float8,
    Int8Dynamic,
    Float8Dynamic,
    LowRank,
    BlockLowRank,
    Monarch,
    TensorTrain,
    Quaternion,
    Prune,
    Prune24,
    PruneBlocks,
    HiddenUnits,
)
ATTENTION_REWRITES: tuple[type[AttentionRewrite], ...] = (Linformer,)
