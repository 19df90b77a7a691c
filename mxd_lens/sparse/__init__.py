"""Top-k gate and sparse decode, with their gradients. Imports torch alone.

The two operations every architecture here is made of:

    values, indices = topk_gate(x, W_enc, b_enc, k)      a = TopK_k(relu(x W_enc + b_enc))
    mixture = sparse_decode(values, indices, W_dec)      C^T a
"""

from mxd_lens.sparse.reference import sparse_decode, topk_gate

__all__ = ["sparse_decode", "topk_gate"]
