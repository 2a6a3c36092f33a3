"""What `hf-pc` can do: one module per command, each with HELP, EXAMPLE, add_arguments, run and show."""
