"""The commands of the program `dreamer`, a module each: ``run(arguments) -> exit code``."""
