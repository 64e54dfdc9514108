"""The engine process on a node: its command line, its log, its start, restart and drain."""
