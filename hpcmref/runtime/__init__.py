"""What belongs to the process and not to the codec: worker processes, files, memory, threads."""
