"""Programs that measure. Each runs as `python -m bench.X`; none of them asserts anything.

bench.cpu        training steps and generation of both engines on a CPU; GPT-2 124M beside transformers
bench.gpu        train_torch.py on a GPU
bench.subwords   the same model with characters and with byte-pair encodings
bench.timing     the clock that they share
"""
