"""Text files → `.bin` and `.bin.meta`: `plan` (what to write) → `read` (chunks) → `work` (ids) → `pair` (files)."""
