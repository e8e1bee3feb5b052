"""What every program here needs.

common.startup   imports that fail: a missing package is one line
common.errors    UserError: what a user caused, in one line
common.cores     how many threads pay
common.files     bounded reads, atomic writes, JSON
common.tensors   safetensors, read and written
common.cli       a command line -> options; every way to fail -> one line and an exit status
"""
