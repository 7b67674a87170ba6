"""For the tests of storages: a matrix there and back, and what an error in it costs."""

from fxcompress.core.metric import Metric


def round_trip(storage, matrix, metric=None):
    return storage.decode(storage.encode(matrix, metric or Metric()), matrix)


def energy(d, moment):
    """What an error d (rows, columns) puts out over inputs of this E[x x^T]."""
    return float((d.double() @ moment @ d.double().T).trace())
