"""Where backbones come from: timm, torchvision, packages with weights of their own, and a user's own module.

`catalogue.py` finds a backbone by its name; each other module knows one source.
"""
