"""Rule rewards on the host: answers, format, length, puzzles; combinators; and a pool of killable workers."""
