"""The work of the command line, one file per group of commands. A command takes the parsed arguments and returns the exit code.

A command has three parts: it checks its arguments, calls functions of the other rooms, and prints what they return. `cli` loads
only the file of the command that runs.
"""
