"""HOST: trusted. Everything that comes from a guest is hostile input with a size limit."""
