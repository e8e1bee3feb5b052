"""What both trainers share: everything about a training run except the model.

training.config      what can be chosen, the presets, the learning rate of every step
training.flags       a command line -> the chosen configuration, or one line that says what is wrong with it
training.batches     which tokens are read at which step; the addressed random generators
training.evaluate    the loss on a whole split, exact and comparable; the quick random-batch estimate
training.metrics     metrics.jsonl and loss.png
training.checkpoint  weights, moments and state in one file: a crash loses nothing, and nothing that is read is trusted
training.lock        one trainer at a time in a folder
training.run         the run folder: begin a run, or resume one
training.memory      will it fit?
training.flops       how many operations it takes
training.signals     Ctrl-C and SIGTERM
training.loop        the training loop itself

PyTorch is imported by training.torch_device, training.torch_ddp and training.torch_graph alone.
"""
