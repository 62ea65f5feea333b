"""What was done with this site's data: a line for each message, and `quorate site runs`."""
