"""Is a gradient right, and how fast is the program: tools beside the GPT."""
