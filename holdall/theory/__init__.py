"""Theory that runs: circuits as BaseConv, models built by hand, one-way messages, and lower bounds.

The theorems are about gated convolutions, attention and recurrent models; here they are statements about
Holdall's own mixers, with weights that are set and not trained, and numbers that can be checked.
"""
