"""What both trainers share: everything about a training run except the model. No framework is imported here.

training.config      what can be chosen, the presets, the learning rate of every step
training.command     a command line -> the chosen configuration, or one line that says what is wrong with it
training.batches     which tokens are read at which step; the addressed random generators
training.evaluate    the loss on a whole split, exact and comparable; the quick random-batch estimate
training.metrics     metrics.jsonl and loss.png
training.checkpoint  weights, moments and state on disk: written so that a crash loses nothing, read with suspicion
training.run         the run folder: begin one, or go on with one
training.memory      will it fit?
training.stopping    Ctrl-C and SIGTERM
training.loop        the training loop itself
"""
