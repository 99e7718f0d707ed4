"""What keeps this repository true: the README's list of rooms, and the proof that a mixer is one file."""
