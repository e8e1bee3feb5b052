"""A page on which one can walk through a GPT, forward and backward, number by number. page.py writes it.

page.html, page.css     what the page looks like
model.js                the forward pass once more, for moving a weight
steps.js                every step in both directions: its formula, and where each of its numbers comes from
page.js                 what the reader does: steps, cells, weights
"""
