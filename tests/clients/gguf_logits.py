"""Logits of every position of some rows, computed by llama.cpp: python gguf_logits.py MODEL.gguf
IDS.npy LOGITS.npy.
"""

from __future__ import annotations

import sys

import llama_cpp
import numpy as np


def main() -> None:
    path, ids, out = sys.argv[1:]
    rows = np.load(ids)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    # its own rounding is coarser than what is compared
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.n_threads = settings.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.stack([row_logits(context, row, size) for row in rows])
    np.save(out, logits)


def row_logits(context: object, row: np.ndarray, size: int) -> np.ndarray:
    """[length, size], fp32."""
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for i, token in enumerate(row.tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
            token,
            i,
            1,
            0,
            1,
        )
    assert llama_cpp.llama_decode(context, batch) == 0
    logits = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (size,)).copy()
        for i in range(len(row))
    ]
    llama_cpp.llama_batch_free(batch)
    return np.stack(logits)


if __name__ == "__main__":
    main()
