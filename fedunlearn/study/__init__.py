"""Studies: experiments over many models, made of tasks whose results are files."""
