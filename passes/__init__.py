"""The rewrites. To write one:

- one file, one frozen dataclass; its fields are its parameters, `str` is its spec and parses back
- `refuses` answers in a clause a user understands, lower case, no full stop; silence is not an answer
- `space` runs from cheapest to most exact and holds only instances that beat dense on some axis
- the error it claims is exact for the calibration inputs, or an upper bound within 2 %
- the bytes it claims are the bytes it stores
- it never touches the graph beyond inserting its call; fxcompress.core.surgery does the rest
- tied weights stay one decision and one set of tensors: an op for every kind of use, or a refusal
"""

if __name__ != "fxcompress.passes":  # a checkout on sys.path would load a second copy of every class
    raise ImportError("import fxcompress.passes, not passes")

from fxcompress.core.rewrite import Rewrite
from fxcompress.passes.low_rank import LowRank
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quantize_rows import QuantizeRows

REWRITES: tuple[type[Rewrite], ...] = (Quantize, QuantizeRows, LowRank)
