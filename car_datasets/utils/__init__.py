"""What knows nothing of a row's text, a score or a cluster: files, columns, processes, and the Hub."""
