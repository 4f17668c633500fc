"""What the loss, the head and a trainer's step cost in time and memory."""
