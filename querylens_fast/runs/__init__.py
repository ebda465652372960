"""What a long run needs whatever it computes: atomic writes, locks, several processes."""
