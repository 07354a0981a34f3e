"""The command line's commands, each thin: work is imported when it is asked for."""
