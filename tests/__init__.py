"""The proof that the two engines are one function.

test_layers       each forward/backward pair against PyTorch's autograd and against finite differences
test_model        the whole model against PyTorch, Hugging Face's GPT-2, finite differences; names, sizes, fresh weights
test_semantics    what a GPT must and must not do, whatever its numbers
test_dropout      the masks that NumPy drew, played back into PyTorch
test_trajectory   AdamW, clipping, and hundreds of steps of training in step
test_sampling     the same text from both engines, with and without the key/value cache
test_bad_input    the same ValueErrors from both engines
test_mutants      that all of these can fail: each bug of mutants/table.py is caught

The other files test what stands around the two engines: data, training and its runs, the programs, tools, bench, docs.

helpers           twins of the two engines, and the measure of how far apart two tensors are
strategies        Hypothesis strategies: configs, weights and batches with everything that breaks such code
report            python -m tests.report: the measured errors, as a table and a picture in docs/
"""
