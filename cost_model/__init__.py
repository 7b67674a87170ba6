"""What a choice will cost and which to make: site errors turned into the model's loss, and the exact selection."""

if __name__ != "fxcompress.cost_model":  # a checkout on sys.path would load a second copy of every class
    raise ImportError("import fxcompress.cost_model, not cost_model")
