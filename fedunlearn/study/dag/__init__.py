"""Steps whose results are files, made once by any number of processes."""
