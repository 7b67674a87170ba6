"""How a compressed weight is computed with: the torch ops rewritten graphs call, and how their operands are packed."""

if __name__ != "fxcompress.codegen":  # a checkout on sys.path would load a second copy of every class
    raise ImportError("import fxcompress.codegen, not codegen")
