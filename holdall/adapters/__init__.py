"""The edge: models of other programs become Holdall's, and the other way round.

foreign.py       load and convert folders of other programs; which family reads which folder
reading.py       what a family reads: fields and weights, each of which is read or refused
transformers.py  the other way round: Holdall's models in the transformers library
exported.py      what it wrote, read back
one file a family, from config.json and weights to a ModelConfig and the weights by Holdall's names
"""
