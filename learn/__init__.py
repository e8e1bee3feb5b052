"""For learners: what the two models compute, made visible.

learn.trace       one short text followed through both engines, tensor by tensor, forward and backward
learn.pictures    what a trained run looks like inside: attention, gradients, probabilities, embeddings
learn.explorer    a page on which to walk through a model forward and backward, and to move its weights
"""
