"""Modules that concern the process and not the codec: worker processes, files, memory and threads."""
