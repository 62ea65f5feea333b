"""What `quorate site check` and `status` look at, and what would make the next round fail."""
