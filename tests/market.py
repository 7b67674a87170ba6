"""A market of awkward weights: small models of one site each, with the inputs that calibrate it.

Every rewrite is tried on every one of them (tests/test_contract.py): what one rewrite survived, all must.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxcompress.core.capture import capture
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, Statistics, find_sites

TOKENS = 192


@dataclass(frozen=True, eq=False)
class Stall:
    """A captured model with one site and inputs x (TOKENS, in), or ids."""

    name: str
    gm: SignedModule
    x: Tensor
    calibrated: bool = True

    @property
    def site(self) -> Site:
        """As calibration on exactly `x` would describe it, nothing held out."""
        (site,) = find_sites(self.gm)
        return replace(site, statistics=self._seen(site) if self.calibrated else Statistics())

    def _seen(self, site: Site) -> Statistics:
        if site.kind == "embedding":
            counts = torch.bincount(self.x, minlength=site.rows).double()
            return Statistics(row_weight=counts / counts.sum())
        x = self.x.double()
        return Statistics(x.T @ x / len(x), x.mean(0), sample=self.x.float())

    def signal(self) -> Tensor:
        """What the weight alone makes of the inputs, float64."""
        w = self.site.weight.double()
        return w[self.x] if self.site.kind == "embedding" else self.x.double() @ w.T


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Singular values that fall like 1/sqrt(k), as trained weights' roughly do."""
    u, s, vt = torch.linalg.svd(_normal(rows, columns, seed=seed), full_matrices=False)
    return u / torch.arange(1, len(s) + 1).sqrt() @ vt


def _inputs(columns: int, seed: int = 1) -> Tensor:
    """Correlated, not centred."""
    return _normal(TOKENS, columns, seed=seed) @ _normal(columns, columns, seed=seed + 1) / columns**0.5 + 0.3


def _linear(name: str, weight: Tensor, x: Tensor, bias: bool = True, calibrated: bool = True) -> Stall:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).to(weight.dtype)
    layer.weight = nn.Parameter(weight)
    if bias:
        layer.bias = nn.Parameter(_normal(len(weight), seed=9).to(weight.dtype))
    net = nn.Sequential(layer)
    return Stall(name, capture(net, (x[:4].to(weight.dtype),)), x.to(weight.dtype), calibrated)


class _Shared(nn.Module):
    """One weight, used twice; the second use sees what the first made."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat([self.layer(first), self.layer(second)])


def market() -> list[Stall]:
    """Freshly made: tests may not see each other's analyses."""
    plain, x = _weight(32, 48), _inputs(48)
    low = _normal(32, 4, seed=2) @ _normal(4, 48, seed=3)
    zero_column = plain.clone()
    zero_column[:, 5] = 0
    dead = x.clone()
    dead[:, 10:16] = 0
    wide_range = plain * torch.logspace(-6, 3, 32).unsqueeze(1)
    table = nn.Sequential(nn.Embedding.from_pretrained(_weight(64, 32), freeze=False))
    ids = torch.arange(TOKENS) ** 2 % 64
    vocabulary = nn.Sequential(nn.Embedding.from_pretrained(_weight(2304, 64), freeze=False))
    words = torch.arange(TOKENS) ** 3 % 2304
    return [
        _linear("plain", plain, x),
        _linear("tall", _weight(48, 32), _inputs(32)),
        _linear("without bias", plain, x, bias=False),
        _linear("without data", plain, x, calibrated=False),
        _linear("rank deficient", low, x),
        _linear("zero column", zero_column, x),
        _linear("all zero", torch.zeros(32, 48), x),
        _linear("dead inputs", plain, dead),
        _linear("tiny", _weight(2, 4), _inputs(4)),
        _linear("prime", _weight(31, 37), _inputs(37)),
        _linear("huge range", wide_range, x),
        _linear("ill-conditioned inputs", plain, x * torch.logspace(0, -6, 48)),
        _linear("constant inputs", plain, x[:1].expand(TOKENS, -1).contiguous()),
        _linear("bfloat16", plain.bfloat16(), x),
        _linear("float16", plain.half(), x),
        _linear("not contiguous", _weight(48, 32).t(), x),
        Stall("shared", capture(_Shared(plain), (x[:4],)), x),
        Stall("embedding", capture(table, (ids[:4],)), ids),
        Stall("vocabulary", capture(vocabulary, (words[:4],)), words),
    ]


NAMES = [stall.name for stall in market()]
