"""What `rds bench` measures of a server, as its client and over HTTP alone; and how measurements are told."""
