"""`python -m tinygpt`: the command line, where the folder of scripts is not on the path."""

from .cli import main

main(prog_name="tinygpt")
