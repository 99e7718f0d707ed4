"""Associative recall as a circuit: by comparing all pairs with all questions, or by sorting.

    all pairs:  answer_q = sum_k value_k prod_j (1 - x - y + 2 x y),  x, y bit j of key k and of question q
    sorting:    records (key, kind, index, value) of pairs (kind 0) and questions (kind 1) are sorted by key
                and kind, so that each pair stands just before its questions; a scan carries its value over
                them; they are sorted back by index

All inputs are bits: K pairs of a key of b bits and a value of m bits, then Q questions of b bits. Every
question's key is in exactly one pair. Outputs are the answers, m bits each.

All pairs take K Q (2 b - 1 + m) products at depth 2 + ceil(log2 b), sorting O((K + Q) b log^2 (K + Q)) at depth
O(log b log^2 (K + Q)). At 7 bits and fewer, all pairs are smaller: `all_pairs` is what to use, and `by_sorting` is
what the theorem is about.

Letters: k and q count pairs and questions; j bits; K pairs, Q questions, b bits of a key, m of a value.

Source: the sort is the parallel binary search of Arora et al., "Zoology", 2023, arXiv 2312.04927, theorem 4.4, by
Batcher's bitonic network (1968); the scan is that of Hillis and Steele (1986).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from holdall.contract import Config
from holdall.settings import PositiveInt
from holdall.theory.circuits import Circuit, Symbol

Bits = list[Any]
"""Symbols or integers 0 and 1, the most significant first."""


def all_pairs(pairs, questions, bits, value_bits):
    tape=Circuit.inputs(1)


def inputs(K,Q,b,m):
    it=iter(Circuit.inputs(K*(b+m)+Q*b,low=0,high=1))
    take=lambda n:[next(it) for _ in range(n)]
    pairs=[(take(b),take(m)) for _ in range(K)]
    return pairs,[take(b) for _ in range(Q)]


def bit(x: Any) -> Any:
    return x.within(0, 1) if isinstance(x, Symbol) else x


def greater(xs: Bits, ys: Bits) -> Any:
    """Whether the number x is greater than y, a bit."""
    above = [x * (1 - y) for x, y in zip(xs, ys, strict=True)]
    equal = [bit(1 - x - y + 2 * (x - g)) for x, y, g in zip(xs, ys, above, strict=True)]
    return bit(_first(above, equal, False)[0])


def _first(above: Bits, equal: Bits, wanted: bool) -> tuple[Any, Any]:
    if len(above) == 1:
        return above[0], equal[0]
    half = len(above) // 2
    high, same = _first(above[:half], equal[:half], True)
    low, rest = _first(above[half:], equal[half:], wanted)
    return bit(high + same * low), same * rest if wanted else None


def bitonic(records: Sequence[Bits], key: int) -> list[Bits]:
    records=[list(r) for r in records]
    n=len(records)
    block=2
    while block<=n:
        step=block//2
        while step:
            for i in range(n):
                if not i & step:
                    a,b=(i,i+step) if not i&block else (i+step,i)
                    x,y=records[a],records[b]
                    s=greater(x[:key],y[:key])
                    t=[s*(q-p) for p,q in zip(x,y)]
                    records[a]=[bit(p+d) for p,d in zip(x,t)]
                    records[b]=[bit(q-d) for q,d in zip(y,t)]
            step//=2
        block*=2
    return records


def by_sorting(K,b,m):
    n=2*K; L=n.bit_length()-1
    pairs,qs=inputs(K,K,b,m)
    B=lambda v:[(v>>(L-1-i))&1 for i in range(L)]
    recs=[k+[0]+B(i)+v for i,(k,v) in enumerate(pairs)]+[k+[1]+B(K+i)+[0]*m for i,k in enumerate(qs)]
    recs=bitonic(recs,b+1)
    f=[1-r[b] for r in recs]; v=[r[b+1+L:] for r in recs]
    d=1
    while d<n:
        nf,nv=list(f),list(v)
        for i in range(d,n):
            nv[i]=[bit(y+(1-f[i])*x) for x,y in zip(v[i-d],v[i])]
            nf[i]=bit(f[i-d]+f[i]-f[i-d]*f[i])
        f,v=nf,nv; d*=2
    recs=bitonic([r[b+1:b+1+L]+w for r,w in zip(recs,v)],L)
    return Circuit.of([r[L:] for r in recs[K:]])
