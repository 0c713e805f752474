"""Attention of documents that several ranks share (context parallelism): ranks exchange heads for tokens.

    before    rank r has its piece of the S shared tokens: q [n, N, D], k and v [n, K, D]
    exchange  every rank sends the heads of rank d to rank d
    after     rank r has all S tokens of its own heads; attention needs nothing else
    and back  the output's heads return to the ranks that have the tokens: o [n, N, D]

Attention is divided evenly by heads, whatever the pieces (Ulysses, arXiv:2309.14509). Each rank has complete groups of
query heads with their key-value head; with more ranks than key-value heads, several ranks receive a copy of one, with a
part of its query heads. With more ranks than query heads, the queries of a head are divided too: in parts of every
document, an early one and a late one for each rank, as late tokens attend to more. If heads do not divide evenly, some
ranks have one more than others. The heads of a rank are exchanged in up to two turns, so that one is computed while the
other is sent.

    S shared tokens   n of them on this rank   T row of this rank   N query heads   K kv heads   D head dim
"""
