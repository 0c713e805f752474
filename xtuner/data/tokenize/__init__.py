"""Text files → `.bin` and `.bin.meta` files: `tokenize_files` runs `plan_jobs`, `read_chunks` and `encode_chunk`."""
