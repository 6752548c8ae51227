"""JEL in other people's training frameworks: a file each, importing its framework, so import the one you use."""
