"""For learners: what the two models compute, made visible, and exercises.

learn.trace         one short text followed through both engines, tensor by tensor, forward and backward
learn.pictures      what a trained run looks like inside: attention, gradients, probabilities, embeddings
learn.explorer      a page that steps through a model, forward and backward, with every number
learn.exercises     write a function of numpygpt.py yourself, and be told what is wrong and why
learn.mistakes      the mistakes that the exercises know by name; tests/mutants plants them too
"""
