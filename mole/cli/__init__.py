"""The command line: find the command, compose its configuration, run it here or in several processes."""
