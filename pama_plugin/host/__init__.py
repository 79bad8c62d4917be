"""Everything that knows OpenRLHF; no other package imports it, Ray, DeepSpeed or vLLM.

``hook`` and ``seam`` get in, the other modules are what they put in place. Importing this package imports no host.
"""
