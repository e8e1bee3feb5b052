"""Corpora and tokenizers: text in, token ids out. Nothing here knows about models or frameworks.

data.text         what every text goes through on its way in
data.corpus       the texts to train on: Tiny Shakespeare, verse, any UTF-8 file
data.verse        a small probabilistic grammar whose exact entropy is known
data.tokenizers   what every tokenizer can do; characters; loading and saving
data.bpe          byte-pair encoding by hand
data.gpt2_bpe     GPT-2's merges files and ranks
"""
