"""Everything that knows OpenRLHF; no other package imports it, Ray, DeepSpeed or vLLM.

``hook`` and ``seam`` get in, after ``fingerprints`` and ``tokenizers`` have looked; ``doctor`` and ``pth`` are commands
of ``pama``; the other modules are what is put in place. Importing this package imports no host.
"""
