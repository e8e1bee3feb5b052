"""For learners: what the two models compute, made visible, and to be written by hand.

learn.trace       one short text followed through both engines, tensor by tensor, forward and backward
learn.pictures    what a trained run looks like inside: attention, gradients, probabilities, embeddings
learn.explorer    one page that shows every tensor of a small model, forward and backward
learn.exercises   write a function of numpygpt.py yourself, and be told what is wrong and why
"""
