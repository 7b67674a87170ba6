"""A fused graph on a CPU's own kernels: weights decoded and packed once, products by libraries, the rest by Inductor.

    rules.py       which kernel a product gets: the only place that decides
    products.py    the kernels, as calls of ATen
    decode.py      what a compressed weight is, as one matrix
    pointwise.py   GELU and attention in forms that fuse
    lower.py       fused nodes -> their steps, with those kernels for products
    module.py      the graph to call: as it is, or compiled by Inductor
    between.py     what stands between products, to be timed
    measure.py     seconds of all of these on this machine, for a profile
    seconds.py     seconds of a graph, from a profile
"""
