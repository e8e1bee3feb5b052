"""Programs beside the two models: to look into them, to draw what they do, to carry weights elsewhere.

tools.trace       one short text followed through both engines, tensor by tensor, forward and backward
tools.pictures    what a trained run looks like inside: attention, gradients, probabilities, embeddings
tools.curves      the loss curves of two runs laid on each other
tools.export      weights from and to Hugging Face, nanoGPT and ONNX
"""
