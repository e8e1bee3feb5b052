"""What carries models elsewhere, and what compares runs.

tools.export    weights from and to Hugging Face, nanoGPT and ONNX
tools.sizes     parameters, memory and operations of a model
tools.curves    the loss curves of two runs laid on each other
"""
