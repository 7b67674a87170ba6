"""Kernels as text: weight loaders x main loops x epilogues, proven without a GPU and ready for one.

Triton is optional. Nothing here is imported before a kernel is built, and nothing here touches a driver when imported.
"""
