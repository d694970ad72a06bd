"""The commands of the program `dreamer`, one module each: ``run(arguments) -> exit code``."""
