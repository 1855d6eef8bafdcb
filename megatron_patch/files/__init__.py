"""What a run writes and what a user types: one module per file, its type, writer, reader and constants together."""
