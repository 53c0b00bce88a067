"""What makes CPUs fast, and nothing else: on other devices plain torch and peft run."""
