"""Real text: documents from files, tokens in memory-mapped shards, and the order of training windows.

corpus = holdall.text.open_corpus(folder)      # a folder written by `holdall data`
corpus = holdall.text.default_corpus()         # the bundled novel, as bytes
corpus.train[start:stop]                       # tokens; .documents, .document_of, .about
Order(len(corpus.train), context_len, seed).rows(step, batch)
"""

from holdall.text.corpus import Corpus, Tokens, open_corpus
from holdall.text.default import default_corpus
from holdall.text.files import TextError
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import Tokenizer, tokenizer
from holdall.text.windows import Order

__all__ = [
    "Corpus",
    "Order",
    "TextError",
    "Tokenizer",
    "Tokens",
    "default_corpus",
    "open_corpus",
    "tokenizer",
    "write_corpus",
]
