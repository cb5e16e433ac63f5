"""What every package stands on: the store, processes, files, output, errors. Imports nothing else of ours."""
