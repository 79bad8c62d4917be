"""The only package that imports OpenRLHF, Ray, DeepSpeed or vLLM.

``hook`` and ``seam`` install the plugin in a run after the checks in ``preflight``; ``actors`` has the classes that
replace OpenRLHF's; ``doctor`` and ``pth`` are commands of ``pama``. Importing this package does not import OpenRLHF.
"""
