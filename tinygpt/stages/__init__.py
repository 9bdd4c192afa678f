"""The stages of a GPT's life: each term of the glossary has a file."""
