"""The proof that the two engines are one function, and tests of everything around them.

test_gradients   start here: one tiny model, both engines, every gradient; plain lines
test_imports     which file may import which

model/           the two engines: layers, whole models, dropout, training in step, sampling, derivations
training/        runs: the loop, resuming, crashes, damaged files, several processes
data/            corpora and tokenizers, and the bigram on top of them
programs/        the command lines, tools, benchmarks, docs
mutants/         that all of these can fail: each bug of mutants/table.py is caught

helpers          twins of the two engines, and the measure of how far apart two tensors are
strategies       Hypothesis strategies: configs, weights and batches with everything that breaks such code
runs             what the tests of runs share
report           python -m tests.report: the measured errors, as a table and a picture in docs/
"""
