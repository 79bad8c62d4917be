"""``python -m pama_plugin`` is the command ``pama``."""

from pama_plugin.cli import main

main()
