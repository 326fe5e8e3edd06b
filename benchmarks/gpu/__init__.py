"""`make gpu`: all that an hour with a GPU is for, in processes of their own, under nine minutes."""
