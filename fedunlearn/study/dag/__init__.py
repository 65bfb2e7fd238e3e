"""What any study is made of: tasks whose results are files, shared settings, and the processes that do the tasks."""
